"""Checks of loaded weights. `transformers` only warns of missing ones, and draws them at random."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .messages import listed


def missing_weights(loading_info: Mapping[str, Any]) -> list[str]:
    """Return the weights that a checkpoint lacks or has in another shape, from `output_loading_info`."""
    mismatched = [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in loading_info["mismatched_keys"]]
    return sorted({*loading_info["missing_keys"], *mismatched})


def check_weights(model: nn.Module, missing: Iterable[str], name: str | os.PathLike) -> None:
    """
    Raise ValueError unless a loaded model has all of its weights, and they are finite. The message begins with `name`.

    Args:
        missing: what `missing_weights` returns.
    """
    if missing := list(missing):
        raise ValueError(f"{name}: weights are missing: {listed(missing, 5)}")
    # Fast path: a finite sum means that all values are finite. A sum of float16 may overflow
    broken = [
        key
        for key, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all()
    ]
    if broken:
        raise ValueError(f"{name}: weights contain NaN or infinity: {listed(broken, 5)}")


def check_weight_index(folder: str | os.PathLike) -> None:
    """Raise ValueError if the index of sharded weights in a folder refers to files elsewhere."""
    for path in sorted(Path(folder).glob("*.index.json")):
        try:
            files = set(json.loads(path.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an index of weights ({error!r})") from None
        for file in files:
            if not isinstance(file, str) or file in ("", ".", "..") or os.path.basename(file) != file or "\\" in file:
                raise ValueError(f"{path}: {file!r} is not a file in the same folder")
