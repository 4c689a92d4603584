"""From the rows of a file, in any order and some of them failures, to requests."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np

from aptserve.workload.trace import Floats, Ints, Lengths, Trace, joined, trace_of


@dataclass
class Rows:
    """The requests of a file, one by one."""

    seconds: array[float] = field(default_factory=lambda: array("d"))
    """Of their arrival, since anything; empty for a file without arrivals."""
    prompts: array[int] = field(default_factory=lambda: array("q"))
    outputs: array[int] = field(default_factory=lambda: array("q"))
    num_without_tokens: int = 0

    def add(self, seconds: float | None, num_prompt_tokens: int, num_output_tokens: int) -> None:
        """One request; left out and counted when it has no prompt or no output (it failed)."""
        if num_prompt_tokens == 0 or num_output_tokens == 0:
            self.num_without_tokens += 1
            return
        if seconds is not None:
            self.seconds.append(seconds)
        self.prompts.append(num_prompt_tokens)
        self.outputs.append(num_output_tokens)

    def to_workload(self, name: str, *, has_ticks: bool) -> Trace | Lengths:
        """The requests in the order of arrival; at least one was added.

        Equal arrivals are spread where they are known to be ticks, or less than half are distinct.
        """
        prompts, outputs = np.array(self.prompts, np.int64), np.array(self.outputs, np.int64)
        note = ""
        if self.num_without_tokens:
            note = f"{self.num_without_tokens:,} rows without prompt or output tokens left out"
        if not self.seconds:
            return Lengths(name, prompts, outputs, note)
        return _in_order(name, np.array(self.seconds), prompts, outputs, note, has_ticks)


def spread_ticks(seconds: Floats) -> Floats:
    """Arrivals [n], ascending, with equal ones spread evenly over their tick.

    A tick lasts until the next one, but no longer than the median distance between ticks.
    """
    ticks, first, counts = np.unique(seconds, return_index=True, return_counts=True)
    if len(ticks) < 2:
        return seconds
    gaps = np.diff(ticks)
    typical = float(np.median(gaps))
    widths = np.append(np.minimum(gaps, typical), typical)
    place = np.arange(len(seconds)) - np.repeat(first, counts)
    return seconds + np.repeat(widths / counts, counts) * place


def _in_order(
    name: str, seconds: Floats, prompts: Ints, outputs: Ints, note: str, has_ticks: bool
) -> Trace:
    if (np.diff(seconds) < 0).any():
        order = np.argsort(seconds, kind="stable")
        seconds, prompts, outputs = seconds[order], prompts[order], outputs[order]
        note = joined(note, "rows put in order of arrival")
    num_stamps = len(np.unique(seconds))
    if 1 < num_stamps < len(seconds) and (has_ticks or 2 * num_stamps < len(seconds)):
        seconds = spread_ticks(seconds)
        note = joined(note, f"arrivals spread evenly over {num_stamps:,} ticks")
    return trace_of(name, seconds - seconds[0], prompts, outputs, note)
