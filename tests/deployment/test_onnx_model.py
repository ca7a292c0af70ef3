"""`OnnxDiffusionVMR`, compared with the model that it was exported from."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

from modeling_diffusionvmr import DEFAULT_MODEL, OnnxDiffusionVMR
from modeling_diffusionvmr.deployment import onnx_model
from modeling_diffusionvmr.deployment.graphs import EncoderGraph
from modeling_diffusionvmr.deployment.onnx_export import example, quantize, relative_difference
from modeling_diffusionvmr.modeling_diffusionvmr import TASK
from modeling_diffusionvmr.synthetic.rendered_world import plan_video, write_video

SEED = 70_000_000  # of a video that is used neither in training nor for published figures


@pytest.fixture(scope="module")
def onnx(exported) -> OnnxDiffusionVMR:
    return OnnxDiffusionVMR.from_pretrained(exported)


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return shutil.copytree(exported, tmp_path / "copy")


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> tuple[str, list[str]]:
    """A rendered video and its sentences."""
    plan = plan_video(SEED)
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    write_video(plan, path)
    return str(path), [query.text for query in plan.queries]


@torch.no_grad()
@pytest.mark.parametrize(
    "batch, clips, tokens, proposals, steps, tolerance",
    [
        (1, 1, 1, 1, 1, 1e-4),
        (2, 75, 12, 20, 1, 1e-4),
        (5, 31, 4, 7, 1, 1e-4),
        (1, 200, 40, 100, 1, 1e-4),
        # Each step amplifies differences in the last digits, for random features more than for those of a video
        (2, 75, 12, 20, 4, 1e-2),
    ],
)
def test_equals_the_model(model, onnx, batch, clips, tokens, proposals, steps, tolerance):
    inputs = example(model, EncoderGraph, batch, clips, tokens, proposals)
    options = {"num_proposals": proposals, "num_sampling_steps": steps}
    expected, found = model(**inputs, **options), onnx(**inputs, **options)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        assert relative_difference(found[name], tensor) < tolerance


@torch.no_grad()
def test_other_arguments(model, onnx):
    inputs = example(model, EncoderGraph, 2, 9, 5, 6)
    del inputs["video_mask"], inputs["text_mask"]
    start = {"noisy_spans": torch.randn(1, 6, 2), "timesteps": torch.tensor([500, 20])}
    expected, found = model(**inputs, **start), onnx(**inputs, **start)
    torch.testing.assert_close(found.pred_spans, expected.pred_spans, atol=1e-4, rtol=0)
    as_tuple = onnx(**inputs, **start, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], found.logits)
    with pytest.raises(ValueError, match="`num_sampling_steps` must be 1 to"):
        onnx(**inputs, num_sampling_steps=0)
    with pytest.raises(ValueError, match="`video_features` must be"):
        onnx(inputs["video_features"][..., :5], inputs["text_features"])


def differences(moments: list[dict], others: list[dict]) -> list[float]:
    assert len(moments) == len(others)
    return [abs(one[key] - other[key]) for one, other in zip(moments, others) for key in ("start", "end", "score")]


@pytest.mark.parametrize("options", [{}, {"num_proposals": 50, "num_sampling_steps": 4}])
def test_pipeline_finds_the_same_moments(onnx, video, options):
    path, sentences = video
    options = {**options, "return_saliency": True}
    expected = pipeline(TASK, model=DEFAULT_MODEL)(path, sentences, **options)
    found = pipeline(TASK, model=onnx)(path, sentences, **options)
    assert any(result["moments"] for result in expected)
    for one, other in zip(found, expected, strict=True):
        assert max(differences(one["moments"], other["moments"]), default=0) < 0.01
        assert np.allclose(one["saliency"], other["saliency"], atol=1e-4)
        assert one["clip_seconds"] == other["clip_seconds"]


def test_long_video_is_searched_in_windows(onnx, video):
    path, sentences = video
    options = {"chunk_length_s": 20.0}
    expected = pipeline(TASK, model=DEFAULT_MODEL)(path, sentences[0], **options)
    assert max(differences(pipeline(TASK, model=onnx)(path, sentences[0], **options), expected)) < 0.01


def test_int8(model, onnx, copy, video):
    sizes = {path.name: path.stat().st_size for path in copy.glob("*.onnx")}
    for name in sizes:
        quantize(copy / name)
    assert all((copy / name).stat().st_size < size / 2 for name, size in sizes.items())
    path, sentences = video
    small = OnnxDiffusionVMR.from_pretrained(copy)
    expected, found = (pipeline(TASK, model=network)(path, sentences, top_k=1) for network in (onnx, small))
    differing = [abs(a["start"] - b["start"]) for one, other in zip(found, expected) for a, b in zip(one, other)]
    assert 0 < np.median(differing) < 0.5


def test_as_a_model_of_transformers(onnx, exported):
    assert onnx.config.d_model == 128 and onnx.config.num_proposals == 20
    assert (onnx.name_or_path, onnx.device, onnx.dtype) == (str(exported), torch.device("cpu"), torch.float32)
    assert not onnx.training and sum(1 for _ in onnx.parameters()) == 0
    with pytest.raises(ValueError, match="an exported model is its folder"):
        onnx.save_pretrained("anywhere")


def test_session_options(exported):
    import onnxruntime

    def options_of(model):
        return model.model.denoiser_graph.session.get_session_options()

    assert options_of(OnnxDiffusionVMR.from_pretrained(exported)).intra_op_num_threads == torch.get_num_threads()
    given = onnxruntime.SessionOptions()
    given.intra_op_num_threads = 3
    loaded = OnnxDiffusionVMR.from_pretrained(exported, given, ["CPUExecutionProvider"])
    assert options_of(loaded).intra_op_num_threads == 3


def test_from_the_hub(exported, tmp_path, video):
    repository, commit = tmp_path / "models--someone--onnx", "0" * 40
    shutil.copytree(exported, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    options = {"cache_dir": str(tmp_path), "local_files_only": True}
    loaded = OnnxDiffusionVMR.from_pretrained("someone/onnx", **options)
    assert loaded.hub_kwargs == {**options, "revision": commit}
    path, sentences = video
    assert pipeline(TASK, model=loaded)(path, sentences[0])
    (repository / "snapshots" / commit / "denoiser.onnx").unlink()
    for name, file in (("someone/onnx", "denoiser.onnx"), ("someone/other", "config.json")):
        with pytest.raises(
            OSError, match=f"^{name}: not a local folder, and its {file} could not be loaded from the Hub"
        ):
            OnnxDiffusionVMR.from_pretrained(name, **options)


# Bad input


def change_config(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda folder: (folder / "config.json").unlink(), "FOLDER: has no config.json"),
        (lambda folder: (folder / "encoder.onnx").unlink(), "FOLDER: has no encoder.onnx"),
        (lambda folder: (folder / "denoiser.onnx").write_bytes(b"PK"), "FOLDER/denoiser.onnx: ONNX Runtime cannot"),
        (
            lambda folder: shutil.copy(folder / "encoder.onnx", folder / "denoiser.onnx"),
            "FOLDER/denoiser.onnx: does not fit the config",
        ),
        (lambda folder: change_config(folder, d_model=64), "FOLDER/encoder.onnx: does not fit the config"),
        (lambda folder: change_config(folder, decoder_layers=6), "FOLDER/timestep.onnx: does not fit the config"),
        (lambda folder: change_config(folder, model_type="clip"), "FOLDER: a model of type clip, not DiffusionVMR"),
        (lambda folder: (folder / "config.json").write_text("{"), "FOLDER/config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "FOLDER/config.json: must be a JSON object"),
        (lambda folder: (folder / "config.json").write_text("5"), "FOLDER/config.json: must be a JSON object"),
        (
            lambda folder: change_config(folder, d_model="x"),
            "FOLDER/config.json: Field 'd_model' expected int, got str",
        ),
        (
            lambda folder: change_config(folder, d_model=999),
            "FOLDER/config.json: `encoder_attention_heads` must divide d_model=999",
        ),
    ],
)
def test_incomplete_or_foreign_folder(copy, break_it, message):
    break_it(copy)
    with pytest.raises(ValueError) as error:
        OnnxDiffusionVMR.from_pretrained(copy)
    assert str(error.value).startswith(message.replace("FOLDER", str(copy)))
    assert "\n" not in str(error.value)


def test_a_checkpoint_is_not_an_exported_model():
    with pytest.raises(ValueError, match="has no encoder.onnx, so it is not what `diffusionvmr export` writes"):
        OnnxDiffusionVMR.from_pretrained(DEFAULT_MODEL)


def test_unknown_argument(exported):
    with pytest.raises(TypeError, match=re.escape("unknown arguments ['dtype']")):
        OnnxDiffusionVMR.from_pretrained(exported, dtype="float16")


@pytest.mark.filterwarnings("error")  # ONNX Runtime would warn, and use the CPU
@pytest.mark.parametrize(
    "providers, missing",
    [
        (["CPUExecutionProvidr"], "CPUExecutionProvidr"),
        (["CPUExecutionProvider", ("Nowhere", {"device_id": 0})], "Nowhere"),
    ],
)
def test_providers_that_are_not_here(exported, providers, missing):
    available = ", ".join(onnx_model.import_onnxruntime().get_available_providers())
    with pytest.raises(ValueError) as error:
        OnnxDiffusionVMR.from_pretrained(exported, providers=providers)
    assert str(error.value) == f"`providers`: ONNX Runtime cannot use {missing} here; it can use {available}"


def test_provider_whose_libraries_are_missing(exported, monkeypatch):
    runtime = onnx_model.import_onnxruntime()
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    session = runtime.InferenceSession
    monkeypatch.setattr(runtime, "InferenceSession", lambda path, providers, **others: session(path, **others))
    with pytest.raises(ValueError, match="cannot use CUDAExecutionProvider here; it can use .*CPUExecutionProvider"):
        OnnxDiffusionVMR.from_pretrained(exported, providers=["CUDAExecutionProvider"])


def test_providers_are_a_list(exported):
    assert OnnxDiffusionVMR.from_pretrained(exported, providers=[("CPUExecutionProvider", {})])
    for wrong in ("CPUExecutionProvider", [], [5], [()], 5, [["CPUExecutionProvider", {}]]):
        with pytest.raises(ValueError, match=r"^`providers` must be a list of names or \(name, options\), got "):
            OnnxDiffusionVMR.from_pretrained(exported, providers=wrong)


def test_without_onnxruntime(exported, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # as if it were not installed
    with pytest.raises(ImportError) as error:
        OnnxDiffusionVMR.from_pretrained(exported)
    assert str(error.value) == f"onnxruntime is not installed; install it with: {onnx_model.INSTALL}"
    assert onnx_model.INSTALL == "pip install 'modeling_diffusionvmr[onnx]'"


@torch.no_grad()
def test_each_timestep_is_computed_once(exported, model, monkeypatch):
    """And in the order of the samples, whatever was computed before."""
    onnx, computed = OnnxDiffusionVMR.from_pretrained(exported), []
    graph = onnx.model.timestep_graph

    def record(timesteps: torch.Tensor) -> list[torch.Tensor]:
        computed.extend(timesteps.tolist())
        return graph(timesteps=timesteps)

    monkeypatch.setattr(onnx.model, "timestep_graph", record)
    for steps in ([999, 999], [3, 999, 40], [40, 3]):
        timesteps = torch.tensor(steps)
        expected = model.model.decoder.modulations(timesteps)
        assert relative_difference(onnx.model.modulations(timesteps), expected) < 1e-4
    assert sorted(computed) == [3, 40, 999]


def test_threads_of_a_graph_stop_when_it_is_done():
    """Otherwise the graphs slow each other down."""
    options = onnx_model.default_options()
    assert options.intra_op_num_threads == torch.get_num_threads()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
