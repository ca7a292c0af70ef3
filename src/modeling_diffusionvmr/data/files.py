"""Atomic writing of files, and reading and writing of JSON and JSON Lines."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a temporary path beside `path` to write to, and rename it to `path` if the block ends without an error. So
    the file is either complete or not there. Missing folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(content: Any, path: str | os.PathLike, indent: int | None = 2) -> None:
    """Write JSON, atomically: indented, or in one line with `indent=None`."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")


def save_jsonl(rows: Iterable[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Write annotations or predictions atomically, one JSON object per line."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def load_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """
    Read annotations or predictions, one JSON object per line. Fields are not checked.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if a line is not a JSON object. The message names the file and the line.
    """
    rows = []
    for where, line in numbered_lines(path):
        try:
            rows.append(parse_json_object(line))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return rows


def numbered_lines(path: str | os.PathLike) -> Iterator[tuple[str, bytes]]:
    """Yield ("FILE, line N", line) for every line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}, line {number}", line


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raise `ValueError` for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # also covers a wrong encoding
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"must be a JSON object, got {text.strip()[:60]!r}")
    return content
