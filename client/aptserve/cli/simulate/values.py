"""Lists and ranges as people type them."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, InvalidOperation

_MAX_VALUES = 1000


def parse_names(text: str) -> tuple[str, ...]:
    """The names of ``"apt,fcfs"``, each once. Raises ``ValueError``."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if "" in names:
        raise ValueError(f"{text!r} has an empty name")
    return names


def parse_rates(text: str) -> tuple[float, ...]:
    """The rates, ascending, of ``"4"``, ``"1,2,4"`` or ``"1:12:1"`` (first, last, step)."""
    parts = text.split(":")
    if len(parts) == 1:
        rates = _numbers(text)
    elif len(parts) == 3:
        rates = _range(*(_decimal(part) for part in parts))
    else:
        raise ValueError(f"{text!r} is no rate, list such as 1,2,4 or range such as 1:12:1")
    return _checked(rates, lambda rate: rate > 0, "above 0")


def parse_cvs(text: str) -> tuple[float, ...]:
    """The coefficients of variation, ascending, of ``"1,5,10"``."""
    return _checked(_numbers(text), lambda cv: cv >= 0, "at least 0")


def parse_targets(text: str) -> tuple[float, ...]:
    """The shares, ascending, of ``"0.9"`` or ``"0.5,0.7,0.9"``."""
    return _checked(_numbers(text), lambda share: 0 < share <= 1, "above 0 and at most 1")


def _numbers(text: str) -> list[Decimal]:
    return [_decimal(part) for part in text.split(",")]


def _decimal(text: str) -> Decimal:
    try:
        number = Decimal(text.strip())
    except InvalidOperation:
        raise ValueError(f"{text.strip()!r} is no number") from None
    if not number.is_finite():
        raise ValueError(f"{text.strip()!r} is not finite")
    return number


def _range(first: Decimal, last: Decimal, step: Decimal) -> list[Decimal]:
    """In decimals, so that 0.1:0.3:0.1 ends at 0.3."""
    if step <= 0 or last < first:
        raise ValueError(f"{first}:{last}:{step} is empty: FIRST <= LAST and STEP > 0 must hold")
    num_steps = math.floor((last - first) / step)
    if num_steps >= _MAX_VALUES:
        raise ValueError(f"{first}:{last}:{step} has more than {_MAX_VALUES} values")
    return [first + step * number for number in range(num_steps + 1)]


def _checked(
    values: list[Decimal], is_valid: Callable[[Decimal], bool], rule: str
) -> tuple[float, ...]:
    for value in values:
        if not is_valid(value):
            raise ValueError(f"must be {rule}, not {value}")
    return tuple(sorted({float(value) for value in values}))
