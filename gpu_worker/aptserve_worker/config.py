"""Settings of a worker, read once at the edge."""

from __future__ import annotations

import os
import re
import secrets
import socket
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from aptserve_worker.plan import Tier

FAKE_MODEL = "fake"
"""Model name that starts the shipped fake engine instead of a real one."""

_BYTE_UNITS = {
    "": 1,
    "B": 1,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}


class SettingsError(ValueError):
    """A setting has a wrong value; the message is one line naming field and value."""


def parse_bytes(value: object) -> object:
    """The number of bytes that ``"2GiB"``, ``"500 MB"`` or ``"1048576"`` means."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ValueError("must be a number of bytes such as 2GiB or 500MB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].upper()])


def parse_tiers(value: object) -> object:
    """The tiers that ``"kv,hidden"`` means."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if not isinstance(value, list | tuple):
        return value
    return tuple(_parse_tier(part) for part in value)


def _parse_tier(part: object) -> object:
    if not isinstance(part, str):
        return part
    try:
        return Tier[part.upper()]
    except KeyError:
        names = ", ".join(tier.name.lower() for tier in Tier)
        raise ValueError(f"each must be one of {names}") from None


def default_worker_id() -> str:
    """Host, process and a random part: in containers the process id is 1 everywhere."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"


class WorkerSettings(BaseSettings):
    """What one worker serves, with how much memory, and where it dials in.

    Every field may come from the environment as ``APTSERVE_WORKER_<FIELD>``.
    """

    model_config = SettingsConfigDict(
        env_prefix="APTSERVE_WORKER_", frozen=True, extra="forbid", env_ignore_empty=True
    )

    scheduler: str = Field("127.0.0.1:50051", min_length=1)
    """Address of the scheduler service."""
    join_token: SecretStr | None = None
    """Shared secret that the scheduler asks for; None where it asks for none."""
    worker_id: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        default_factory=default_worker_id
    )
    """Name, unique among the workers of one scheduler."""
    model: str = Field("embedded", min_length=1)
    """``"embedded"``, a folder, a hub id, or ``"fake"``."""
    model_name: str | None = None
    """Name by which requests call the model; None: derived from ``model``."""
    tiers: Annotated[tuple[Tier, ...] | None, NoDecode, BeforeValidator(parse_tiers)] = None
    """Cache tiers to offer; None: all that are exact for the model and smaller than KV."""
    kv8_format: Literal["int8", "fp8"] = "int8"
    """Codes of the kv8 tier; fp8 is e4m3, of GPUs with compute capability 8.9 or later."""
    block_size: int = Field(16, ge=1, le=1024)
    """Tokens per block."""
    pool_units: int | None = Field(None, ge=2)
    """Size of the pool in units; None: from ``pool_memory``, or the engine decides."""
    pool_memory: Annotated[int | None, BeforeValidator(parse_bytes)] = Field(None, ge=1)
    """Size of the pool in bytes, also as ``"2GiB"``; excludes ``pool_units``."""
    max_num_seqs: int = Field(256, ge=1, le=65536)
    """Most sequences in one batch."""
    max_num_batched_tokens: int = Field(4096, ge=1, le=1 << 20)
    """Most new tokens in one batch."""
    device: str = Field("auto", min_length=1)
    """``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``."""
    tensor_parallel: int = Field(1, ge=1, le=64)
    """GPUs that share the model, each with a part of every layer; on a CPU, processes."""
    replica: int | None = Field(None, ge=0)
    """Number among the workers of this machine, so that each takes GPUs of its own; None: the only
    one. Without effect where ``device`` names one."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Type of weights and cache."""
    kernels: Literal["auto", "reference", "cpu", "triton"] = "auto"
    """Implementation of attention: auto is the fastest for the device, reference the plain one to
    compare with."""
    graphs: Literal["auto", "off", "eager"] = "auto"
    """Decode steps recorded as CUDA graphs: auto where there is a GPU; eager runs the padded steps
    that would be recorded, on any device, to compare with."""
    overlap: Literal["auto", "off", "on"] = "auto"
    """Launching a step while the one before runs: auto where there is a GPU; off waits for each, to
    compare with."""
    gpu_memory_share: float = Field(0.9, gt=0, le=1)
    """Of the GPU's memory, what weights, scratch and pool together may take."""
    num_threads: int | None = Field(None, ge=1)
    """CPU threads of the engine; None: what the machine has."""
    calibrate: bool = True
    """Measure the iteration time before attaching; else advertise a rough guess."""
    leave_timeout_seconds: float = Field(30.0, ge=0, le=3600)
    """Longest wait for Detached after SIGTERM."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is logged."""
    log_format: Literal["auto", "console", "json"] = "auto"
    """Form of log lines; auto is console on a terminal and JSON elsewhere."""

    @model_validator(mode="after")
    def _check_together(self) -> WorkerSettings:
        if self.pool_units is not None and self.pool_memory is not None:
            raise ValueError(f"pool_memory={self.pool_memory}: pool_units is given as well")
        if self.tensor_parallel > 1 and ":" in self.device:
            raise ValueError(
                f"device={self.device}: tensor_parallel takes the first {self.tensor_parallel}"
                " GPUs; choose others with CUDA_VISIBLE_DEVICES"
            )
        if self.tensor_parallel > 1 and self.model == FAKE_MODEL:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel}: the fake model has nothing to divide"
            )
        if self.tiers is not None:
            if Tier.KV not in self.tiers:
                raise ValueError("tiers: kv must be among them, every model starts there")
            if len(set(self.tiers)) < len(self.tiers):
                raise ValueError("tiers: each may be named once")
        return self


def load_settings(**values: Any) -> WorkerSettings:
    """Settings from ``values``, then the environment, then the defaults.

    Raises :class:`SettingsError` for the first wrong field.
    """
    try:
        return WorkerSettings(**values)
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return message
    field = str(first["loc"][0])
    if field == "join_token":  # a secret does not belong in an error message
        return f"{field}: {message}"
    return f"{field}={first['input']!r}: {message}"
