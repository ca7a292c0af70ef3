import errno
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, CLIPImageProcessorPil, pipeline

from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRModel,
    DiffusionVMRProcessor,
    DiffusionVMRTrainer,
    DiffusionVMRTrainingArguments,
    MomentRetrievalDataset,
    VideoMomentRetrievalPipeline,
    checkpoint,
    open_features,
)
from modeling_diffusionvmr.backbones import Backbones, load_backbone
from modeling_diffusionvmr.checkpoint import load_backbones
from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.data.extraction import Output, extract_sentences, extract_videos
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from small_checkpoint import as_video, description, put_on_hub, save_checkpoint, tiny_clip
from test_video import write_video

TASK = "video-moment-retrieval"
QUERY = "a red dog"


@pytest.fixture(scope="module")
def clip():
    return tiny_clip()


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 24, 40, 3), dtype=np.uint8)


# Where a backbone is


def test_saved_with_a_checkpoint(clip, frames, tmp_path):
    descriptions = Backbones([description(id="some/hub-id")], [clip]).save_pretrained(tmp_path)
    assert descriptions == [description()]
    loaded = load_backbones(SimpleNamespace(backbones=descriptions), tmp_path, device="cpu", dtype=torch.float32)
    np.testing.assert_array_equal(loaded.encode_video(as_video(frames))[0], clip.encode_video(as_video(frames)))
    np.testing.assert_array_equal(loaded.encode_text(["a red dog"])[0], clip.encode_text(["a red dog"])[0])
    assert type(loaded.models[0].image_processor) is CLIPImageProcessorPil


def test_folder_inside_a_checkpoint_on_the_hub(clip, tmp_path):
    put_on_hub(clip, tmp_path, "someone/diffusionvmr", "clip")
    config = SimpleNamespace(backbones=[description()])
    loaded = load_backbones(config, "someone/diffusionvmr", cache_dir=str(tmp_path), local_files_only=True)
    assert loaded.models[0].feature_size == 12


def test_backbone_outside_the_checkpoint(clip, frames, tmp_path):
    put_on_hub(clip, tmp_path / "cache", "someone/clip")
    (tmp_path / "checkpoint").mkdir()
    config = SimpleNamespace(backbones=[description(id="someone/clip")])
    kwargs = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True, "revision": "the-checkpoint's"}
    for folder in (tmp_path / "checkpoint", None):
        loaded = load_backbones(config, folder, **kwargs)
        np.testing.assert_array_equal(loaded.encode_video(as_video(frames))[0], clip.encode_video(as_video(frames)))


def test_backbones_that_cannot_be_run_are_named(clip, tmp_path):
    clip.save_pretrained(tmp_path / "clip")
    BertConfig().save_pretrained(tmp_path / "bert")
    backbones = [
        {"name": "slowfast", "feature_size": 2304, "clip_seconds": 2.0},
        description(),
        {"name": "bert", "folder": "bert", "text_feature_size": 768},
    ]
    with pytest.raises(ValueError, match=r"cannot be run: slowfast \(features only\), bert \(bert\);"):
        load_backbones(SimpleNamespace(backbones=backbones), tmp_path)
    with pytest.raises(ValueError, match="has no `backbones`"):
        load_backbones(SimpleNamespace(backbones=None), tmp_path)


def test_backbone_on_the_hub_that_cannot_be_loaded(tmp_path):
    clip, kwargs = description(id="someone/clip"), {"cache_dir": str(tmp_path), "local_files_only": True}
    with pytest.raises(OSError, match=r"^backbone `clip` could not be loaded from someone/clip \(.*\)$"):
        load_backbones(SimpleNamespace(backbones=[clip]), None, **kwargs)
    # Nobody asks the Hub for it where another backbone cannot be run anyway
    slowfast = {"name": "slowfast", "feature_size": 2304, "clip_seconds": 2.0}
    for backbones in ([slowfast, clip], [clip, slowfast]):
        with pytest.raises(ValueError, match=r"cannot be run: slowfast \(features only\); pass"):
            load_backbones(SimpleNamespace(backbones=backbones), None, **kwargs)


@pytest.mark.parametrize("place", ["nothing", "another folder", None])
def test_missing_folder_is_named(place, tmp_path):
    folder = None if place is None else tmp_path
    if place == "another folder":
        (tmp_path / "clip").mkdir()
    message = r"lacks backbone `clip`; pass `backbones=` or save it with the model"
    with pytest.raises(OSError, match=message) as caught:
        load_backbones(SimpleNamespace(backbones=[description()]), folder, local_files_only=True)
    assert str(caught.value).startswith("the model" if folder is None else str(tmp_path))


def test_missing_folder_on_the_hub(clip, tmp_path):
    put_on_hub(clip, tmp_path, "someone/diffusionvmr", "other")
    config = SimpleNamespace(backbones=[description()])
    with pytest.raises(OSError, match="someone/diffusionvmr lacks backbone `clip`"):
        load_backbones(config, "someone/diffusionvmr", cache_dir=str(tmp_path), local_files_only=True)


def test_links_that_leave_the_checkpoint(clip, tmp_path):
    clip.save_pretrained(tmp_path / "elsewhere")
    config = SimpleNamespace(backbones=[description()])
    (tmp_path / "linked folder").mkdir()
    (tmp_path / "linked folder" / "clip").symlink_to(tmp_path / "elsewhere")
    clip.save_pretrained(tmp_path / "linked file" / "clip")
    weights = tmp_path / "linked file" / "clip" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "elsewhere" / "model.safetensors")
    for name in ("linked folder", "linked file"):
        with pytest.raises(ValueError, match=f"{name}/clip.*: a link that leaves the checkpoint"):
            load_backbones(config, tmp_path / name)
    # A link inside the checkpoint is fine
    shutil.copy(tmp_path / "elsewhere" / "model.safetensors", tmp_path / "linked file" / "w.safetensors")
    weights.unlink()
    weights.symlink_to("../w.safetensors")
    load_backbones(config, tmp_path / "linked file")


def test_snapshot_of_the_hub_given_as_a_folder(clip, tmp_path):
    put_on_hub(clip, tmp_path, "someone/diffusionvmr", "clip")
    (snapshot,) = (tmp_path / "models--someone--diffusionvmr" / "snapshots").iterdir()
    blobs = tmp_path / "models--someone--diffusionvmr" / "blobs"
    blobs.mkdir()
    for path in (snapshot / "clip").iterdir():  # as in a real cache
        path.rename(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, path.parent))
    load_backbones(SimpleNamespace(backbones=[description()]), snapshot)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 3])
@pytest.mark.parametrize("of", ["model", "backbone"])
def test_weight_index_that_leaves_its_folder(saved, tmp_path, file, of):
    shutil.copytree(saved, tmp_path / "copy")
    folder = tmp_path / "copy" / ("clip" if of == "backbone" else "")
    (folder / "model.safetensors").rename(folder / "whole.safetensors")
    names = load_file(folder / "whole.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "whole.safetensors")}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    pipeline(TASK, model=str(tmp_path / "copy"))
    index["weight_map"][next(iter(names))] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="model.safetensors.index.json: .* is not a file in the same folder"):
        pipeline(TASK, model=str(tmp_path / "copy"))


# Ways to save


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for index in range(3):
        write_video(folder / f"v{index}.mp4", np.arange(145 - 20 * index) / 10)
    return folder


@pytest.fixture(scope="module")
def data(videos, clip, tmp_path_factory) -> Path:
    """Features of the videos and of sentences, annotations, and the backbone that computed the features."""
    folder = tmp_path_factory.mktemp("data")
    clip.save_pretrained(folder / "tiny")
    rows = [
        {"qid": qid, "query": QUERY, "vid": f"v{qid % 3}", "duration": 10.5, "relevant_windows": [[2, 6]]}
        for qid in range(6)
    ]
    save_jsonl(rows, folder / "rows.jsonl")
    paths = {path.stem: path for path in videos.iterdir()}
    backbone = load_backbone(folder / "tiny")
    extract_videos([Output(folder / "clips", backbone, folder / "tiny")], paths, 2.0, dtype="float16")
    extract_sentences(Output(folder / "texts", backbone, folder / "tiny"), {row["qid"]: QUERY for row in rows})
    return folder


@pytest.fixture(scope="module")
def saved(tiny_config, tmp_path_factory) -> Path:
    """A checkpoint with everything, as the pipeline saves it."""
    folder = tmp_path_factory.mktemp("saved")
    save_checkpoint(folder, tiny_config, top_k=3)
    return folder


def make_trainer(model, data, output, **arguments) -> DiffusionVMRTrainer:
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    dataset = MomentRetrievalDataset(
        rows,
        open_features(data / "clips"),
        open_features(data / "texts"),
        DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=8, top_k=2),
        config=model.config,
    )
    fields = {"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 1, **arguments}
    return DiffusionVMRTrainer(model, DiffusionVMRTrainingArguments(str(output), **fields), train_dataset=dataset)


def check_complete(folder: Path, videos: Path, model) -> None:
    """Check that a folder alone gives the moments of a model in memory, and mentions no path of this machine."""
    alone = folder.with_name(f"{folder.name} moved")
    shutil.copytree(folder, alone)
    written = (alone / "config.json").read_text()
    assert json.loads(written)["backbones"] == [
        {"name": "tiny", "folder": "tiny", "feature_size": 12, "text_feature_size": 8, "clip_seconds": 2.0}
    ]
    assert str(videos.parent) not in written
    found = pipeline(TASK, model=str(alone))
    processor = DiffusionVMRProcessor.from_pretrained(alone)
    expected = VideoMomentRetrievalPipeline(model=model, processor=processor)(str(videos / "v0.mp4"), QUERY)
    assert found(str(videos / "v0.mp4"), QUERY) == expected


def test_every_way_to_save_a_training_is_complete(tiny_config, data, videos, tmp_path):
    trainer = make_trainer(DiffusionVMRForMomentRetrieval(tiny_config()), data, tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "trainer")
    trainer.model.save_pretrained(tmp_path / "model")
    retrieve = VideoMomentRetrievalPipeline(model=trainer.model, processor=trainer.processor)
    retrieve.save_pretrained(tmp_path / "pipeline")
    loaded = DiffusionVMRForMomentRetrieval.from_pretrained(tmp_path / "trainer")
    loaded.save_pretrained(tmp_path / "loaded")
    for name in ("run/checkpoint-1", "trainer", "model", "pipeline", "loaded"):
        check_complete(tmp_path / name, videos, trainer.model)
    # The processor is that of the training, or the one beside which the model was loaded
    for name, top_k in {"run/checkpoint-1": 2, "trainer": 2, "pipeline": 2, "loaded": 2, "model": None}.items():
        assert DiffusionVMRProcessor.from_pretrained(tmp_path / name).top_k == top_k
    main(["retrieve", str(videos / "v0.mp4"), QUERY, "--model", str(tmp_path / "trainer")])


def test_saving_into_the_same_folder(saved, videos, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    before = pipeline(TASK, model=str(saved))(str(videos / "v0.mp4"), QUERY)
    model = DiffusionVMRForMomentRetrieval.from_pretrained(tmp_path / "copy")
    model.save_pretrained(tmp_path / "copy")
    assert DiffusionVMRProcessor.from_pretrained(tmp_path / "copy").top_k == 3
    assert pipeline(TASK, model=str(tmp_path / "copy"))(str(videos / "v0.mp4"), QUERY) == before


def test_folder_that_is_gone_is_not_read_as_a_hub_id(saved, clip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_on_hub(clip, tmp_path / "cache", "runs/mine", "clip")
    shutil.copytree(saved, "runs/mine")
    hub = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}
    model = DiffusionVMRForMomentRetrieval.from_pretrained("runs/mine", **hub)
    shutil.rmtree("runs")
    with pytest.warns(UserWarning, match="saved without backbone `clip`"):
        model.save_pretrained("again")
    assert not os.path.exists("again/clip")
    with pytest.raises(OSError, match="lacks backbone `clip`"):
        VideoMomentRetrievalPipeline(model=model, processor=DiffusionVMRProcessor.from_pretrained(saved))


def test_commands_from_videos_to_a_checkpoint(data, videos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data / "tiny", "tiny")
    annotations = ["--annotations", str(data / "rows.jsonl")]
    main(["extract", "features", "--videos", str(videos), *annotations, "--backbone", "tiny"])
    # The same folder, spelled in another way
    main(["extract", "features", "--videos", str(videos), *annotations, "--backbone", str(tmp_path / "tiny")])
    features = ["--video_features", "features/clip", "--text_features", "features/clip_text"]
    small = "--d_model 32 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 32 --decoder_ffn_dim 32 --max_steps 1"
    train = ["train", *annotations, *features, *small.split(), "--use_cpu", "--round_to", "null"]
    main([*train, "--output_dir", "trained"])
    shutil.rmtree("tiny")
    check_complete(tmp_path / "trained", videos, DiffusionVMRForMomentRetrieval.from_pretrained("trained"))

    # A checkpoint's own backbones
    main(["extract", "again", "--videos", str(videos), *annotations, "--model", "trained"])
    features = ["--video_features", "again/tiny", "--text_features", "again/tiny_text"]
    train = ["train", *annotations, *features, "--max_steps", "1", "--use_cpu", "--model", "trained"]
    main([*train, "--output_dir", "tuned"])
    check_complete(tmp_path / "tuned", videos, DiffusionVMRForMomentRetrieval.from_pretrained("tuned"))
    capsys.readouterr()


def test_backbone_that_has_disappeared_does_not_cost_the_weights(tiny_config, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    for name in ("clips", "texts"):
        metadata = tmp_path / "data" / name / "features.json"
        metadata.write_text(json.dumps({**json.loads(metadata.read_text()), "backbone": str(tmp_path / "gone")}))
    with pytest.warns(UserWarning, match="computed by .*gone, which is not here"):
        trainer = make_trainer(DiffusionVMRForMomentRetrieval(tiny_config()), tmp_path / "data", tmp_path / "run")
    trainer.train()
    trainer.save_model(tmp_path / "out")
    with pytest.raises(ValueError, match=r"cannot be run: gone \(features only\)"):
        pipeline(TASK, model=str(tmp_path / "out"))

    model = DiffusionVMRForMomentRetrieval(tiny_config(backbones=[description()]))
    with pytest.warns(UserWarning, match="saved without backbone `clip`: the model lacks backbone `clip`"):
        model.save_pretrained(tmp_path / "alone")
    with pytest.raises(OSError, match="alone lacks backbone `clip`; pass `backbones=`"):
        pipeline(TASK, model=str(tmp_path / "alone"))


def test_damaged_backbone_does_not_cost_the_weights(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    weights = tmp_path / "copy" / "clip" / "model.safetensors"
    model = DiffusionVMRForMomentRetrieval.from_pretrained(tmp_path / "copy")
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.warns(UserWarning, match="saved without backbone `clip`"):
        model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_backbone_that_cannot_be_written(saved, tmp_path, monkeypatch):
    """That is an error like that of any other file: a warning would pass for a complete checkpoint."""

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = DiffusionVMRForMomentRetrieval.from_pretrained(saved)
    monkeypatch.setattr(ClipBackbone, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left on device"):
        model.save_pretrained(tmp_path)


def test_size_decides_what_is_copied(tiny_config, clip, tmp_path, monkeypatch):
    put_on_hub(clip, tmp_path / "cache", "someone/clip")
    model = DiffusionVMRForMomentRetrieval(tiny_config(backbones=[description(id="someone/clip")]))
    model.hub_kwargs = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True}

    def entry(name: str) -> dict:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path / name)
        return json.loads((tmp_path / name / "config.json").read_text())["backbones"][0]

    assert entry("small") == description() and (tmp_path / "small" / "clip" / "model.safetensors").is_file()
    monkeypatch.setattr(checkpoint, "MAX_COPIED_BYTES", 1000)
    assert entry("large") == description(id="someone/clip") and not (tmp_path / "large" / "clip").exists()
    # Where it was not downloaded, nobody asks the Hub for it
    model.hub_kwargs = {"cache_dir": str(tmp_path / "empty")}
    assert entry("unknown") == description(id="someone/clip")

    clip.save_pretrained(tmp_path / "local")
    model = DiffusionVMRForMomentRetrieval(tiny_config(backbones=[description()]))
    model.backbone_sources = {"clip": str(tmp_path / "local")}
    with pytest.warns(UserWarning, match=r"backbone `clip` is copied into the checkpoint: 0 MB"):
        model.save_pretrained(tmp_path / "copied")
    assert (tmp_path / "copied" / "clip" / "model.safetensors").is_file()


def test_processor_of_a_model_saved_alone(tiny_config, saved, tmp_path):
    model = DiffusionVMRForMomentRetrieval.from_pretrained(saved)
    model.save_pretrained(tmp_path / "beside")
    assert DiffusionVMRProcessor.from_pretrained(tmp_path / "beside").top_k == 3
    DiffusionVMRProcessor([12], 8, top_k=7).save_pretrained(tmp_path / "present")
    model.save_pretrained(tmp_path / "present")
    assert DiffusionVMRProcessor.from_pretrained(tmp_path / "present").top_k == 7
    DiffusionVMRProcessor([13], 8, top_k=7).save_pretrained(tmp_path / "of another model")
    model.save_pretrained(tmp_path / "of another model")
    assert DiffusionVMRProcessor.from_pretrained(tmp_path / "of another model").top_k == 3
    backbones = [{"name": "a", "feature_size": 7}, {"name": "b", "feature_size": 5, "text_feature_size": 8}]
    model = DiffusionVMRForMomentRetrieval(tiny_config(backbones=backbones))
    model.save_pretrained(tmp_path / "new")
    processor = DiffusionVMRProcessor.from_pretrained(tmp_path / "new")
    assert processor.video_feature_sizes == [7, 5] and (processor.text_feature_size, processor.max_clips) == (8, 20)


def test_missing_processor(saved, videos, data, tmp_path, capsys):
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "processor_config.json").unlink()
    message = f"{tmp_path / 'copy'}: the model and processor_config.json have different feature sizes, or there is no"
    with pytest.raises(ValueError, match=re.escape(message)):
        pipeline(TASK, model=str(tmp_path / "copy"))
    features = ["--video_features", str(data / "clips"), "--text_features", str(data / "texts")]
    for command in (
        ["retrieve", str(videos / "v0.mp4"), QUERY],
        ["evaluate", "--annotations", str(data / "rows.jsonl"), *features, "--output_dir", str(tmp_path / "out")],
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            main([*command, "--model", str(tmp_path / "copy")])


# Incomplete weights


def rename(tensors):
    return {f"{name}x" if name.endswith("bias") else name: tensor for name, tensor in tensors.items()}


def poison(tensors):
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    return {**tensors, name: torch.full_like(tensors[name], float("nan"))}


@pytest.mark.parametrize("damage", [rename, poison, lambda tensors: {}], ids=["renamed", "NaN", "no tensors"])
@pytest.mark.parametrize("of", ["model", "backbone"])
def test_incomplete_weights_are_refused(saved, videos, data, tmp_path, capsys, damage, of):
    shutil.copytree(saved, tmp_path / "copy")
    folder = tmp_path / "copy" / ("clip" if of == "backbone" else "")
    save_file(damage(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    name = "weights contain NaN or infinity: " if damage is poison else "weights are missing: "
    with pytest.raises(ValueError, match=f"^{folder}: {name}[a-z_]+") as caught:
        pipeline(TASK, model=str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)
    model, features = str(tmp_path / "copy"), ["--video_features", str(data / "clips")]
    features += ["--text_features", str(data / "texts"), "--annotations", str(data / "rows.jsonl")]
    commands = [["retrieve", str(videos / "v0.mp4"), QUERY, "--model", model]]
    if of == "model":
        commands += [["evaluate", "--model", model, *features, "--output_dir", str(tmp_path / "evaluated")]]
        commands += [["train", "--model", model, *features, "--output_dir", str(tmp_path / "trained"), "--use_cpu"]]
    else:
        with pytest.raises(ValueError, match=name):
            load_backbone(folder)
    for command in commands:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(command)
        assert str(end.value.code).startswith(f"error: {folder}: {name}")
        assert "MISSING" not in capsys.readouterr().err  # of the table that `transformers` logs


@pytest.mark.parametrize("command", ["retrieve", "evaluate", "train", "extract"])
def test_checkpoint_of_another_type(data, videos, tmp_path, command):
    features = ["--video_features", "absent", "--text_features", "absent", "--annotations", str(data / "rows.jsonl")]
    arguments = {
        "retrieve": [str(videos / "v0.mp4"), QUERY],
        "evaluate": features,
        "train": [*features, "--output_dir", str(tmp_path / "out")],
        "extract": [str(tmp_path / "out"), "--videos", str(videos)],
    }
    with pytest.raises(SystemExit) as end:
        main([command, *arguments[command], "--model", str(data / "tiny")])
    assert end.value.code == f"error: {data / 'tiny'}: a model of type clip, not diffusionvmr"
    assert not (tmp_path / "out").exists()


def test_model_trained_after_loading_is_complete(saved, data, videos, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    tensors = load_file(saved / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "saliency" not in k}, tmp_path / "copy" / "model.safetensors")
    model = DiffusionVMRForMomentRetrieval.from_pretrained(tmp_path / "copy")
    assert model.missing_weights == ["saliency_head.bias", "saliency_head.weight"]
    trainer = make_trainer(model, data, tmp_path / "run")
    trainer.train()
    VideoMomentRetrievalPipeline(model=trainer.model, processor=trainer.processor)(str(videos / "v0.mp4"), QUERY)


@pytest.mark.parametrize("model_class", [DiffusionVMRForMomentRetrieval, DiffusionVMRModel])
def test_weights_of_the_earlier_dynamic_interaction(saved, tmp_path, model_class):
    folder = shutil.copytree(saved, tmp_path / "copy")
    size = json.loads((folder / "config.json").read_text())["d_model"]
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if "interaction.filter_code" in name or "interaction.bin_proj" in name:
            del tensors[name]
        elif name.endswith("interaction.filter_generator.weight"):
            tensors[name] = torch.zeros(len(tensors[name]), size)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"^{folder}: the sizes .* do not fit its weights. .* before version 0.1.0"):
        model_class.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"^{folder}: .*interaction.filter_generator.weight has .* before version 0.1"):
        model_class.from_pretrained(folder, ignore_mismatched_sizes=True)


def test_clip_without_a_tokenizer(clip, tmp_path):
    clip.save_pretrained(tmp_path)
    for path in tmp_path.glob("*token*"):
        path.unlink()
    with pytest.raises(OSError, match="has no tokenizer"):
        load_backbone(tmp_path, local_files_only=True)


def test_old_checkpoints_name_the_folder_as_an_id(saved, videos, tmp_path):
    shutil.copytree(saved, tmp_path / "old")
    config = json.loads((saved / "config.json").read_text())
    config["backbones"][0]["id"] = config["backbones"][0].pop("folder")
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert DiffusionVMRConfig.from_pretrained(tmp_path / "old").backbones == [description()]
    video = str(videos / "v0.mp4")
    assert pipeline(TASK, model=str(tmp_path / "old"))(video, QUERY) == pipeline(TASK, model=str(saved))(video, QUERY)
    assert AutoModel.from_pretrained(tmp_path / "old").config.backbones == [description()]
