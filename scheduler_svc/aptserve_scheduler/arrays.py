"""Arrays as all of the scheduler uses them, and what it asks of them most often.

A decision works on some ten to some hundred requests at a time, where what numpy does before it
computes takes longer than computing: the forms here are those that do the least of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Tiers = npt.NDArray[np.int8]
"""Values of :class:`~aptserve_scheduler.core.types.Tier`; 0 where a request holds no cache."""

_Value = TypeVar("_Value")


def indices(mask: Bools) -> Ints:
    """Positions where a mask holds."""
    return mask.nonzero()[0]


def any_of(mask: Bools) -> bool:
    """``mask.any()``, in a fifth of the time."""
    return bool(np.count_nonzero(mask))


def all_of(mask: Bools) -> bool:
    """``mask.all()``, in a fifth of the time."""
    return bool(np.count_nonzero(mask) == mask.size)


class computed_once(Generic[_Value]):  # noqa: N801 - a decorator
    """A property that is computed when it is first read. :func:`functools.cached_property` takes a
    lock until 3.12, which takes longer than gathering a column does."""

    def __init__(self, compute: Callable[[Any], _Value]) -> None:
        self.__doc__ = compute.__doc__
        self._compute = compute
        self._name = compute.__name__

    def __get__(self, owner: Any, owner_type: type) -> _Value:
        value = owner.__dict__[self._name] = self._compute(owner)
        return value
