"""Checks of single values that several modules share."""

import math
from numbers import Integral, Real
from typing import Any

INT64 = range(-(2**63), 2**63)


def is_number(value: Any) -> bool:
    """
    Return whether a value is a real number: finite, not a bool and, if it is whole, of 64 bits, since NumPy and PyTorch
    hold no larger ones. NumPy scalars are numbers.
    """
    # Check the exact types first: `isinstance` with an abstract class is much slower, and annotations have many numbers
    if type(value) not in (int, float) and (isinstance(value, bool) or not isinstance(value, Real)):
        return False
    try:
        return math.isfinite(value) and (not isinstance(value, int) or value in INT64)
    except OverflowError:  # an integer or a fraction beyond the largest float
        return False


def check_positive(value: Any, name: str) -> None:
    """Raise `ValueError` unless a value is a finite number above 0. The message begins with `name`."""
    if not is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a number above 0, got {value!r}")


def check_whole(value: Any, name: str, low: float = -math.inf) -> None:
    """Raise `ValueError` unless a value is a whole number, at least `low`. The message begins with `name`."""
    # Not with `is_number`: the model calls this, and `math.isfinite` would break its compiled graph
    if isinstance(value, bool) or not isinstance(value, Integral) or not value < INT64.stop:
        raise ValueError(f"{name} must be a whole number, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")


def check_sentence(value: Any, name: str = "a query") -> None:
    """
    Raise `ValueError` unless a value is a string that is not blank and can be encoded, which excludes lone surrogates:
    neither files nor tokenizers accept them. The message begins with `name`.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a string that is not blank, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character = value[error.start]
        raise ValueError(f"{name} cannot be encoded as UTF-8, because of {character!r} in {value[:60]!r}") from None
