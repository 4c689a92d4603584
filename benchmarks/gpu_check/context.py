"""What every part is given: the device, how to time on it, and how long it may take."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from aptserve_kernels.costs import Gpu

from benchmarks.gpu_check.timing import Timer


class Deadline:
    """A point in time that work should be done by."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        """Seconds until then, negative after it."""
        return self._end - self._clock()

    def within(self, seconds: float) -> Deadline:
        """The earlier of this one and ``seconds`` from now."""
        return Deadline(min(seconds, self.left()), self._clock)


@dataclass(slots=True)
class Context:
    """Shared by the parts, which run one after the other."""

    device: torch.device
    timer: Timer
    deadline: Deadline
    """Of the part that runs."""
    is_dry: bool = False
    """Tiny sizes on a CPU: what is run counts, not how long it takes."""
    is_quick: bool = False
    say: Callable[[str], None] = field(default=lambda text: print(text, flush=True))
    ceilings: Gpu | None = None
    """What the device was measured to reach."""
    wrong_kernels: set[str] = field(default_factory=set)
    """Those that the first part found to give wrong results."""
    notes: list[str] = field(default_factory=list)
    """Of the part that runs: what it left out, and why."""
    found: dict[str, Any] = field(default_factory=dict)
    """Of the part that runs: what it has found so far, to be kept should it not end."""

    def note(self, text: str) -> None:
        """Say and keep."""
        self.notes.append(text)
        self.say(f"  note: {text}")

    def has_seconds(self, seconds: float, what: str) -> bool:
        """Whether so much time is left for ``what``; noted if not."""
        left = self.deadline.left()
        if left >= seconds:
            return True
        self.note(f"{what} left out: {max(left, 0.0):.0f} s left of this part's time")
        return False

    def free_bytes(self) -> int:
        """Memory that can be allocated on the device."""
        if self.device.type != "cuda":
            return 1 << 30
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]
