"""
Convert published weights of SlowFast 8x8 R50 to a folder with config.json and model.safetensors, which the library
loads as a backbone. WEIGHTS is one of these files:

- .pkl: Caffe2 weights of PySlowFast's model zoo, with which the released features were made
- .pyth, .pyth.tar, .pt: a checkpoint of PySlowFast or PyTorchVideo

A .pkl file is a Python pickle, and loading one may run any code. This script does not load it: it only follows the
instructions that a dictionary of NumPy arrays needs, and refuses a file with any others.
"""

import argparse
import pickletools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser, check_output
from modeling_diffusionvmr.data.files import atomic_write
from modeling_diffusionvmr.messages import listed, one_line
from modeling_diffusionvmr.slowfast import SlowFastConfig, SlowFastModel
from modeling_diffusionvmr.weights import check_weights

# Layouts of published files: what a weight of ours is called in them


class Layout(NamedTuple):
    """The names of a kind of files, as a function of our name and of the number of blocks per stage."""

    name_of: Callable[[str, Sequence[int]], str]
    ignored: re.Pattern  # names that need not be converted: the classifier, and what only training needs


PATHWAYS = {"slow": 0, "fast": 1}
CONVOLUTIONS = {"reduce": "a", "spatial": "b", "expand": "c"}
CAFFE2_VALUES = {"weight": "s", "bias": "b", "running_mean": "rm", "running_var": "riv"}


def pyslowfast_name(name: str, depths: Sequence[int]) -> str:
    """See facebookresearch/SlowFast, `slowfast/models/`."""
    match name.split("."):
        case ["laterals", stage, part, value]:
            return f"s{int(stage) + 1}_fuse.{'conv_f2s' if part == 'conv' else 'bn'}.{value}"
        case [pathway, "stem", part, value]:
            return f"s1.pathway{PATHWAYS[pathway]}_stem.{'conv' if part == 'conv' else 'bn'}.{value}"
        case [pathway, "stages", stage, block, layer, part, value]:
            branch = "branch1" if layer == "shortcut" else f"branch2.{CONVOLUTIONS[layer]}"
            branch += "" if part == "conv" else "_bn"
            return f"s{int(stage) + 2}.pathway{PATHWAYS[pathway]}_res{block}.{branch}.{value}"
    raise KeyError(name)


def caffe2_name(name: str, depths: Sequence[int]) -> str:
    """See facebookresearch/SlowFast, `slowfast/utils/c2_model_loading.py`."""
    match name.split("."):
        case ["laterals", "0", part, value]:
            layer = "t_pool1_subsample"
        case ["laterals", stage, part, value]:
            layer = f"t_res{int(stage) + 1}_{depths[int(stage) - 1] - 1}_branch2c_bn_subsample"
        case [pathway, "stem", part, value]:
            layer = ("t_" if pathway == "fast" else "") + ("conv1" if part == "conv" else "res_conv1")
        case [pathway, "stages", stage, block, layer, part, value]:
            branch = "branch1" if layer == "shortcut" else f"branch2{CONVOLUTIONS[layer]}"
            layer = f"{'t_' if pathway == 'fast' else ''}res{int(stage) + 2}_{block}_{branch}"
        case _:
            raise KeyError(name)
    return f"{layer}_w" if part == "conv" else f"{layer}_bn_{CAFFE2_VALUES[value]}"


def pytorchvideo_name(name: str, depths: Sequence[int]) -> str:
    """See facebookresearch/pytorchvideo, `pytorchvideo/models/`."""
    match name.split("."):
        case ["laterals", stage, part, value]:
            return f"blocks.{stage}.multipathway_fusion.{'conv_fast_to_slow' if part == 'conv' else 'norm'}.{value}"
        case [pathway, "stem", part, value]:
            return f"blocks.0.multipathway_blocks.{PATHWAYS[pathway]}.{part}.{value}"
        case [pathway, "stages", stage, block, layer, part, value]:
            branch = f"branch1_{part}" if layer == "shortcut" else f"branch2.{part}_{CONVOLUTIONS[layer]}"
            place = f"blocks.{int(stage) + 1}.multipathway_blocks.{PATHWAYS[pathway]}.res_blocks.{block}"
            return f"{place}.{branch}.{value}"
    raise KeyError(name)


PYSLOWFAST = Layout(pyslowfast_name, re.compile(r"head\..*|.*\.num_batches_tracked"))
CAFFE2 = Layout(caffe2_name, re.compile(r"pred_.*|.*_momentum|lr|model_iter"))
PYTORCHVIDEO = Layout(pytorchvideo_name, re.compile(r"blocks\.\d+\.proj\..*|.*\.num_batches_tracked"))


# Pickles of NumPy arrays


class PickledType:
    """A NumPy type in a pickle: numbers only."""

    def __init__(self, code: Any):
        if type(code) is not str or not re.fullmatch("f[248]|[iu][1248]|b1", code):
            raise ValueError("arrays of anything but numbers are not allowed")
        self.dtype = np.dtype(code)

    def set_state(self, state: Any) -> None:
        """Set the byte order. The rest of the state describes types that are not numbers."""
        _, order, *rest = state
        if order not in ("<", ">", "|", "=") or any(part is not None for part in rest[:3]):
            raise ValueError("arrays of anything but numbers are not allowed")
        self.dtype = self.dtype.newbyteorder(order)


class PickledArray:
    """A NumPy array in a pickle. Its numbers stay as they are in the file until they are needed."""

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype = np.dtype("f4")
        self.is_fortran = False
        self.content: bytes | str = b""  # Python 2 writes bytes as strings

    def set_state(self, state: Any) -> None:
        """
        Set all that there is, as NumPy saves it.

        Raises:
            ValueError: if the content is not as long as shape and type say.
        """
        _, shape, numbers, is_fortran, content = state
        if not isinstance(numbers, PickledType) or type(content) not in (bytes, str):
            raise ValueError("arrays of anything but numbers are not allowed")
        if type(shape) is not tuple or len(shape) > 8 or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("an array has no valid shape")
        if prod(shape) * numbers.dtype.itemsize != len(content):
            raise ValueError(f"an array of shape {shape} has {len(content)} bytes, which does not fit")
        self.shape, self.dtype, self.is_fortran, self.content = shape, numbers.dtype, bool(is_fortran), content

    def tensor(self) -> Tensor:
        """Return the array as float32."""
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        array = np.frombuffer(content, self.dtype).reshape(self.shape, order="F" if self.is_fortran else "C")
        return torch.from_numpy(array.astype(np.float32, order="C"))


def scalar(numbers: Any, content: Any) -> PickledArray:
    """Return a NumPy scalar as an array without dimensions."""
    array = PickledArray()
    array.set_state((1, (), numbers, False, content))
    return array


NUMPY_ARRAY = object()
GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): NUMPY_ARRAY,
    ("numpy", "dtype"): lambda code, *_: PickledType(code),
    ("_codecs", "encode"): lambda text, encoding: text,  # how Python 3 writes bytes for Python 2: as a string
    **{
        (f"{module}.multiarray", name): function
        for module in ("numpy.core", "numpy._core")  # before NumPy 2, and since
        for name, function in (
            ("_reconstruct", lambda *_: PickledArray()),
            ("scalar", scalar),
        )
    },
}
"""All that a pickle may name, and what stands for it here. None of it is code of NumPy's or of the file's."""

CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}


class ArrayReader:
    """Follows the instructions of a pickle (protocol 2 and later) of dictionaries, lists, tuples and NumPy arrays."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # sizes of the stack
        self.memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        """
        Return the object in a pickle, with a `PickledArray` for each array.

        Raises:
            ValueError: if it has anything else, or is damaged.
        """
        try:
            for opcode, value, _ in pickletools.genops(data):
                self.follow(opcode.name, value)
            return self.stack.pop()
        except (LookupError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise ValueError(f"the file is damaged: {one_line(error)}") from None

    def follow(self, instruction: str, value: Any) -> None:
        """Follow one instruction, whose name and argument are those of `pickletools`."""
        stack = self.stack
        match instruction:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _ if instruction in VALUES:
                stack.append(value)
            case _ if instruction in CONSTANTS:
                stack.append(CONSTANTS[instruction]())
            case "MARK":
                self.marks.append(len(stack))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.take_from(len(stack) - int(instruction[-1]))))
            case "TUPLE":
                stack.append(tuple(self.take_from(self.marks.pop())))
            case "APPEND" | "APPENDS":
                items = self.take_from(self.marks.pop() if instruction == "APPENDS" else len(stack) - 1)
                list.extend(stack[-1], items)
            case "SETITEM" | "SETITEMS":
                items = self.take_from(self.marks.pop() if instruction == "SETITEMS" else len(stack) - 2)
                # Only strings: a tuple of tuples of tuples may take forever to hash
                if not all(type(key) is str for key in items[::2]):
                    raise ValueError("the keys of a dictionary must be strings")
                dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.memo[len(self.memo) if value is None else value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[value])
            case "GLOBAL" | "STACK_GLOBAL":
                name = tuple(value.split(" ", 1) if value else self.take_from(len(stack) - 2))
                if not all(type(part) is str for part in name):
                    raise ValueError("a name must be a string")
                if name not in GLOBALS:
                    raise ValueError(f"{'.'.join(name)[:100]!r} is not allowed in a file of weights")
                stack.append(GLOBALS[name])
            case "REDUCE":
                function, arguments = self.take_from(len(stack) - 2)
                stack.append(function(*arguments))
            case "BUILD":
                (state,) = self.take_from(len(stack) - 1)
                if not isinstance(stack[-1], (PickledType, PickledArray)):
                    raise ValueError("only arrays may have a state in a file of weights")
                stack[-1].set_state(state)
            case _:
                raise ValueError(f"the instruction {instruction} is not allowed in a file of weights")

    def take_from(self, start: int) -> list[Any]:
        """Remove and return the top of the stack, from an index on."""
        if start < 0:
            raise IndexError("an instruction needs more than there is")
        items = self.stack[start:]
        del self.stack[start:]
        return items


# Conversion


def load_caffe2(path: Path) -> dict[str, PickledArray]:
    """
    Return the arrays of a Caffe2 file by name. Raise ValueError if anything else is not ignored, such as `model_iter`,
    a plain number.
    """
    try:
        content = ArrayReader().read(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not Caffe2 weights ({one_line(error)})") from None
    blobs = content.get("blobs") if isinstance(content, dict) else None
    if not isinstance(blobs, dict):
        raise ValueError(f"{path}: has no `blobs`, a dictionary of arrays")
    arrays = {name: blob for name, blob in blobs.items() if isinstance(blob, PickledArray)}
    others = [name for name in blobs if name not in arrays and not CAFFE2.ignored.fullmatch(name)]
    if others:
        raise ValueError(f"{path}: not Caffe2 weights (not an array: {listed(others, 5)})")
    return arrays


def load_pytorch(path: Path) -> dict[str, Tensor]:
    """Return the weights of a PyTorch checkpoint by name. Raise ValueError if it has anything but plain data."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that it refuses anyway
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except UnpicklingError as error:
        raise ValueError(f"{path}: cannot be loaded as plain data ({_refusal(error)})") from None
    except Exception:  # of many types
        raise ValueError(f"{path}: damaged, or not a checkpoint of PyTorch") from None
    state = checkpoint.get("model_state") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path}: has no `model_state`, a dictionary of weights")
    return dict(state)


def _refusal(error: UnpicklingError) -> str:
    """Return why PyTorch refuses a file, without its advice to load it unsafely or to file an issue."""
    reason = str(error).partition("Check the documentation")[0].strip()
    reason = reason.rpartition("WeightsUnpickler error:")[2].strip().split("\n\n")[-1]
    return one_line(reason.partition(" Please use")[0]).rstrip(".")


def _is_plain(tensor: Any) -> bool:
    """Return whether something is a tensor of real numbers that are in memory."""
    return (
        isinstance(tensor, Tensor)
        and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
        and (tensor.is_floating_point() or tensor.dtype == torch.int64)
    )


def convert(path: Path, config: SlowFastConfig) -> SlowFastModel:
    """
    Return a network with published weights.

    Raises:
        ValueError: if weights are missing, unknown, of another shape or not finite. The message lists them.
    """
    published: Mapping[str, PickledArray | Tensor]
    if path.suffix == ".pkl":
        published, layout = load_caffe2(path), CAFFE2
    else:
        published = load_pytorch(path)
        layout = PYTORCHVIDEO if any(name.startswith("blocks.") for name in published) else PYSLOWFAST
    model = SlowFastModel(config)
    shapes = {layout.name_of(name, config.depths): tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in shapes if name not in published]
    unknown = [name for name in published if name not in shapes and not layout.ignored.fullmatch(name)]
    wrong = [
        f"{name} has {tuple(published[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in published and tuple(published[name].shape) != shape
    ]
    for names, fault in ((missing, "missing"), (unknown, "unknown"), (wrong, "of another shape")):
        if names:
            raise ValueError(f"{path}: not SlowFast 8x8 R50, weights are {fault}: {listed(names, 5)}")
    weights = {name: published[layout.name_of(name, config.depths)] for name in model.state_dict()}
    model.load_state_dict({name: v.tensor() if isinstance(v, PickledArray) else v for name, v in weights.items()})
    check_weights(model, (), path)
    return model


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/convert_slowfast.py", description=__doc__)
    parser.add_argument("weights", type=Path, metavar="WEIGHTS", help="published file: .pkl, .pyth, .pyth.tar or .pt")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write, which must be empty or absent")
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> None:
    """Convert one file."""
    check_output(arguments.output, "OUTPUT")
    if arguments.output.is_dir() and any(arguments.output.iterdir()):
        raise ValueError(f"OUTPUT {arguments.output}: the folder is not empty")
    model = convert(arguments.weights, SlowFastConfig())
    with atomic_write(arguments.output) as folder:
        model.save_pretrained(folder)
    print(f"saved {arguments.output}: {sum(model.config.feature_sizes)} numbers per clip")


if __name__ == "__main__":
    run_safely(main, parse_arguments())
