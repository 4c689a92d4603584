"""The state of each part of a running service, as the operator sees it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    """Where a part is in its life; the value is what the operator reads."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"


@dataclass(slots=True)
class Part:
    """One child as the supervisor knows it; ``on_change`` hears of every change of state."""

    name: str
    on_change: Callable[[Part], None]
    state: State = State.STARTING
    detail: str = ""
    _since: float = field(default_factory=time.monotonic)

    @property
    def is_ready(self) -> bool:
        """Whether it does its work."""
        return self.state is State.READY

    @property
    def seconds_in_state(self) -> float:
        """Since the last change of state."""
        return time.monotonic() - self._since

    @property
    def ready_seconds(self) -> float | None:
        """How long it has been ready; ``None`` when it is not."""
        return self.seconds_in_state if self.is_ready else None

    def become(self, state: State, detail: str = "") -> None:
        """Change the state and tell the listener."""
        self.state, self.detail, self._since = state, detail, time.monotonic()
        self.on_change(self)
