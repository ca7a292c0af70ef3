"""`conversion.py`, `diffusionvmr convert` and `dataset_scripts/`, on small releases in the official layouts."""

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import DatasetCard

from modeling_diffusionvmr import (
    DiffusionVMRProcessor,
    MomentRetrievalDataset,
    load_annotations,
    open_features,
)
from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.data import benchmarks, conversion, parquet
from modeling_diffusionvmr.data.annotations import hold_out
from modeling_diffusionvmr.data.features import open_text_features, open_video_features, write_features
from modeling_diffusionvmr.data.files import load_jsonl, locked, save_jsonl
from small_data import make_charades, make_qvhighlights, make_tacos

SCRIPTS = Path(__file__).resolve().parents[2] / "dataset_scripts"
BENCHMARKS = {"qvhighlights": "QVHighlights", "charades_sta": "Charades-STA", "tacos": "TACoS"}
pytestmark = pytest.mark.usefixtures("cache")

COLUMNS = {
    "qid": datasets.Value("int64"),
    "query": datasets.Value("string"),
    "vid": datasets.Value("string"),
    "duration": datasets.Value("float64"),
    "relevant_windows": datasets.List(datasets.List(datasets.Value("float64"))),
    "relevant_clip_ids": datasets.List(datasets.Value("int32")),
    "saliency_scores": datasets.List(datasets.List(datasets.Value("float32"))),
}


# Releases

MAKE = {"qvhighlights": make_qvhighlights, "charades_sta": make_charades, "tacos": make_tacos}


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """The folder and the arguments of each release, read-only by agreement."""
    made = {}
    for name, make in MAKE.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = SimpleNamespace(folder=folder, arguments=make(folder))
    return made


def run(command: Callable[[], None], folder: Path) -> SimpleNamespace:
    """Run a command in this process, in a folder, and return what it printed and what it exited with."""
    stdout, stderr, code = io.StringIO(), io.StringIO(), None
    with (
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        warnings.simplefilter("always")
        patch.chdir(folder)
        try:
            command()
        except SystemExit as error:
            code = error.code
    return SimpleNamespace(code=code, stdout=stdout.getvalue(), stderr=stderr.getvalue())


def convert(benchmark: str, folder: Path, output: Path, *arguments) -> SimpleNamespace:
    """Convert a release with the command, from its folder."""
    command = ["convert", benchmark, str(output), "--annotations", ".", *map(str, arguments)]
    return run(lambda: main(command), folder)


@pytest.fixture(scope="module")
def converted(releases, tmp_path_factory):
    """The converted folder of each release, in float32, read-only by agreement."""
    folders = {}
    for name, release in releases.items():
        output = tmp_path_factory.mktemp("output") / name
        result = convert(name, release.folder, output, *release.arguments, "--dtype", "float32")
        assert result.code is None, result.code
        folders[name] = output
    return folders


def official_rows(benchmark: str, folder: Path) -> dict[str, list]:
    files = {
        "qvhighlights": [
            "highlight_train_release.jsonl",
            "highlight_val_release.jsonl",
            "highlight_test_with_gt.jsonl",
        ],
        "charades_sta": ["charades_sta_train.txt", "charades_sta_test.txt"],
        "tacos": ["train.json", "val.json", "test.json"],
    }[benchmark]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [load_annotations(folder / file) for file in files]
    if benchmark == "charades_sta":
        rows[:1] = hold_out(rows[0], 0.05)
    return dict(zip(("train", "val", "test"), rows))


@pytest.fixture
def release(tmp_path):
    """A release of QVHighlights that a test may break, and a function that converts it."""
    folder = tmp_path / "release"
    folder.mkdir()
    arguments = make_qvhighlights(folder)
    output = tmp_path / "output"

    def run(*more, instead=arguments):
        return convert("qvhighlights", folder, output, *instead, *more)

    return SimpleNamespace(folder=folder, output=output, convert=run)


# What a folder contains


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_annotations(releases, converted, benchmark):
    """The default config has one row per query, with its features."""
    folder = releases[benchmark].folder
    loaded = datasets.load_dataset(str(converted[benchmark]))
    official = official_rows(benchmark, folder)
    assert list(loaded) == ["train", "val", "test"]
    text = open_text_features(folder / releases[benchmark].arguments[-1], sum(official.values(), []))
    for split, rows in official.items():
        types = dict(COLUMNS, text_features=datasets.Array2D((None, 3), "float32"))
        if benchmark == "tacos":
            types["qid"] = datasets.Value("string")
        assert dict(loaded[split].features) == types
        assert len(loaded[split]) == len(rows)
        for found, row in zip(loaded[split], rows):
            for name in COLUMNS:
                assert found[name] == row.get(name)
            np.testing.assert_array_equal(found["text_features"], text[row["qid"]])


@pytest.mark.parametrize(
    "benchmark, sizes, seconds",
    [
        ("qvhighlights", {"slowfast": 6, "clip": 4}, 2.0),
        ("charades_sta", {"vgg": 5}, None),  # clips share the duration
        ("tacos", {"c3d": 7}, None),
    ],
)
def test_videos(releases, converted, benchmark, sizes, seconds):
    """One row per video, one column per backbone."""
    loaded = datasets.load_dataset(str(converted[benchmark]), "videos").with_format("numpy")
    stores = {name: next(iter(releases[benchmark].folder.glob(f"{name}*"))) for name in sizes}
    stores = {name: open_features(path) for name, path in stores.items()}
    for split, rows in official_rows(benchmark, releases[benchmark].folder).items():
        durations = {row["vid"]: row["duration"] for row in rows}
        types = {"vid": datasets.Value("string"), "duration": datasets.Value("float64")}
        types["clip_seconds"] = datasets.Value("float64")
        types.update({name: datasets.Array2D((None, size), "float32") for name, size in sizes.items()})
        assert dict(loaded[split].features) == types
        assert {row["vid"]: row["duration"] for row in loaded[split]} == durations
        assert len(loaded[split]) == len(durations)
        for row in loaded[split]:
            for name, store in stores.items():
                assert row[name].dtype == np.float32
                np.testing.assert_array_equal(row[name], store[row["vid"]])
    columns = [open_features(converted[benchmark], name) for name in sizes]
    assert [column.clip_seconds for column in columns] == [seconds] * len(sizes)


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_card(releases, converted, benchmark):
    folder = converted[benchmark]
    card = DatasetCard.load(folder / "README.md")
    assert card.data.pretty_name == BENCHMARKS[benchmark] and card.data.language == ["en"]
    assert card.data.license == ("cc-by-nc-sa-4.0" if benchmark == "qvhighlights" else "other")
    assert [config["config_name"] for config in card.data.configs] == ["annotations", "videos"]
    assert [config.get("default", False) for config in card.data.configs] == [True, False]
    named = []
    for config in card.data.configs:
        assert [files["split"] for files in config["data_files"]] == ["train", "val", "test"]
        for files in config["data_files"]:
            paths = [files["path"]] if isinstance(files["path"], str) else files["path"]
            named += [path for pattern in paths for path in folder.glob(pattern)]
    assert sorted(named) == sorted(folder.glob("*/*")) and len(set(named)) == len(named) == 6
    assert {path.name for path in folder.iterdir()} == {"README.md", "annotations", "videos"}
    for split, rows in official_rows(benchmark, releases[benchmark].folder).items():
        assert f"| {split} | {len(rows)} | {len({row['vid'] for row in rows})} |" in card.text
    for text in ("@in" if benchmark != "tacos" else "@article", "https://", "float32", "not normalized", "license"):
        assert text in card.text
    assert str(releases[benchmark].folder) not in card.content


def test_license_and_split_of_charades(converted):
    text = DatasetCard.load(converted["charades_sta"] / "README.md").text
    assert "no validation split: 5% of its training videos are held out" in text
    rows = {split: load_annotations(converted["charades_sta"], split) for split in ("train", "val", "test")}
    assert {split: len(split_rows) for split, split_rows in rows.items()} == {"train": 46, "val": 2, "test": 4}
    assert sorted(row["qid"] for row in rows["train"] + rows["val"]) == list(range(48))
    assert [row["qid"] for row in rows["test"]] == [12404, 12405, 12406, 12407]


# Reading it back


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_rows_come_back(releases, converted, benchmark):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # windows were cut when the folder was written
        for split, rows in official_rows(benchmark, releases[benchmark].folder).items():
            assert load_annotations(converted[benchmark], split=split) == rows
            assert load_annotations(str(converted[benchmark]), split, skip_invalid=True) == rows
    for split in ("validation", None):
        with pytest.raises(ValueError, match=rf"`split` must be one of .*val.*, got {split!r}$"):
            load_annotations(converted[benchmark], split)


def test_split_of_what_has_none(releases):
    with pytest.raises(ValueError, match=r"train\.json: only a converted folder has a `split`, got 'train'"):
        load_annotations(releases["tacos"].folder / "train.json", "train")
    with pytest.raises(ValueError, match=f"{releases['tacos'].folder}: "):
        load_annotations(releases["tacos"].folder, "train")


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_samples_are_those_of_the_official_files(releases, converted, tiny_config, benchmark):
    """Bit for bit, with their random draws, since the clips of these releases cover the durations."""
    release = releases[benchmark]
    video = [release.folder / name for name in release.arguments[1:-2]]
    rows = {
        "official": official_rows(benchmark, release.folder)["train"],
        "converted": load_annotations(converted[benchmark], "train"),
    }
    stores = {
        "official": (
            open_video_features(video),
            open_text_features(release.folder / release.arguments[-1], rows["official"]),
        ),
        "converted": (
            open_video_features([converted[benchmark]]),
            open_text_features(converted[benchmark], rows["converted"]),
        ),
    }
    sizes = [next(iter(store.values())).shape[1] for store in stores["official"][0]]
    processor = DiffusionVMRProcessor(sizes, 3, max_clips=20, max_tokens=10)
    one, other = (
        MomentRetrievalDataset(rows[name], *stores[name], processor, tiny_config())
        for name in ("official", "converted")
    )
    assert len(one) == len(other) > 2
    for index in range(min(len(one), 6)):
        sample, again = one[index], other[index]
        assert sample.keys() == again.keys() and sample.pop("covered_duration") == again.pop("covered_duration")
        for name, value in sample.items():
            torch.testing.assert_close(again[name], value, atol=0, rtol=0)


def test_float16_by_default(release, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")  # a rename needs the same file system
    assert release.convert().code is None
    assert {path.name for path in release.output.parent.iterdir()} == {"release", "output"}
    monkeypatch.undo()
    for name in ("slowfast", "clip", "text"):
        official = open_features(release.folder / name)
        features = open_features(release.output, "text_features" if name == "text" else name)
        assert sorted(features) == sorted(official)
        for identifier, array in official.items():
            np.testing.assert_array_equal(features[identifier], array.astype(np.float16).astype(np.float32))
    types = datasets.load_dataset(str(release.output), "videos", split="val").features
    assert types["clip"] == datasets.Array2D((None, 4), "float16")
    assert "float16" in (release.output / "README.md").read_text()


def test_several_files(release, monkeypatch):
    """A large release is split into several files; rows stay in order."""
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 300)
    monkeypatch.setattr(parquet, "MAX_GROUP_BYTES", 150)
    assert release.convert("--dtype", "float32").code is None
    assert len(list(release.output.glob("annotations/*train*"))) == 3 == len(list(release.output.glob("*/*train*"))) - 2
    train = load_jsonl(release.folder / "highlight_train_release.jsonl")
    assert load_annotations(release.output, "train") == train
    assert datasets.load_dataset(str(release.output), split="train")["qid"][:] == [7, 3, 12]
    for name in ("slowfast", "clip"):
        for vid, array in open_features(release.folder / name).items():
            np.testing.assert_array_equal(open_features(release.output, name)[vid], array)


def test_converted_again(release):
    """A new folder is not confused with an old one of the same name."""
    assert release.convert().code is None
    assert load_annotations(release.output, "val")[0]["query"] == "A dog"
    assert open_features(release.output, "clip")["c_0.0_30.0"].shape == (15, 4)
    assert len(datasets.load_dataset(str(release.output), split="val")) == 1
    shutil.rmtree(release.output)
    row = load_jsonl(release.folder / "highlight_val_release.jsonl")[0]
    save_jsonl([{**row, "query": "A fox"}], release.folder / "highlight_val_release.jsonl")
    array = open_features(release.folder / "clip")["c_0.0_30.0"] + 1
    write_features(release.folder / "clip", "c_0.0_30.0", array)
    assert release.convert().code is None
    assert load_annotations(release.output, "val")[0]["query"] == "A fox"
    np.testing.assert_allclose(open_features(release.output, "clip")["c_0.0_30.0"], array, atol=2e-3)
    assert datasets.load_dataset(str(release.output), split="val")["query"][:] == ["A fox"]


def test_test_split_without_ground_truth(release):
    (release.folder / "highlight_test_with_gt.jsonl").unlink()
    assert release.convert().code is None
    row = {"qid": 9, "query": "A cat", "vid": "d_0.0_18.0", "duration": 18}
    assert load_annotations(release.output, "test") == [row]


def test_numbers_and_names_as_qid(release):
    """Both become strings in the column. Features are found by either."""
    path = release.folder / "highlight_train_release.jsonl"
    rows = load_jsonl(path)
    save_jsonl([{**rows[0], "qid": "seven"}, *rows[1:]], path)
    shutil.move(release.folder / "text" / "qid7.npz", release.folder / "text" / "qidseven.npz")
    assert release.convert().code is None
    assert [row["qid"] for row in load_annotations(release.output, "train")] == ["seven", "3", "12"]
    assert open_features(release.output, "text_features")[3].shape == (5, 3)


def test_whole_numbers_of_any_size_as_qid(release):
    path = release.folder / "highlight_train_release.jsonl"
    rows = load_jsonl(path)
    large = 2**63
    save_jsonl([{**rows[0], "qid": large}, *rows[1:]], path)
    shutil.move(release.folder / "text" / "qid7.npz", release.folder / "text" / f"qid{large}.npz")
    assert release.convert().code is None
    assert [row["qid"] for row in load_annotations(release.output, "train")] == [str(large), "3", "12"]
    assert open_features(release.output, "text_features")[large].shape == (5, 3)


def test_numbers_that_a_column_cannot_hold(release):
    path = release.folder / "highlight_val_release.jsonl"
    (row,) = load_jsonl(path)
    long = {"duration": 10**11, "relevant_windows": [[2, 10**10]]}
    save_jsonl([{**row, **long, "relevant_clip_ids": [2**31], "saliency_scores": [[1, 2, 3]]}], path)
    assert_rejected(release.convert(), "the val split of annotations cannot be written", release)


def test_rows_are_written_in_batches(release, monkeypatch):
    """Memory is bounded, since each batch is written before the next one is read."""
    monkeypatch.setattr(conversion, "WRITER_BATCH", 2)
    batches = []

    def write(table, folder, name):
        batches.append([len(batch) for batch in table.data.to_batches()])
        return parquet.write_split(table, folder, name)

    monkeypatch.setattr(conversion, "write_split", write)
    assert release.convert().code is None
    assert batches == [[2], [1], [1], [2, 1], [1], [1]]


# The length of a clip


def test_clip_seconds(release):
    def seconds(*arguments):
        shutil.rmtree(release.output, ignore_errors=True)
        assert release.convert(*arguments).code is None
        values = {open_features(release.output, name).clip_seconds for name in ("slowfast", "clip")}
        assert f"A clip is {values.copy().pop():g} s long" in (release.output / "README.md").read_text()
        return values

    assert seconds() == {2.0}
    (release.folder / "clip" / "features.json").write_text('{"clip_seconds": 1.5}')
    assert seconds() == {1.5}
    assert seconds("--clip_seconds", 0.75) == {0.75}


# Bad input


def in_file(release, name, change):
    path = release.folder / name
    path.write_bytes(change(path.read_bytes()))


def rewritten(release, backbone, change):
    store = open_features(release.folder / backbone)
    identifier = sorted(store)[0]
    array = change(store[identifier].copy())
    key = "last_hidden_state" if backbone == "text" else "features"
    stem = f"qid{identifier}" if backbone == "text" else identifier
    np.savez(release.folder / backbone / f"{stem}.npz", **{key: array})


def with_nan(array):
    array[1, 1] = np.nan
    return array


TRAIN = "highlight_train_release.jsonl"
HINT = r" \(skip_invalid=True, or --skip_invalid, skips such rows\)$"
BROKEN = {
    "no annotations": (
        lambda release: (release.folder / "highlight_val_release.jsonl").unlink(),
        r"no highlight_val_release\.jsonl, the val split of QVHighlights$",
    ),
    "no JSON": (lambda release: in_file(release, TRAIN, lambda text: text + b"{\n"), rf"{TRAIN}, line 4: not JSON"),
    "a key is missing": (
        lambda release: in_file(release, TRAIN, lambda text: text.replace(b'"vid"', b'"video"', 1)),
        rf"{TRAIN}, line 1: `vid` is missing" + HINT,
    ),
    "a window that ends before it starts": (
        lambda release: in_file(release, TRAIN, lambda text: text.replace(b"[2, 6]", b"[6, 2]")),
        rf"{TRAIN}, line 1: the window \[6, 2\] does not end after it starts" + HINT,
    ),
    "a duplicate": (
        lambda release: in_file(release, TRAIN, lambda text: text.replace(b'"qid": 12', b'"qid": 3')),
        rf"{TRAIN}, line 3: `qid` 3 was already used \({TRAIN}, line 2\)" + HINT,
    ),
    "no features of a video": (
        lambda release: (release.folder / "slowfast" / "b_0.0_24.0.npz").unlink(),
        r"train, vid b_0\.0_24\.0: slowfast: no features of b_0\.0_24\.0" + HINT,
    ),
    "no features of a sentence": (
        lambda release: (release.folder / "text" / "qid9.npz").unlink(),
        "test, qid 9: text: no features of 9" + HINT,
    ),
    "cut off": (
        lambda release: in_file(release, "clip/d_0.0_18.0.npz", lambda data: data[:100]),
        r"test, vid d_0\.0_18\.0: clip, d_0\.0_18\.0: cannot be read",
    ),
    "NaN": (
        lambda release: rewritten(release, "clip", with_nan),
        r"train, vid a_60\.0_210\.0: clip, a_60\.0_210\.0: features contain NaN or infinity in row 1" + HINT,
    ),
    "NaN in a sentence": (
        lambda release: rewritten(release, "text", with_nan),
        r"train, qid 12: text, 12: features contain NaN or infinity in row 1" + HINT,
    ),
    "another video": (
        lambda release: rewritten(release, "clip", lambda array: array[:4]),
        r"train, vid a_60\.0_210\.0: .*\[11, 4\].*" + HINT,
    ),
    "another size": (
        lambda release: np.savez(release.folder / "clip" / "c_0.0_30.0.npz", features=np.ones((15, 5))),
        r"val, vid c_0\.0_30\.0: clip: features must be \(length, 4\), got \(15, 5\)" + HINT,
    ),
    "beyond float16": (
        lambda release: rewritten(release, "clip", lambda array: array * 1e6),
        r"train, vid a_60\.0_210\.0: clip: values outside the range of float16; use float32 instead" + HINT,
    ),
    "no usable features": (
        lambda release: [path.write_bytes(b"") for path in release.folder.glob("clip/*")],
        "clip: no usable features for any vid of the annotations$",
    ),
    "clips of two lengths": (
        lambda release: [
            (release.folder / name / "features.json").write_text(json.dumps({"clip_seconds": seconds}))
            for name, seconds in (("clip", 1), ("slowfast", 2))
        ],
        "clips of the same length, got 2 s in slowfast, 1 s in clip$",
    ),
}  # fmt: skip


def assert_rejected(result, message: str, release):
    """Check that the error is one line and that nothing is left behind."""
    assert isinstance(result.code, str) and result.code.startswith("error: ") and "\n" not in result.code
    with pytest.raises(ValueError, match=message):
        raise ValueError(result.code)
    assert [path.name for path in release.output.parent.iterdir()] == ["release"]


@pytest.mark.parametrize("broken", BROKEN)
def test_rejected_releases(release, broken):
    change, message = BROKEN[broken]
    change(release)
    before = sorted(release.folder.rglob("*"))
    assert_rejected(release.convert(), message, release)
    assert sorted(release.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "video, more, message",
    [
        (["clip", "./clip"], [], "two backbones are named clip; pass NAME=PATH"),
        (["a=clip", "a=slowfast"], [], "two backbones are named a; pass NAME=PATH"),
        (["vid=clip"], [], "'vid' is not a valid column name for features; pass NAME=PATH"),
        (["text_features=clip"], [], "'text_features' is not a valid column name"),
        (["clip-b32"], [], r"clip-b32: no such file or folder"),
        (["clip"], ["--clip_seconds", "0"], "--clip_seconds must be a number above 0, got 0"),
        (["clip"], ["--clip_seconds", "-1"], "--clip_seconds must be"),
        (["clip"], ["--clip_seconds", "nan"], "--clip_seconds must be"),
        (["highlight_train_release.jsonl"], [], "neither a folder of features nor an HDF5 file"),
        (["clip"], ["--text_features", "nowhere"], "nowhere: no such file or folder of features"),
        (["clip"], ["--text_features", "nowhere.txt"], r"nowhere\.txt"),
    ],
)
def test_rejected_arguments(release, video, more, message):
    arguments = ["--video_features", *video, "--text_features", "text"]
    assert_rejected(release.convert(*more, instead=arguments), message, release)


def test_names_of_backbones(release):
    other = release.folder / "a=b"
    shutil.copytree(release.folder / "clip", other / "clip-b32")
    arguments = ["--video_features", f"vit={other}/clip-b32", "slowfast", "--text_features", "text"]
    assert release.convert(instead=arguments).code is None
    assert [store.column for store in open_video_features([release.output])] == ["vit", "slowfast"]
    shutil.rmtree(release.output)
    (other / "clip-b32").rename(other / "clip")
    assert release.convert(instead=["--video_features", other / "clip", "--text_features", "text"]).code is None
    assert open_features(release.output).column == "clip"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_output_that_is_there(release, kind):
    if kind == "file":
        release.output.write_text("mine")
    else:
        release.output.mkdir()
    assert release.convert().code == f"error: {release.output}: already exists; remove it or choose another name"
    assert release.output.read_text() == "mine" if kind == "file" else not list(release.output.iterdir())


def test_what_a_killed_conversion_left_is_removed_but_not_that_of_a_living_one(release):
    parent = release.output.parent
    (parent / ".output.partial" / "folder" / "videos").mkdir(parents=True)
    with locked(parent / ".output.lock"):
        assert release.convert().code == f"error: {release.output}: another process is writing it"
        assert (parent / ".output.partial" / "folder" / "videos").exists()
    (parent / ".output.lock").touch()
    assert release.convert().code is None
    assert {path.name for path in parent.iterdir()} == {"release", "output"}
    assert {path.name for path in release.output.iterdir()} == {"README.md", "annotations", "videos"}


def test_nothing_left_of_new_parents(release):
    (release.folder / "text" / "qid9.npz").unlink()
    output = release.output / "deep" / "er"
    assert convert("qvhighlights", release.folder, output, "--video_features", "clip", "--text_features", "text").code
    assert not release.output.exists()
    (release.folder / "text" / "qid4.npz").rename(release.folder / "text" / "qid9.npz")
    write_features(release.folder / "text", 4, np.ones((5, 3)), "last_hidden_state")
    assert not convert(
        "qvhighlights", release.folder, output, "--video_features", "clip", "--text_features", "text"
    ).code
    assert len(load_annotations(output, "val")) == 1


def test_nothing_left_where_it_is_interrupted(release, monkeypatch):
    """Interrupted in the second table, when the first one is complete."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion.Source, "_annotation", interrupted)
    assert release.convert().code == 130
    assert [path.name for path in release.output.parent.iterdir()] == ["release"]


# Rows that are left out for their features


def test_skip_invalid(release):
    in_file(release, TRAIN, lambda text: text + b"{\n")
    (release.folder / "clip" / "b_0.0_24.0.npz").unlink()  # the video of qid 3
    rewritten(release, "text", lambda array: array[:0])  # of qid 12, whose video stays
    result = release.convert("--skip_invalid")
    assert result.code is None
    assert f"{TRAIN}, line 4: not JSON" in result.stderr and "skipped 1 of 4 rows" in result.stderr
    wanted = {
        "train, vid b_0.0_24.0": "clip: no features of b_0.0_24.0",
        "train, qid 3": "video b_0.0_24.0 was skipped",
        "train, qid 12": "text, 12: features are empty",
    }
    assert f"warning: skipped {len(wanted)} rows with unusable features:" in result.stderr
    card = (release.output / "README.md").read_text()
    for what, why in wanted.items():
        assert f"  {what}: {why}" in result.stderr
        assert f"- {what}\n" in card
    assert "| train | 1 | 1 |" in card and "train: 1 queries, 1 videos" in result.stdout
    assert [row["qid"] for row in load_annotations(release.output, "train")] == [7]
    assert sorted(open_features(release.output, "clip")) == ["a_60.0_210.0", "c_0.0_30.0", "d_0.0_18.0"]
    assert sorted(open_features(release.output, "text_features"), key=int) == ["4", "7", "9"]


def test_skip_invalid_where_nothing_is(release):
    result = release.convert("--skip_invalid")
    assert result.code is None and "skipped" not in result.stderr
    assert "No query was skipped" in (release.output / "README.md").read_text()


def test_skip_invalid_that_leaves_a_split_empty(release):
    (release.folder / "clip" / "c_0.0_30.0.npz").unlink()
    result = release.convert("--skip_invalid")
    assert_rejected(result, "the val split has no", release)


def test_lines_of_charades_that_end_before_they_start(releases, tmp_path):
    folder = tmp_path / "release"
    shutil.copytree(releases["charades_sta"].folder, folder)
    train = folder / "charades_sta_train.txt"
    train.write_text("TV003 8.0 7.0##a person b.\n" + train.read_text())
    arguments = releases["charades_sta"].arguments
    result = convert("charades_sta", folder, tmp_path / "output", *arguments)
    assert result.code == (
        "error: charades_sta_train.txt, line 1: the window [8.0, 7.0] does not end after it starts "
        "(skip_invalid=True, or --skip_invalid, skips such rows)"
    )
    result = convert("charades_sta", folder, tmp_path / "output", *arguments, "--skip_invalid")
    assert result.code is None
    assert "charades_sta_train.txt: skipped 1 of 49 rows:\n  charades_sta_train.txt, line 1:" in result.stderr
    rows = load_annotations(tmp_path / "output", "train") + load_annotations(tmp_path / "output", "val")
    assert sorted(row["qid"] for row in rows) == list(range(48))


# The Hub


class FakeApi:
    """Stands in for the Hub and records its calls."""

    calls = []

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return SimpleNamespace(repo_id=f"someone/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload_folder", repo_id, names, options))


@pytest.mark.parametrize("private", [False, True])
def test_push_to_hub(release, monkeypatch, private):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(conversion, "HfApi", FakeApi)
    arguments = ["--push_to_hub", "moments", *(["--private"] if private else [])]
    assert release.convert(*arguments).code is None
    create, upload = FakeApi.calls
    assert create == ("create_repo", "moments", {"repo_type": "dataset", "private": private, "exist_ok": True})
    names, options = ["README.md", "annotations", "videos"], {"repo_type": "dataset", "delete_patterns": "*.parquet"}
    assert upload == ("upload_folder", "someone/moments", names, options)  # removes an earlier conversion
    assert release.output.is_dir()


def test_a_rejected_release_is_not_pushed(release, monkeypatch):
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(conversion, "HfApi", FakeApi)
    (release.folder / "text" / "qid9.npz").unlink()
    assert_rejected(release.convert("--push_to_hub", "moments"), "no features of 9", release)
    assert not FakeApi.calls


# The scripts


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_scripts(releases, converted, tmp_path, monkeypatch, benchmark):
    """The scripts write the same files as the command."""
    release = releases[benchmark]
    arguments = [str(tmp_path / "output"), "--annotations", ".", *release.arguments, "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", [benchmark, *arguments])
    result = run(lambda: runpy.run_path(str(SCRIPTS / f"{benchmark}.py"), run_name="__main__"), release.folder)
    assert result.code is None, result.code
    files = sorted(path.relative_to(converted[benchmark]) for path in converted[benchmark].rglob("*"))
    assert sorted(path.relative_to(tmp_path / "output") for path in (tmp_path / "output").rglob("*")) == files
    for file in files:
        if (converted[benchmark] / file).is_file():
            assert (tmp_path / "output" / file).read_bytes() == (converted[benchmark] / file).read_bytes()


def test_command(releases, tmp_path):
    """As a process of its own, it writes the folder and nothing else, in particular nothing in the home folder."""
    release = releases["charades_sta"]
    before = sorted(release.folder.rglob("*"))
    (tmp_path / "home").mkdir()
    command = [sys.executable, SCRIPTS / "charades_sta.py", tmp_path / "new" / "output", "--annotations", "."]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment.update(HOME=str(tmp_path / "home"), HF_HUB_OFFLINE="1")
    result = subprocess.run(
        [*command, *release.arguments],
        cwd=release.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "train: 46 queries, 23 videos",
        "val: 2 queries, 1 videos",
        "test: 4 queries, 2 videos",
        f"wrote {tmp_path / 'new' / 'output'}",
    ]
    cut = "1 rows have windows that end after the video; they were cut"
    for split in ("train", "test"):
        assert f"warning: charades_sta_{split}.txt: {cut}" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(release.folder.rglob("*")) == before
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["output"]
    assert len(load_annotations(tmp_path / "new" / "output", "train")) == 46


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_help(benchmark, tmp_path):
    result = convert(benchmark, tmp_path, tmp_path / "output", "--help")
    assert result.code == 0 and result.stdout.startswith("usage:") and BENCHMARKS[benchmark] in result.stdout
    for files in benchmarks.BENCHMARKS[benchmark].files.values():
        assert all(file in result.stdout for file in files)


def test_predictions_of_a_converted_split_are_plotted(converted, tmp_path):
    """`plot` reads a split of the folder, as `evaluate` does."""
    folder = converted["qvhighlights"]
    (row,) = load_annotations(folder, "val")
    prediction = {name: row[name] for name in ("qid", "query", "vid")}
    save_jsonl([{**prediction, "pred_relevant_windows": [[28, 30, 0.5]]}], tmp_path / "predictions.jsonl")
    argv = ["plot", "--annotations", str(folder), "--predictions", str(tmp_path / "predictions.jsonl")]
    main([*argv, "--split", "val", "--qid", str(row["qid"]), "--output", str(tmp_path / "picture.png")])
    assert (tmp_path / "picture.png").stat().st_size > 0
