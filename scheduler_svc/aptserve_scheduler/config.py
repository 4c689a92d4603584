"""Settings of the scheduler service: one frozen value, checked once."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from aptserve_scheduler.policies.registry import create_policy, policy_names

_ENV_PREFIX = "APTSERVE_SCHEDULER_"
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class ConfigError(Exception):
    """A setting has a value that cannot be used; the message is one line for the user."""


class SchedulerSettings(BaseSettings):
    """Every setting of the service, from arguments or ``APTSERVE_SCHEDULER_…`` variables."""

    model_config = SettingsConfigDict(env_prefix=_ENV_PREFIX, frozen=True, extra="forbid")

    listen: str = "127.0.0.1:50051"
    """HOST:PORT of the gRPC server; port 0 chooses a free one."""
    policy: str = "apt-slo"
    """How batches are composed."""
    pipeline_depth: Annotated[int, Field(ge=1, le=8)] = 2
    """Plans sent ahead of results; 1 is a plain loop."""
    max_waiting: Annotated[int, Field(ge=1)] = 4096
    """Requests that may wait; more are refused with a retry delay."""
    ttft_objective_seconds: Seconds = 1.0
    """Time to first token of requests that state none."""
    tbt_objective_seconds: Seconds = 1.0
    """P99 time between tokens of requests that state none."""
    api_key: SecretStr | None = None
    """Bearer token that clients and operators must show. Unset: none."""
    join_token: SecretStr | None = None
    """Bearer token that workers must show. Unset: none."""
    metrics_listen: str | None = None
    """HOST:PORT of the Prometheus endpoint. Unset: no endpoint."""
    drain_grace_seconds: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    """How long running requests may go on when the service stops."""
    stall_seconds: Seconds = 30.0
    """Without any progress for so long, while requests are pending, health is NOT_SERVING."""
    plan_timeout_seconds: Seconds = 600.0
    """A worker that has answered no plan for so long, though it is alive, is cut, and its requests
    go on elsewhere. Longer than its longest step, which on a CPU may be minutes."""
    worker_wait_seconds: Seconds = 30.0
    """How long accepted requests wait for a worker when none is attached."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"
    """``auto``: console on a terminal, JSON elsewhere."""

    @field_validator("listen", "metrics_listen")
    @classmethod
    def _check_address(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @field_validator("policy")
    @classmethod
    def _check_policy(cls, value: str) -> str:
        if value not in policy_names():
            raise ValueError(f"must be one of {', '.join(policy_names())}")
        try:
            create_policy(value)
        except ImportError as error:  # a solver that is not installed
            raise ValueError(str(error)) from None
        return value

    @field_validator("api_key", "join_token")
    @classmethod
    def _check_secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value():
            raise ValueError("must not be empty")
        return value


def load_settings(**overrides: Any) -> SchedulerSettings:
    """The settings of environment and arguments; ``None`` means not given.

    Raises :class:`ConfigError` with one line that names field and value.
    """
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return SchedulerSettings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if field in ("api_key", "join_token") else f" = {first['input']!r}"
        raise ConfigError(f"{field}{shown}: {message}") from error


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[IPV6]:PORT``. Raises ``ValueError``."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ValueError("must be HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
