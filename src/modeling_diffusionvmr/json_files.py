"""JSON files that must contain an object. Given any other JSON, `transformers` fails without naming the file."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

CONFIGURATIONS = (  # that `transformers` reads
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse one JSON object. Raise `ValueError` for anything else."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # also covers a wrong encoding
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"must be a JSON object, got {text.strip()[:60]!r}")
    return content


def read_json_object(path: str | os.PathLike) -> dict[str, Any]:
    """Read a file that contains one JSON object. Raise a `ValueError` that names the file for anything else."""
    try:
        return parse_json_object(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_configurations(path: str | os.PathLike) -> None:
    """
    Raise a `ValueError` that names the file unless a file, or each of `CONFIGURATIONS` in a folder, is a JSON object.
    """
    for file in [Path(path), *(Path(path, name) for name in CONFIGURATIONS)]:
        if file.is_file():
            read_json_object(file)


@contextmanager
def naming_json(path_or_id: Any, subfolder: str = "", **options) -> Iterator[None]:
    """
    Turn the error that `transformers` raises for a checkpoint into a `ValueError` that names the file, if a
    configuration file in it is not a JSON object.

    Args:
        path_or_id, subfolder: where the checkpoint is.
        options: arguments of `from_pretrained`. Those that say which files of the Hub were read are used.
    """
    try:
        yield
    except (OSError, ImportError):  # these name what is wrong
        raise
    except Exception as error:
        if (path := _local_path(path_or_id, subfolder, options)) is not None:
            try:
                check_configurations(path)
            except ValueError as reason:
                raise reason from error
        raise


def _local_path(path_or_id: Any, subfolder: str, options: dict[str, Any]) -> str | None:
    """Return the file or folder of a checkpoint, in the cache of the Hub if it is not a local one, or `None`."""
    path = os.path.join(path_or_id, subfolder) if subfolder else os.fspath(path_or_id or "")
    if os.path.exists(path):
        return path
    try:
        where = {name: options[name] for name in ("cache_dir", "revision") if name in options}
        file = cached_file(path_or_id, "config.json", subfolder=subfolder, local_files_only=True, **where)
        return os.path.dirname(str(file))
    except OSError:
        return None
