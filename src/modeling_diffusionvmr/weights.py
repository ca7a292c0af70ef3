"""Checks of loaded weights. `transformers` only warns of missing ones, and draws them at random."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from .messages import listed

EARLIER_FORM = "the model was made before version 0.1.0, with a larger dynamic interaction; train it anew"


def missing_weights(loading_info: Mapping[str, Any]) -> list[str]:
    """Return the weights that a checkpoint lacks or has in another shape, from `output_loading_info`."""
    return sorted({*loading_info["missing_keys"], *mismatched_weights(loading_info)})


def mismatched_weights(loading_info: Mapping[str, Any]) -> list[str]:
    """Return the weights that a checkpoint has in another shape, from `output_loading_info`."""
    return [entry[0] if isinstance(entry, (tuple, list)) else entry for entry in loading_info["mismatched_keys"]]


@contextmanager
def naming_mismatch(name: Any) -> Iterator[None]:
    """Turn the error that `transformers` raises for weights of other sizes into a `ValueError` that names the model."""
    try:
        yield
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{name}: the sizes in its config.json do not fit its weights. If `interaction.filter_generator` is among "
            f"the weights that do not fit, {EARLIER_FORM}"
        ) from None


def check_form(loading_info: Mapping[str, Any], name: Any) -> None:
    """Raise ValueError if a checkpoint was loaded that has the larger dynamic interaction of earlier versions."""
    old = [key for key in mismatched_weights(loading_info) if key.endswith("interaction.filter_generator.weight")]
    if old and any(key.endswith("interaction.filter_code.weight") for key in loading_info["missing_keys"]):
        raise ValueError(f"{name}: {old[0]} has another size than now: {EARLIER_FORM}")


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


def check_weight_files(folder: str | os.PathLike) -> None:
    """Raise ValueError if the weights in a checkpoint folder are an exported model's, or files elsewhere."""
    suffixes = {path.suffix for path in Path(folder).glob("*")}
    if ".onnx" in suffixes and not suffixes & {".safetensors", ".bin"}:
        raise ValueError(
            f"{folder}: a model exported for ONNX Runtime, not a checkpoint; use the checkpoint that it was exported "
            "from, or load this one with `OnnxDiffusionVMR.from_pretrained`"
        )
    check_weight_index(folder)


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
