"""Atomic writing of files, locks, and reading and writing of JSON and JSON Lines."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from ..json_files import parse_json_object

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held: set[IO] = set()  # open files that this process has locked
if fcntl is not None:  # a forked worker may outlive this process, and must not hold its locks
    os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """
    Yield a temporary path beside `path` to write to, and rename it to `path` if the block ends without an error. So
    the file is either complete or not there. Missing folders are created.

    If another process is writing the same file, wait until it is done.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging(path) as temporary:
        yield temporary
        move_into_place(temporary, path)


@contextmanager
def staging(path: Path, busy: str | None = None) -> Iterator[Path]:
    """
    Yield a hidden path beside `path` at which to prepare a file or a folder. Whatever is there is removed afterwards,
    and before: a killed run may have left it.

    Args:
        path: the final file or folder.
        busy: as for `locked`.
    """
    with locked(path.with_name(f".{path.name}.lock"), busy) as is_locked:
        # Without locks, another process may be writing, too
        temporary = path.with_name(f".{path.name}.{'partial' if is_locked else os.getpid()}{path.suffix}")
        _remove(temporary)
        try:
            yield temporary
        finally:
            _remove(temporary)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[bool]:
    """
    Lock a file, which is created, and remove it afterwards. If this process is killed, the lock ends with it.

    Yield whether the file is locked: not all platforms and file systems can do that.

    Args:
        path: the file. It is only used for the lock.
        busy: the message of the error if another process holds the lock. Default: wait for it.

    Raises:
        BlockingIOError: if another process holds the lock, unless this one waits for it.
    """
    file = None if fcntl is None else _lock(path, busy)
    if file is None:
        yield False
        return
    _held.add(file)
    try:
        yield True
    finally:
        _held.discard(file)
        path.unlink(missing_ok=True)
        file.close()


def remove_free_locks(folder: Path) -> None:
    """Remove the lock files of killed processes from a folder. Those that a process holds stay."""
    for path in folder.glob(".*.lock"):
        with suppress(BlockingIOError), locked(path, busy="held"):
            pass


def _lock(path: Path, busy: str | None) -> IO | None:
    """Return the open and locked file, or `None` if the file system has no locks."""
    while True:
        file = open(path, "ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
        except BlockingIOError:
            file.close()
            raise BlockingIOError(busy) from None
        except OSError:
            file.close()
            path.unlink(missing_ok=True)
            return None
        with suppress(FileNotFoundError):  # if the process that held the lock has removed the file meanwhile
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def move_into_place(source: Path, target: Path) -> None:
    """
    Rename a file or a folder, which may replace a file or an empty folder. Its content is on the disk before, so that
    not even a power failure leaves an incomplete `target`.
    """
    for path in (*source.rglob("*"), source):
        _sync(path)
    os.replace(source, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    """Write a file's content or a folder's entries to the disk."""
    is_folder, is_windows = path.is_dir(), os.name == "nt"
    if is_folder and is_windows:  # which cannot open folders
        return
    file = os.open(path, os.O_RDWR if is_windows else os.O_RDONLY)
    try:
        os.fsync(file)
    except OSError:
        if not is_folder:  # some file systems cannot sync folders
            raise
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
