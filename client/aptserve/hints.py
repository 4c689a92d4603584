"""What a request tells scheduling policies about itself: the one place that knows the ranges."""

from __future__ import annotations

from dataclasses import dataclass

from aptserve.errors import InvalidArgumentError

MAX_TENANT_LENGTH = 128
MAX_PRIORITY = 100
_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Hints:
    """Fields of ``aptserve.v1.GenerateRequest`` that only policies look at."""

    tenant: str = ""
    """Whose request it is; empty: the default tenant."""
    priority: int = 0
    """0 is normal, higher is more urgent."""
    expected_output_tokens: int | None = None
    """The caller's guess of the output length, resumed tokens included; ``None``: unknown."""

    def validate(self) -> None:
        """Raise :class:`InvalidArgumentError` naming the first field that is out of range."""
        check_tenant("tenant", self.tenant)
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise InvalidArgumentError(
                "priority", f"must be in [{-MAX_PRIORITY}, {MAX_PRIORITY}], not {self.priority}"
            )
        expected = self.expected_output_tokens
        if expected is not None and not 1 <= expected <= _MAX_UINT32:
            raise InvalidArgumentError(
                "expected_output_tokens", f"must be in [1, {_MAX_UINT32}], not {expected}"
            )


def check_tenant(field: str, tenant: str) -> None:
    """Raise :class:`InvalidArgumentError` naming ``field`` for what is no tenant's name."""
    if len(tenant) > MAX_TENANT_LENGTH:
        raise InvalidArgumentError(field, f"must have at most {MAX_TENANT_LENGTH} characters")
    if not tenant.isprintable():
        raise InvalidArgumentError(field, "must be printable")
