"""Which units of the pool are free."""

from __future__ import annotations

from collections.abc import Iterable


class UnitAllocator:
    """Hands out unit numbers ``[0, num_units)``; holds no memory itself.

    ``allocate`` returns None for "not now"; freeing what is not held raises ``ValueError``.
    """

    def __init__(self, num_units: int) -> None:
        if num_units < 1:
            raise ValueError(f"num_units is {num_units}, must be at least 1")
        self.num_units = num_units
        # The most recently freed unit goes out first: its memory is the likeliest to be cached.
        self._free = list(range(num_units - 1, -1, -1))
        self._held = bytearray(num_units)

    @property
    def num_free(self) -> int:
        """Units that can be allocated now."""
        return len(self._free)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` units, or None when fewer are free."""
        if count > len(self._free):
            return None
        if count == 0:
            return []
        units = self._free[-count:]
        del self._free[-count:]
        for unit in units:
            self._held[unit] = 1
        return units

    def free(self, units: Iterable[int]) -> None:
        """Give units back."""
        for unit in units:
            if not self._held[unit]:
                raise ValueError(f"unit {unit} is freed but not held")
            self._held[unit] = 0
            self._free.append(unit)

    def check_integrity(self) -> None:
        """Recount; raises ``AssertionError`` with the numbers when they disagree."""
        num_held = sum(self._held)
        num_free = len(set(self._free))
        if num_free != len(self._free) or num_held + num_free != self.num_units:
            raise AssertionError(
                f"{num_held} held + {num_free} free of {len(self._free)} listed"
                f" against {self.num_units} units"
            )
        if any(self._held[unit] for unit in self._free):
            raise AssertionError("a unit is both free and held")
