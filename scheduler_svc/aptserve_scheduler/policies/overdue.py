"""The line of those who waited for too long, and how many of it have a right to memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from aptserve_scheduler.arrays import Bools, Ints, any_of, indices
from aptserve_scheduler.policies.base import BatchProblem, Candidates
from aptserve_scheduler.policies.outlook import Outlook

_ROUNDING_SECONDS = 1e-6


class InLine(NamedTuple):
    """An overdue request."""

    runs: bool
    row: int
    """Of ``problem.running`` if it runs, else of ``problem.waiting``."""


def overdue_line(
    problem: BatchProblem, outlook: Outlook, *, patience_seconds: float, lane_share: float
) -> list[InLine]:
    """Overdue requests that have a right to memory: higher priority first, then earlier arrival.

    Those are the first of the line, and who follows while all of them together fit ``lane_share``
    of the pool, what requests whose end is in flight leave of it, and the worker's rows.
    """
    running, waiting = problem.running, problem.waiting
    is_over = _is_overdue(running, running.missed, patience_seconds)
    over_running = indices(is_over & running.schedulable)
    over_waiting = indices(_is_overdue(waiting, outlook.waiting_is_late, patience_seconds))
    if not len(over_running) + len(over_waiting):
        return []
    in_order = _in_order(problem, over_running, over_waiting)
    line = [next(in_order)]
    num_units = _units_of(line[0], problem, outlook)
    most_units = lane_share * problem.num_units
    # The next one needs a unit at least. Most of the time the first takes all there are.
    if num_units + 1 > most_units:
        return line
    stuck = indices(~running.schedulable)
    held_units = int(np.add.reduce(running.num_units[stuck]))
    most_units = min(most_units, problem.num_units - held_units)
    for overdue in in_order:
        num_units += _units_of(overdue, problem, outlook)
        if num_units > most_units or len(line) >= problem.max_num_seqs - len(stuck):
            break
        line.append(overdue)
    return line


def _in_order(problem: BatchProblem, over_running: Ints, over_waiting: Ints) -> Iterator[InLine]:
    """These rows of ``running`` and ``waiting`` in the order of the line."""
    running, waiting = problem.running, problem.waiting
    age = np.concatenate([running.age_seconds[over_running], waiting.age_seconds[over_waiting]])
    priority = np.concatenate([running.priorities[over_running], waiting.priorities[over_waiting]])
    rows = np.concatenate([over_running, over_waiting])
    for place in np.lexsort((-age, -priority)).tolist():
        yield InLine(place < len(over_running), int(rows[place]))


def _units_of(overdue: InLine, problem: BatchProblem, outlook: Outlook) -> int:
    """Units that a request of the line holds or needs, its next step included."""
    runs, row = overdue
    if runs:
        return int(problem.running.num_units[row] + outlook.growth[row])
    return int(outlook.first_units[row])


def overdue_at(problem: BatchProblem, outlook: Outlook, *, patience_seconds: float) -> float:
    """Time before which nobody becomes overdue who is not.

    As long as all running get a token in each iteration and nobody else of them becomes late.
    """
    waiting, running = problem.waiting, problem.running
    most_seconds = waiting.ttft_seconds + patience_seconds
    slack = waiting.miss_after_seconds - waiting.pending_seconds
    late_in = slack - (outlook.waiting_prefill + problem.cost.base_seconds)
    # Late and too old; who was paused is never late.
    over_in = np.maximum(late_in, most_seconds - waiting.age_seconds)
    is_paused = np.isinf(waiting.miss_after_seconds)
    over_in[is_paused] = (most_seconds - waiting.pending_seconds)[is_paused]
    is_overdue = _is_overdue(waiting, outlook.waiting_is_late, patience_seconds)
    too_old_in = (running.ttft_seconds + patience_seconds - running.age_seconds)[running.missed]
    least = min(
        float(over_in[~is_overdue].min(initial=np.inf)),
        float(too_old_in[too_old_in >= 0].min(initial=np.inf)),
    )
    return problem.now + least - _ROUNDING_SECONDS


def _is_overdue(candidates: Candidates, is_late: Bools, patience_seconds: float) -> Bools:
    """[n] who is late and too old, or without a token for as long although that is forgiven."""
    most_seconds = candidates.ttft_seconds + patience_seconds
    over: Bools = is_late & (candidates.age_seconds > most_seconds)
    waits_long = candidates.pending_seconds > most_seconds
    if any_of(waits_long):
        # It must hold until the token is there: a prompt under way could be paused again.
        over |= waits_long & np.isinf(candidates.miss_after_seconds)
    return over
