"""Delete the files of visitors, who may leave at any moment: unused videos, downloads, and interrupted uploads."""

import os
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def cleaning(folder: Path, keep: Collection[Path], keep_seconds: float) -> Iterator[None]:
    """
    Delete unused files in a thread, until the context ends.

    Gradio's `delete_cache` would only know of uploads that are complete, and of files that it has shown.

    Args:
        folder: of uploads and downloads.
        keep: files to keep.
        keep_seconds: delete files that were not written or touched for this long.
    """
    is_over = threading.Event()

    def run() -> None:
        while not is_over.wait(min(60.0, keep_seconds)):
            delete_unused(folder, keep, keep_seconds)

    thread = threading.Thread(target=run, name="cleanup", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def delete_unused(folder: Path, keep: Collection[Path], keep_seconds: float) -> None:
    """Delete the files in a folder that were not written or touched for a number of seconds. Folders stay."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            try:
                if path not in keep and time.time() - path.lstat().st_ctime > keep_seconds:
                    path.unlink()
            except OSError:  # deleted at the same time, or in use on Windows
                continue
