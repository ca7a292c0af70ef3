"""`scripts/convert_slowfast.py`, on files in the layouts of the published ones, and on files that want to do harm."""

import ast
import builtins
import os
import pickle
import re
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import convert_slowfast as script
import modeling_diffusionvmr
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.slowfast import SlowFastBackbone, SlowFastConfig, SlowFastModel
from small_slowfast import TINY, random_slowfast, tiny_slowfast

CONFIG = SlowFastConfig(**TINY)
# Ours, PySlowFast's, Caffe2's and PyTorchVideo's, as their code has them
NAMES = [
    (
        "slow.stem.conv.weight",
        "s1.pathway0_stem.conv.weight",
        "conv1_w",
        "blocks.0.multipathway_blocks.0.conv.weight",
    ),
    (
        "fast.stem.norm.running_var",
        "s1.pathway1_stem.bn.running_var",
        "t_res_conv1_bn_riv",
        "blocks.0.multipathway_blocks.1.norm.running_var",
    ),
    (
        "slow.stages.2.5.reduce.norm.weight",
        "s4.pathway0_res5.branch2.a_bn.weight",
        "res4_5_branch2a_bn_s",
        "blocks.3.multipathway_blocks.0.res_blocks.5.branch2.norm_a.weight",
    ),
    (
        "fast.stages.0.1.spatial.conv.weight",
        "s2.pathway1_res1.branch2.b.weight",
        "t_res2_1_branch2b_w",
        "blocks.1.multipathway_blocks.1.res_blocks.1.branch2.conv_b.weight",
    ),
    (
        "fast.stages.3.2.expand.norm.bias",
        "s5.pathway1_res2.branch2.c_bn.bias",
        "t_res5_2_branch2c_bn_b",
        "blocks.4.multipathway_blocks.1.res_blocks.2.branch2.norm_c.bias",
    ),
    (
        "slow.stages.1.0.shortcut.conv.weight",
        "s3.pathway0_res0.branch1.weight",
        "res3_0_branch1_w",
        "blocks.2.multipathway_blocks.0.res_blocks.0.branch1_conv.weight",
    ),
    (
        "fast.stages.1.0.shortcut.norm.running_mean",
        "s3.pathway1_res0.branch1_bn.running_mean",
        "t_res3_0_branch1_bn_rm",
        "blocks.2.multipathway_blocks.1.res_blocks.0.branch1_norm.running_mean",
    ),
    (
        "laterals.0.conv.weight",
        "s1_fuse.conv_f2s.weight",
        "t_pool1_subsample_w",
        "blocks.0.multipathway_fusion.conv_fast_to_slow.weight",
    ),
    (
        "laterals.0.norm.bias",
        "s1_fuse.bn.bias",
        "t_pool1_subsample_bn_b",
        "blocks.0.multipathway_fusion.norm.bias",
    ),
    (
        "laterals.3.conv.weight",
        "s4_fuse.conv_f2s.weight",
        "t_res4_5_branch2c_bn_subsample_w",
        "blocks.3.multipathway_fusion.conv_fast_to_slow.weight",
    ),
    (
        "laterals.2.norm.running_mean",
        "s3_fuse.bn.running_mean",
        "t_res3_3_branch2c_bn_subsample_bn_rm",
        "blocks.2.multipathway_fusion.norm.running_mean",
    ),
]


def published(model: SlowFastModel, layout: script.Layout) -> dict[str, Tensor]:
    """The weights of a network by the names of a layout."""
    return {layout.name_of(name, model.config.depths): value for name, value in model.state_dict().items()}


def save_pyslowfast(model: SlowFastModel, path: Path, **changes) -> None:
    weights = published(model, script.PYSLOWFAST)
    weights |= {
        name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
        for name in weights
        if name.endswith("running_mean")
    }
    weights |= {"head.projection.weight": torch.zeros(5, 144), "head.projection.bias": torch.zeros(5), **changes}
    torch.save({"epoch": 3, "model_state": weights, "optimizer_state": {"lr": 0.1}, "cfg": "MODEL: slowfast"}, path)


def save_pytorchvideo(model: SlowFastModel, path: Path, **changes) -> None:
    weights = {**published(model, script.PYTORCHVIDEO), "blocks.5.proj.weight": torch.zeros(5, 144), **changes}
    torch.save({"model_state": weights}, path)


def blobs_of(model: SlowFastModel) -> dict[str, np.ndarray]:
    blobs = {name: value.numpy() for name, value in published(model, script.CAFFE2).items()}
    blobs |= {f"{name}_momentum": np.zeros_like(array) for name, array in blobs.items() if name.endswith("_w")}
    more = {"pred_w": np.zeros((5, 144), "f4"), "pred_b": np.zeros(5, "f4"), "lr": np.ones(1, "f4")}
    return {**blobs, **more, "model_iter": 9, "conv1_w_momentum": 2**40}  # plain numbers, the second one a long


def save_caffe2(model: SlowFastModel, path: Path, **changes) -> None:
    path.write_bytes(as_python_2({"blobs": {**blobs_of(model), **changes}}))


def as_python_2(value: dict | np.ndarray | str | int, module: bytes = b"numpy.core") -> bytes:
    """A pickle as Python 2 writes it with its highest protocol, 2: all strings are strings of bytes."""

    def text(content: bytes) -> bytes:
        if len(content) < 256:
            return b"U" + bytes([len(content)]) + content
        return b"T" + struct.pack("<i", len(content)) + content

    def tuple_of(*parts: bytes) -> bytes:
        return b"(" + b"".join(parts) + b"t"

    def number(value: int) -> bytes:
        if value >= 2**31:
            return b"\x8a\x08" + struct.pack("<q", value)
        return b"J" + struct.pack("<i", value)

    def dump(value) -> bytes:
        if isinstance(value, str):
            return text(value.encode())
        if isinstance(value, int):
            return number(value)
        if isinstance(value, dict):
            return b"}(" + b"".join(dump(key) + dump(item) for key, item in value.items()) + b"u"
        numbers = b"cnumpy\ndtype\n" + tuple_of(text(value.dtype.str[1:].encode()), number(0), number(1)) + b"R"
        numbers += tuple_of(number(3), text(b"<"), b"NNN", number(-1), number(-1), number(0)) + b"b"
        array = b"c" + module + b".multiarray\n_reconstruct\n"
        array += tuple_of(b"cnumpy\nndarray\n", number(0) + b"\x85", text(b"b")) + b"R"
        shape = tuple_of(*map(number, value.shape))
        return array + tuple_of(number(1), shape, numbers, b"\x89", text(value.tobytes())) + b"b"

    return b"\x80\x02" + dump(value) + b"."


def features(model: SlowFastModel) -> Tensor:
    return model.eval()(torch.randn(1, 3, 32, 16, 16, generator=torch.manual_seed(0))).pooler_output


def convert(path: Path) -> SlowFastModel:
    return script.convert(path, CONFIG)


@pytest.mark.parametrize("own, pyslowfast, caffe2, pytorchvideo", NAMES)
def test_names_are_the_published_ones(own, pyslowfast, caffe2, pytorchvideo):
    depths = (3, 4, 6, 3)
    assert script.pyslowfast_name(own, depths) == pyslowfast
    assert script.caffe2_name(own, depths) == caffe2
    assert script.pytorchvideo_name(own, depths) == pytorchvideo


def test_each_weight_has_a_name_of_its_own():
    with torch.device("meta"):
        own = SlowFastModel(SlowFastConfig()).state_dict()
    assert own.keys() >= {names[0] for names in NAMES}
    for layout in (script.PYSLOWFAST, script.CAFFE2, script.PYTORCHVIDEO):
        names = {layout.name_of(name, (3, 4, 6, 3)) for name in own}
        assert len(names) == len(own) == 550
        assert not any(layout.ignored.fullmatch(name) for name in names)


@pytest.mark.parametrize(
    "name, save",
    [
        ("weights.pyth", save_pyslowfast),
        ("weights.pyth.tar", save_pyslowfast),
        ("weights.pt", save_pytorchvideo),
        ("weights.pkl", save_caffe2),
    ],
)
def test_each_layout_gives_the_same_features(tmp_path, name, save):
    model = tiny_slowfast()
    save(model, tmp_path / name)
    assert torch.equal(features(convert(tmp_path / name)), features(model))


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_pickles_of_python_3(tmp_path, protocol):
    model = tiny_slowfast()
    blobs = blobs_of(model)
    blobs["conv1_w"] = np.asfortranarray(blobs["conv1_w"])
    blobs["res_conv1_bn_s"] = blobs["res_conv1_bn_s"].astype(">f8")
    blobs["lr"] = np.float32(0.1)
    content = {"blobs": blobs, "cfg": ["a list", (1, 2.5, None, True, 2**40), b"bytes", "long text" * 100], "empty": ()}
    data = pickle.dumps(content, protocol)
    assert b"numpy._core" in data  # of NumPy 2; `as_python_2` writes the name that older ones had
    (tmp_path / "weights.pkl").write_bytes(data)
    assert torch.equal(features(convert(tmp_path / "weights.pkl")), features(model))
    shared = pickle.dumps({"blobs": {**blobs, "pred_w": blobs["conv1_w"]}}, protocol)
    (tmp_path / "weights.pkl").write_bytes(shared)
    assert torch.equal(features(convert(tmp_path / "weights.pkl")), features(model))


def test_command(tmp_path, capsys):
    model = random_slowfast(SlowFastConfig())
    save_caffe2(model, tmp_path / "SLOWFAST_8x8_R50.pkl")
    arguments = script.parse_arguments([str(tmp_path / "SLOWFAST_8x8_R50.pkl"), str(tmp_path / "new" / "slowfast")])
    script.main(arguments)
    assert capsys.readouterr().out == f"saved {tmp_path / 'new' / 'slowfast'}: 2304 numbers per clip\n"
    folder = tmp_path / "new" / "slowfast"
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert os.listdir(tmp_path / "new") == ["slowfast"]
    loaded = SlowFastBackbone.from_pretrained(folder).model
    assert loaded.config.num_frames == 32 and loaded.config.depths in ([3, 4, 6, 3], (3, 4, 6, 3))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(ValueError, match=f"OUTPUT {folder}: the folder is not empty"):
        script.main(arguments)


def test_command_ends_with_one_line(tmp_path, capsys):
    for name, content in (("absent.pkl", None), ("harm.pkl", b"cos\nsystem\n(U\x05exit\ntR."), ("bad.pyth", b"bad")):
        if content:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(SystemExit) as caught:
            run_safely(script.main, script.parse_arguments([str(tmp_path / name), str(tmp_path / "output")]))
        assert caught.value.code.startswith("error: ") and name in caught.value.code
        assert "\n" not in caught.value.code
        assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    "save, name", [(save_pyslowfast, "w.pyth"), (save_pytorchvideo, "w.pt"), (save_caffe2, "w.pkl")]
)
def test_weights_that_do_not_fit_are_named(tmp_path, save, name):
    model, path = tiny_slowfast(), tmp_path / name
    layout = {save_pyslowfast: script.PYSLOWFAST, save_pytorchvideo: script.PYTORCHVIDEO}.get(save, script.CAFFE2)
    kind = np.zeros if save is save_caffe2 else torch.zeros
    stem = layout.name_of("slow.stem.conv.weight", CONFIG.depths)
    save(model, path, nonlocal_conv3_1_theta_w=kind((2, 2)))
    with pytest.raises(ValueError, match=f"^{path}: not SlowFast .*, weights are unknown: nonlocal_conv3_1_theta_w$"):
        convert(path)
    save(model, path, **{stem: kind((8, 3, 5, 7, 7))})
    with pytest.raises(ValueError, match=rf"of another shape: {stem} has \(8, 3, 5, 7, 7\), not \(8, 3, 1, 7, 7\)$"):
        convert(path)
    save(model, path, **{stem: kind((8, 3, 1, 7, 7)) + float("nan")})
    with pytest.raises(ValueError, match=f"^{path}: weights contain NaN or infinity: slow.stem.conv.weight$"):
        convert(path)
    # Of a smaller network, so that the larger one lacks weights
    save(tiny_slowfast(depths=(1, 1, 3)), path)
    block = layout.name_of("slow.stages.0.1.reduce.conv.weight", CONFIG.depths)
    with pytest.raises(ValueError, match=f"^{path}: not SlowFast 8x8 R50, weights are missing: {block}.* more$"):
        convert(path)


# Files that want to do harm


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def protocol_0(module: str, name: str, argument: str) -> bytes:
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


def in_blobs(value) -> dict:
    return {"blobs": {"conv1_w": value}}


def object_array(value) -> np.ndarray:
    array = np.empty(1, object)
    array[0] = value
    return array


def harmful(marker: str) -> dict[str, bytes]:
    """Pickles that would write the file `marker`, run code, take all memory or crash, and pickles of other things."""
    code = f"open({marker!r}, 'w')"
    pushes = b"\x80\x02"
    array = as_python_2(in_blobs(np.zeros(4, "f4")))
    opened = Calls(builtins.open, marker, "w")
    return {
        "os.system": pickle.dumps(in_blobs(Calls(os.system, f"touch {marker}"))),
        "os.system, protocol 0": protocol_0("os", "system", f"touch {marker}"),
        "os.system, at the end": pickle.dumps(
            {**in_blobs(np.zeros(2, "f4")), "z": Calls(os.system, f"touch {marker}")}
        ),
        "eval": pickle.dumps(in_blobs(Calls(builtins.eval, code))),
        "exec of Python 2": b"\x80\x02c__builtin__\neval\nU" + bytes([len(code)]) + code.encode() + b"\x85R.",
        "open": pickle.dumps(opened),
        "inside an array": pickle.dumps(in_blobs(object_array(opened))),
        "as a key": pickle.dumps({opened: 1}),
        "numpy.load": pickle.dumps(Calls(np.load, marker)),
        "numpy.f2py": b"\x80\x02cnumpy.f2py.diagnose\nrun_command\nU\x02id\x85R.",
        "numpy.save": pickle.dumps(Calls(np.save, marker, np.zeros(2))),
        "numpy.memmap": b"\x80\x02cnumpy\nmemmap\n(U\x01aU\x02w+U\x02w+K\x00K\x01tR.",
        "getattr": b"\x80\x02c__builtin__\ngetattr\n.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x16ndarray.__subclasses__\x93.",
        "a dotted module": b"\x80\x04\x8c\x0dnumpy.os.path\x8c\x06exists\x93.",
        "a name that is no string": b"\x80\x04]\x94h\x00\x93.",
        "a call of an array's type": pushes + b"cnumpy\nndarray\nK\x01\x85R.",
        "a new object": pushes + b"cnumpy\nndarray\n)\x81.",
        "an instance": b"(inumpy\nndarray\n.",
        "an extension": pushes + b"\x82\x01.",
        "a persistent id": b"Pname\n.",
        "state of a function": pushes + b"c_codecs\nencode\n}U\x08__code__Nsb.",
        "state of a type": pushes + b"cnumpy\nndarray\n}U\x07__new__Nsb.",
        "a subclass's buffer": pickle.dumps(np.zeros(3), 5),
        "an array of objects": array.replace(b"U\x02f4", b"U\x02O8"),
        "an array of records": pickle.dumps(in_blobs(np.zeros(2, [("a", "f4"), ("b", "O")]))),
        "an array of strings": pickle.dumps(in_blobs(np.array(["a"]))),
        "an array of dates": pickle.dumps(in_blobs(np.zeros(2, "M8[s]"))),
        "deep lists": pushes + b"]" * 200_000 + b"a" * 199_999 + b".",
        "deep tuples": pushes + b")" + b"\x85" * 200_000 + b".",
        "a deep key": pushes + b"})" + b"\x85" * 200_000 + b"Ns.",
        "a key that takes forever": pushes + b"})" + b"q\x00h\x00\x86" * 200 + b"Ns.",
        "a deep type": pushes + b"cnumpy\ndtype\n)" + b"q\x00h\x00\x86" * 200 + b"\x85R.",
        "a huge array": array.replace(b"(J\x04\x00\x00\x00t", b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft"),
        "a negative array": array.replace(b"(J\x04\x00\x00\x00t", b"(J\xfc\xff\xff\xffJ\xff\xff\xff\xfft"),
        "a huge text": pushes + b"T\xff\xff\xff\x7fabc",
        "huge bytes": b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fabc",
        "a huge memo": pushes + b"Nr\xff\xff\xff\xff.",
        "a missing memo": pushes + b"h\x05.",
        "nothing to call": pushes + b"R.",
        "no mark": pushes + b"t.",
        "too little": pushes + b"\x86.",
        "cut off": array[:-20],
        "empty": b"",
        "not a pickle": b"SQLite format 3\0",
        "a list": pickle.dumps([1]),
        "no blobs": pickle.dumps({"weights": {}}),
        "blobs that are no arrays": pickle.dumps(in_blobs("text")),
    }


@pytest.mark.parametrize("name", harmful("marker"))
def test_harmful_pickles_are_refused(tmp_path, name):
    marker, path = tmp_path / "marker", tmp_path / "weights.pkl"
    path.write_bytes(harmful(str(marker))[name])
    loaded = set(sys.modules)
    with pytest.raises(ValueError, match=f"^{path}: (not Caffe2 weights|has no `blobs`)") as caught:
        convert(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 200
    assert not marker.exists() and set(sys.modules) == loaded


@pytest.mark.parametrize("name", ["os.system", "os.system, at the end", "exec of Python 2", "open", "inside an array"])
def test_harmful_pickles_are_harmful(tmp_path, name):
    with suppress(TypeError):
        pickle.loads(harmful(str(tmp_path / "marker"))[name])
    assert (tmp_path / "marker").exists()


def test_what_is_refused_is_named(tmp_path):
    path = tmp_path / "weights.pkl"
    for name, message in (
        ("os.system", f"'{os.system.__module__}.system' is not allowed"),
        ("eval", "'builtins.eval' is not allowed"),
        ("numpy.load", "is not allowed"),
        ("a dotted name", "'numpy.ndarray.__subclasses__' is not allowed"),
        ("an array of objects", "arrays of anything but numbers are not allowed"),
        ("an array of records", "arrays of anything but numbers are not allowed"),
        ("state of a function", "only arrays may have a state"),
        ("a new object", "the instruction NEWOBJ is not allowed"),
        ("an extension", "the instruction EXT1 is not allowed"),
        ("a deep key", "the keys of a dictionary must be strings"),
        ("blobs that are no arrays", r"not Caffe2 weights \(not an array: conv1_w\)$"),
        ("a huge array", r"an array of shape \(2147483647, 2147483647\) has 16 bytes, which does not fit"),
    ):
        path.write_bytes(harmful(str(tmp_path / "marker"))[name])
        with pytest.raises(ValueError, match=message):
            convert(path)


def test_nothing_but_stand_ins_can_be_reached():
    assert script.GLOBALS.keys() == {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        *(
            (f"{core}.multiarray", name)
            for core in ("numpy.core", "numpy._core")
            for name in ("_reconstruct", "scalar")
        ),
    }
    for stand_in in script.GLOBALS.values():
        assert type(stand_in) is object or stand_in.__module__ == "convert_slowfast"


def test_shared_content_is_not_copied_before_it_is_needed(tmp_path):
    content = np.zeros(10**6, "f4")
    data = pickle.dumps({"blobs": {f"unknown{index}": content[:] for index in range(3)}}, 4)
    reader = script.ArrayReader()
    blobs = reader.read(data)["blobs"]
    assert all(type(array.content) is bytes for array in blobs.values())
    one = pickle.dumps({"blobs": dict.fromkeys((f"unknown{index}" for index in range(10**5)), content)}, 4)
    (tmp_path / "weights.pkl").write_bytes(one)  # as copies, 400 GB
    with pytest.raises(ValueError, match="weights are missing"):
        convert(tmp_path / "weights.pkl")


@pytest.mark.parametrize("legacy", [False, True])
def test_harmful_checkpoints_of_pytorch_are_refused(tmp_path, legacy):
    marker, path = tmp_path / "marker", tmp_path / "weights.pyth"
    for content in (
        {"model_state": {"a": Calls(os.system, f"touch {marker}")}},
        {"model_state": {"a": torch.zeros(2)}, "cfg": Calls(builtins.eval, f"open({str(marker)!r}, 'w')")},
    ):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=f"^{path}: cannot be loaded as plain data ") as caught:
            convert(path)
        assert "\n" not in str(caught.value) and not marker.exists()
        fault = "(Unsupported global:|Trying to load unsupported) GLOBAL .*"
        assert re.fullmatch(rf"{path}: cannot be loaded as plain data \({fault}\)", str(caught.value))
        assert "torch." not in str(caught.value) and "file an issue" not in str(caught.value)
    for content in ({"state": {}}, [1], {"model_state": {1: torch.zeros(2)}}, {"model_state": {"a": [1.0]}}):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=f"^{path}: has no `model_state`, a dictionary of weights$"):
            convert(path)
    for tensor in (torch.zeros(2, 2).to_sparse(), torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")):
        torch.save({"model_state": {"a": tensor}}, path)
        with pytest.raises(ValueError, match=f"^{path}: has no `model_state`, a dictionary of weights$"):
            convert(path)
    for content in (b"", b"PK\x03\x04", b"\x80\x02}.", os.urandom(64)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^{path}: "):
            convert(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^{path}: damaged, or not a checkpoint of PyTorch$"):
        convert(path)
    path.write_bytes(pickle.dumps({"model_state": {}}, 4))
    with pytest.raises(ValueError, match=rf"^{path}: cannot be loaded as plain data \(Unsupported operand 149\)$"):
        convert(path)


def test_the_package_reads_no_pickles():
    names = {}
    for path in Path(modeling_diffusionvmr.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name: path for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names |= {f"{node.module}.{alias.name}": path for alias in node.names}
    unwanted = ("pickle", "pickletools", "cloudpickle", "dill", "joblib", "shelve", "marshal", "convert_slowfast")
    found = {name for name in names if name.split(".")[0] in unwanted}
    assert found <= {"pickle.UnpicklingError"}  # which `torch.load(weights_only=True)` raises
