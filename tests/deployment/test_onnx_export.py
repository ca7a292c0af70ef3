"""The export: what it writes, what it refuses, and `torch.export` of the same graphs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim
from transformers import AutoModel

from modeling_diffusionvmr import (
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRModel,
    DiffusionVMRProcessor,
    OnnxDiffusionVMR,
)
from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.deployment import onnx_export
from modeling_diffusionvmr.deployment.graphs import GRAPHS, DenoiserGraph, EncoderGraph, TimestepGraph
from modeling_diffusionvmr.deployment.onnx_export import check_graphs, example, export_onnx, relative_difference
from modeling_diffusionvmr.pipeline_diffusionvmr import VideoMomentRetrievalPipeline


@pytest.fixture
def error_of():
    """Run `diffusionvmr export`, which must fail; return the line with which it ends."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["export", *map(str, arguments)])
        assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
        return caught.value.code

    return run


def test_files(exported):
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {"config.json", "processor_config.json", "clip/model.safetensors"} <= names
    assert {"encoder.onnx", "timestep.onnx", "denoiser.onnx"} <= names
    root = str(Path(onnx_export.__file__).parents[1]).encode()
    assert not any(root in path.read_bytes() for path in exported.glob("*.onnx"))  # no path of this machine
    assert not any(name.endswith((".py", ".bin", ".data", ".pt")) for name in names)
    assert "auto_map" not in json.loads((exported / "config.json").read_text())
    assert [path.name for path in exported.parent.iterdir()] == ["onnx"]  # nothing is left of the export


@pytest.mark.parametrize("graph", GRAPHS)
@torch.no_grad()
def test_torch_export_of_the_graphs(tiny_config, graph):
    model = DiffusionVMRForMomentRetrieval(tiny_config()).eval()
    module, config = graph(model), model.config
    free = {name: Dim(name) for name in ("batch", "clips", "tokens", "proposals")}
    shapes = {
        name: {index: free[axis] for index, axis in enumerate(axes) if isinstance(axis, str)}
        for name, axes in graph.inputs(config).items()
    }
    program = torch.export.export(module, (), example(model, graph, 3, 7, 5, 4), dynamic_shapes=shapes).module()
    for shape in ((2, 40, 3, 50), (1, 2, 2, 2)):
        inputs = example(model, graph, *shape)
        for found, expected in zip(program(**inputs), module(**inputs), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_torch_export_of_the_whole_model(tiny_config):
    """`forward` with its sampling, at any batch, number of clips, tokens and proposals."""
    model = DiffusionVMRForMomentRetrieval(tiny_config(num_sampling_steps=2)).eval()

    def inputs(*shape):
        return {
            **example(model, EncoderGraph, *shape),
            **example(model, TimestepGraph, *shape),
            "noisy_spans": example(model, DenoiserGraph, *shape)["noisy_spans"],
        }

    free = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs(3, 7, 5, 4)}
    free["timesteps"] = {0: Dim.DYNAMIC}
    program = torch.export.export(model, (), inputs(3, 7, 5, 4), dynamic_shapes=free).module()
    given = inputs(2, 12, 3, 9)
    expected, found = model(**given), program(**given)
    for name in ("logits", "pred_spans", "saliency_scores"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


def test_model_without_backbones(tiny_config, tmp_path):
    """Also in int8, and with sizes that differ from those of the embedded model."""
    model = DiffusionVMRForMomentRetrieval(tiny_config(decoder_layers=1)).eval()
    attention = model.config._attn_implementation
    assert export_onnx(model, DiffusionVMRProcessor([12], 8), tmp_path, int8=True) < 1e-4
    assert model.config._attn_implementation == attention != "eager"  # with which it is exported
    onnx = OnnxDiffusionVMR.from_pretrained(tmp_path)
    inputs = example(model, EncoderGraph, 2, 6, 3, 1)
    logits, expected = onnx(**inputs).logits, model(**inputs).logits
    assert 0 < relative_difference(logits, expected) < 0.1
    with pytest.raises(ValueError, match="the config has no `backbones`"):
        VideoMomentRetrievalPipeline(model=onnx)


def test_difference_is_found(model, exported):
    assert 0 < check_graphs(model, exported) < 1e-4
    weight = model.model.decoder.layers[-1].class_head[0].bias
    with torch.no_grad():
        weight += 0.01
        try:
            with pytest.raises(ValueError, match="^denoiser.onnx differs from the model by .*, more than 1e-04"):
                check_graphs(model, exported)
        finally:
            weight -= 0.01


@pytest.mark.parametrize("damaged", [0, 1])
def test_nan_in_any_output_is_found(model, exported, monkeypatch, damaged):
    run = onnx_export.OnnxGraph.__call__

    def run_damaged(graph, **inputs):
        outputs = run(graph, **inputs)
        outputs[damaged].fill_(float("nan"))
        return outputs

    monkeypatch.setattr(onnx_export.OnnxGraph, "__call__", run_damaged)
    with pytest.raises(ValueError, match="^encoder.onnx differs from the model by nan, more than 1e-04"):
        check_graphs(model, exported)


@pytest.mark.parametrize(
    "command",
    [
        "export {folder} {output}",
        "push {folder} user/name",
        # The model is checked before the data
        "train --model {folder} --annotations none --video_features none --text_features none --output_dir {output}",
        "evaluate --model {folder} --annotations none --video_features none --text_features none --output_dir {output}",
    ],
)
def test_exported_model_is_not_a_checkpoint(exported, command, tmp_path):
    with pytest.raises(SystemExit) as error:
        main(command.format(folder=exported, output=tmp_path / "output").split())
    assert str(error.value) == (
        f"error: {exported}: a model exported for ONNX Runtime, not a checkpoint; use the checkpoint that it was "
        "exported from, or load this one with `OnnxDiffusionVMR.from_pretrained`"
    )


@pytest.mark.parametrize("cls", [AutoModel, DiffusionVMRForMomentRetrieval, DiffusionVMRModel])
def test_exported_model_is_not_loaded_as_a_checkpoint(exported, cls):
    with pytest.raises(ValueError, match=f"^{exported}: a model exported for ONNX Runtime, not a checkpoint"):
        cls.from_pretrained(exported)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_checkpoint_beside_an_export(model, tmp_path, weights):
    model.save_pretrained(tmp_path)
    if weights.endswith(".bin"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / weights)
    (tmp_path / "encoder.onnx").touch()
    loaded = DiffusionVMRForMomentRetrieval.from_pretrained(tmp_path)
    assert torch.equal(loaded.saliency_head.weight, model.saliency_head.weight)


def test_checkpoint_beside_exported_graphs(model, exported, tmp_path):
    model.save_pretrained(tmp_path)
    shutil.copy(exported / "encoder.onnx", tmp_path)
    assert not DiffusionVMRForMomentRetrieval.from_pretrained(tmp_path).missing_weights


def test_command_fails_if_the_graphs_differ(traced_before, monkeypatch, error_of, tmp_path):
    monkeypatch.setattr(onnx_export, "TOLERANCE", 1e-9)
    line = error_of("embedded", tmp_path / "onnx")
    assert line.startswith("error: encoder.onnx differs from the model by ") and "more than 1e-09" in line
    assert list(tmp_path.iterdir()) == []


def test_int8_command(traced_before, exported, tmp_path, capsys):
    main(["export", "embedded", str(tmp_path / "onnx"), "--format", "onnx", "--int8"])
    assert f"saved {tmp_path / 'onnx'}: differs from the model by at most" in capsys.readouterr().out
    sizes = [sum(path.stat().st_size for path in folder.glob("*.onnx")) for folder in (tmp_path / "onnx", exported)]
    assert sizes[0] < sizes[1] / 2
    assert OnnxDiffusionVMR.from_pretrained(tmp_path / "onnx").config.d_model == 128


def test_bad_input(error_of, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert error_of("embedded", tmp_path / "full") == f"error: {tmp_path / 'full'}: is not empty; choose a new folder"
    assert "file is a file, not a folder" in error_of("embedded", tmp_path / "full" / "file")
    assert error_of("no/such/model", tmp_path / "new") == "error: no/such/model: not a local folder or a valid Hub id"
    assert f"error: {tmp_path / 'full'}: cannot be loaded" in error_of(tmp_path / "full", tmp_path / "new")
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 1000)
    assert "bytes of weights; a file has at most 1,000" in error_of("embedded", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["onnx", "onnx_ir", "onnxruntime", "onnxscript"])
def test_missing_package(error_of, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    line = error_of("embedded", tmp_path / "new")
    assert line == f"error: {package} is not installed; install it with: pip install 'modeling_diffusionvmr[onnx]'"
