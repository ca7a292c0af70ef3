"""Checks of single values that several modules need. They raise `ValueError` and name the value."""

import math
from numbers import Real
from typing import Any

INT64 = range(-(2**63), 2**63)


def is_number(value: Any) -> bool:
    """
    Whether a value is a real number: not NaN, not infinite, not a bool, and, if whole, of 64 bits, since NumPy and
    PyTorch hold no other. NumPy scalars count.
    """
    # The exact types first: checking against the abstract class takes much longer, and annotations hold many numbers
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


def check_sentence(value: Any, name: str = "a query") -> None:
    """
    Raise `ValueError` unless a value is text that can be encoded: not blank, and without lone surrogates, which no file
    and no tokenizer can hold. The message begins with `name`.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a string that is not blank, got {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character = value[error.start]
        raise ValueError(f"{name} cannot be encoded as UTF-8, because of {character!r} in {value[:60]!r}") from None
