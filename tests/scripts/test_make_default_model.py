"""`scripts/make_default_model.py`, on two videos and for two steps."""

import json
import shutil
from pathlib import Path

import pytest

import make_default_model as script
from modeling_diffusionvmr import DEFAULT_MODEL, load_annotations, open_features

CHOICE = {"threshold": 0.123, "nms_threshold": 0.4, "top_k": 6}


def run(*arguments: str | Path) -> None:
    script.main(script.parse_arguments([str(argument) for argument in arguments]))


def test_stages_after_the_clip(tmp_path, monkeypatch, capsys):
    # tests/scripts/test_rendered_clip.py covers the training of the CLIP
    monkeypatch.setattr(script, "TRAINING_VIDEOS", 2)
    monkeypatch.setattr(script, "TRAINING_STEPS", 2)
    monkeypatch.setattr(script, "ABSENT_SENTENCES_PER_VIDEO", 2)
    monkeypatch.setattr(script, "LONG_VIDEOS", 1)
    monkeypatch.setattr(script, "LONG_VIDEO_SECONDS", (300.0,))
    monkeypatch.setattr(script, "OTHER_VIDEOS", 2)
    monkeypatch.setattr(script, "make_backbones", None)  # never called, since the folder of this stage exists
    monkeypatch.setattr(script, "choose_post_processing", lambda rows: chosen.append(rows) or CHOICE)
    in_two_processes, rendered, chosen = script.in_two_processes, [], []

    def in_one_pool(function, items, description, *state):
        # The features come from two real processes; starting more for the other videos would only take time
        if function is script.render:
            rendered.append({plan.vid for plan in items})
            return [function(item, *state) for item in items]
        return in_two_processes(function, items, description, *state)

    monkeypatch.setattr(script, "in_two_processes", in_one_pool)
    options, dataset = {}, script.MomentRetrievalDataset
    monkeypatch.setattr(script, "MomentRetrievalDataset", lambda *a, **o: options.update(o) or dataset(*a, **o))
    script.open_backbones(Path(DEFAULT_MODEL) / "clip").models[0].save_pretrained(tmp_path / "work" / "seed-0" / "clip")
    run("--work_dir", tmp_path / "work", "--model", tmp_path / "model")
    printed = capsys.readouterr().out
    assert "| unseen pairs |" in printed and "total: " in printed
    assert "| absent, the video's words in another combination |" in printed and json.dumps(CHOICE) in printed
    assert "| sentences | n | AUROC |" in printed
    assert CHOICE.items() <= json.loads((tmp_path / "model" / "processor_config.json").read_text()).items()

    # Every proposal of the validation videos, half of whose sentences are absent; none of these videos is held out
    validation, held_out = rendered
    assert len(validation) == len(held_out) == 4 and validation.isdisjoint(held_out)
    (rows,) = chosen
    assert {row["vid"] for row in rows} == validation
    assert {len(row["pred_relevant_windows"]) for row in rows} == {20}
    present = [row for row in rows if row["relevant_windows"]]
    assert len(rows) == 2 * len(present)
    absent = [row for row in rows if not row["relevant_windows"]]
    assert abs(2 * sum(row["recombined"] for row in absent) - len(absent)) <= len(validation)
    assert len({row["qid"] for row in rows}) == len(rows)
    # Training has absent sentences too, and a long video, and features of them
    features = tmp_path / "work" / "seed-0" / "features"
    trained_on = load_annotations(features / "annotations.jsonl")
    assert [row["qid"] for row in trained_on if not row["relevant_windows"]] == [
        f"rendered_{seed:06d}_absent_{i}" for seed in (0, 1) for i in range(2)
    ]
    assert set(open_features(features / "text")) == {row["qid"] for row in trained_on}
    assert [row["duration"] for row in trained_on if row["duration"] > 150] and options["windows"]
    assert len(open_features(features / "video")["rendered_000000_300s"]) == 150

    assert (tmp_path / "model" / "model.safetensors").exists() and (tmp_path / "model" / "clip").is_dir()
    stages = {path.name for path in (tmp_path / "work" / "seed-0").iterdir()}
    assert stages == {"clip", "features", "model", "proposals"}
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="other exists and is not a checkpoint"):
        script.publish(tmp_path / "model", tmp_path / "other")


def test_only_the_defaults_are_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "OTHER_VIDEOS", 2)
    monkeypatch.setattr(
        script, "in_two_processes", lambda call, items, _, *state: [call(item, *state) for item in items]
    )
    monkeypatch.setattr(script, "choose_post_processing", lambda rows: CHOICE)
    monkeypatch.setattr(script, "evaluate", lambda *_: None)
    model = shutil.copytree(DEFAULT_MODEL, tmp_path / "model")
    run("--choose_defaults", "--model", model)
    for path in Path(DEFAULT_MODEL).rglob("*.*"):
        same = (model / path.relative_to(DEFAULT_MODEL)).read_bytes() == path.read_bytes()
        assert same == (path.name != "processor_config.json")
    before, after = (json.loads((Path(f) / "processor_config.json").read_text()) for f in (DEFAULT_MODEL, model))
    assert after == {**before, **CHOICE}


def test_bad_input_is_rejected_before_any_work(tmp_path, monkeypatch, capsys):
    for name in ("train_rendered_clip", "in_two_processes"):
        monkeypatch.setattr(script, name, lambda *_, **__: pytest.fail("work has begun"))
    (tmp_path / "other").mkdir()
    for arguments, message in (
        (["--evaluate_only", "--model", tmp_path / "absent"], "--model: .*absent is not a checkpoint folder"),
        (["--evaluate_only", "--model", tmp_path / "other"], "--model: .*other is not a checkpoint folder"),
        (["--choose_defaults", "--model", tmp_path / "other"], "--model: .*other is not a checkpoint folder"),
        (["--model", tmp_path / "other"], "--model: .*other exists and is not a checkpoint"),
        (["--seed", "-1", "--model", tmp_path / "absent"], "--seed must be at least 0, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            run("--work_dir", tmp_path / "work", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with pytest.raises(SystemExit):
        script.parse_arguments(["--eval_only"])
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --eval_only"
        " (`python scripts/make_default_model.py --help` lists all arguments)\n"
    )
