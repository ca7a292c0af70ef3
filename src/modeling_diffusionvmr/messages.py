"""Parts of error messages that several modules share."""

from collections.abc import Sequence


def one_line(reason: object) -> str:
    """Return the text of an error in one line. An error without a text is named by its type."""
    lines = [line.strip() for line in str(reason).splitlines()]
    unnamed = type(reason).__name__ if isinstance(reason, BaseException) else ""
    return " ".join(line for line in lines if line) or unnamed


def listed(names: Sequence[str], maximum: int = 10) -> str:
    """Return the names with commas between them. Beyond `maximum`, only count them."""
    more = len(names) - maximum
    return ", ".join(names[:maximum]) + (f" and {more} more" if more > 0 else "")
