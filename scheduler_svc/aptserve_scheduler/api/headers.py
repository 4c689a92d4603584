"""Fields of a request that gateways send as metadata of the call.

The keys are those of llm-d. Its ``x-llm-d-inference-objective`` is not among them: it names a
resource of a Kubernetes cluster, and what it stands for is not to be known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from aptserve.errors import InvalidArgumentError
from aptserve.hints import check_tenant

TTFT_KEY = "x-llm-d-slo-ttft-ms"
TBT_KEY = "x-llm-d-slo-tpot-ms"
TENANT_KEY = "x-llm-d-inference-fairness-id"
_KEYS = (TTFT_KEY, TBT_KEY, TENANT_KEY)
_MILLISECONDS = re.compile(r"[0-9]{1,12}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True)
class RequestHeaders:
    """What the metadata of a Generate call says; fields of the message win over it."""

    ttft_seconds: float | None = None
    tbt_seconds: float | None = None
    tenant: str = ""

    @classmethod
    def from_metadata(cls, metadata: Iterable[tuple[str, str | bytes]]) -> RequestHeaders:
        """Raises :class:`InvalidArgumentError` naming the key whose value cannot be."""
        values: dict[str, str] = {}
        for key, value in metadata:
            if key not in _KEYS:
                continue
            if key in values:
                raise InvalidArgumentError(key, "is given more than once")
            if isinstance(value, bytes):
                raise InvalidArgumentError(key, "must be text")
            values[key] = value.strip()
        tenant = values.get(TENANT_KEY, "")
        check_tenant(TENANT_KEY, tenant)
        return cls(_seconds(values, TTFT_KEY), _seconds(values, TBT_KEY), tenant)


def _seconds(values: dict[str, str], key: str) -> float | None:
    if key not in values:
        return None
    text = values[key]
    seconds = float(text) * 1e-3 if _MILLISECONDS.fullmatch(text) else 0.0
    if seconds <= 0:
        raise InvalidArgumentError(key, "must be a decimal number of milliseconds, more than 0")
    return seconds
