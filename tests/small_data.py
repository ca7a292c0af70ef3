"""Small feature files, releases and converted folders, shared by the tests of data."""

import json
from pathlib import Path

import h5py
import numpy as np

from modeling_diffusionvmr.data.features import write_features
from modeling_diffusionvmr.data.files import save_jsonl

ARRAY = np.arange(12, dtype=np.float32).reshape(4, 3)


GLOVE = "the 1 0\nplum 0.5 -2\nbag 3 4\nbag. 7 7\n- 8 9\n"


def write_hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


# A converted folder


LENGTHS = {"train": [4, 1, 7, 3, 5], "val": [2], "test": [6, 1]}


CARD = """---
configs:
- config_name: annotations
  default: true
  data_files:
{annotations}
- config_name: videos
  data_files:
{videos}
---
"""


def write_converted(folder, dtype="float16", scale=1.0, clip_seconds=2.0, lengths=LENGTHS, size=3):
    """
    Write a converted folder without the library, in row groups of two rows, with the backbones `slow_fast` and `clip`
    (twice as wide), and return its arrays by column and id.
    """
    import datasets

    rng = np.random.default_rng(0)
    arrays = {"slow_fast": {}, "clip": {}, "text_features": {}}
    sizes = {"slow_fast": size, "clip": 2 * size, "text_features": 4}
    files = {"annotations": "", "videos": ""}
    for split, counts in lengths.items():
        vids = [f"{split}_{index}" for index in range(len(counts))]
        for column, width in sizes.items():
            for vid, length in zip(vids, counts):
                arrays[column][vid] = (scale * rng.normal(size=(length, width))).astype(dtype)
        for config, columns, key in (
            ("annotations", ["text_features"], "qid"),
            ("videos", ["slow_fast", "clip"], "vid"),
        ):
            types = {key: datasets.Value("string")}
            values = {key: vids}
            if config == "videos":
                types["clip_seconds"] = datasets.Value("float64")
                values["clip_seconds"] = [clip_seconds] * len(vids)
            for column in columns:
                types[column] = datasets.Array2D((None, sizes[column]), dtype)
                values[column] = [arrays[column][vid] for vid in vids]
            (folder / config).mkdir(parents=True, exist_ok=True)
            table = datasets.Dataset.from_dict(values, datasets.Features(types))
            table.to_parquet(folder / config / f"x-{split}-00000-of-00001.parquet", batch_size=2)
            files[config] += f"  - split: {split}\n    path: {config}/x-{split}*.parquet\n"
    (folder / "README.md").write_text(CARD.format(**{name: text.rstrip() for name, text in files.items()}))
    return arrays


# Releases


def random_array(rng: np.random.Generator, length: int, size: int) -> np.ndarray:
    return rng.normal(size=(length, size)).astype(np.float32)


def make_qvhighlights(folder: Path) -> list[str]:
    """Clips of 2 s. The backbones of a video differ by one clip. The test split comes with and without ground truth."""
    rng = np.random.default_rng(1)
    rows = {
        "train": [
            {"qid": 7, "query": "A pan", "vid": "a_60.0_210.0", "duration": 20, "relevant_windows": [[2, 6], [10, 20]]},
            {"qid": 3, "query": "Un \u00e9t\u00e9", "vid": "b_0.0_24.0", "duration": 24, "relevant_windows": [[0, 4]]},
            {"qid": 12, "query": "A pan is cold", "vid": "a_60.0_210.0", "duration": 20, "relevant_windows": [[0, 2]]},
        ],
        "val": [{"qid": 4, "query": "A dog", "vid": "c_0.0_30.0", "duration": 30, "relevant_windows": [[28, 30]]}],
        "test": [{"qid": 9, "query": "A cat", "vid": "d_0.0_18.0", "duration": 18, "relevant_windows": [[4, 6]]}],
    }  # fmt: skip
    for split, suffix in (("train", "train_release"), ("val", "val_release"), ("test", "test_with_gt")):
        for row in rows[split]:
            start, end = row["relevant_windows"][0]
            row["relevant_clip_ids"] = list(range(start // 2, end // 2))
            row["saliency_scores"] = [[clip % 5, 1, 4] for clip in row["relevant_clip_ids"]]
            write_features(folder / "text", row["qid"], random_array(rng, 5, 3), "last_hidden_state")
            length = row["duration"] // 2
            write_features(folder / "slowfast", row["vid"], random_array(rng, length + 1, 6))
            write_features(folder / "clip", row["vid"], random_array(rng, length, 4))
        save_jsonl(rows[split], folder / f"highlight_{suffix}.jsonl")
    to_predict = [{name: row[name] for name in ("qid", "query", "vid", "duration")} for row in rows["test"]]
    save_jsonl(to_predict, folder / "highlight_test_release.jsonl")  # as first released
    return ["--video_features", "slowfast", "clip", "--text_features", "text"]


def make_charades(folder: Path) -> list[str]:
    """VGG features, 6 clips per second, and word vectors. Two windows end after their video."""
    rng = np.random.default_rng(2)
    (folder / "vgg").mkdir()
    for split, count in (("train", 24), ("test", 2)):
        vids = [f"{split[0].upper()}V{index:03}" for index in range(count)]
        durations = {vid: 20.5 + index for index, vid in enumerate(vids)}
        table = "".join(f'{vid},"a, b",{seconds}\n' for vid, seconds in durations.items())
        (folder / f"Charades_v1_{split}.csv").write_text("id,script,length\n" + table)
        lines = [f"{vid} {index}.5 {index + 6}.0##a person {what}." for index, vid in enumerate(vids) for what in "ab"]
        lines[0] = f"{vids[0]} 15.0 25.0##a person beyond."
        (folder / f"charades_sta_{split}.txt").write_text("\n".join(lines) + "\n")
        for vid, seconds in durations.items():
            np.save(folder / "vgg" / f"{vid}.npy", random_array(rng, int(6 * seconds), 5))
    words = ["a", "person", "b", "beyond"]
    text = "".join(f"{word} {' '.join(map(str, random_array(rng, 1, 3)[0]))}\n" for word in words)
    (folder / "glove.txt").write_text(text)
    return ["--video_features", "vgg", "--text_features", "glove.txt"]


def make_tacos(folder: Path) -> list[str]:
    """C3D features in HDF5, under file names with their suffix: few clips for long videos."""
    rng = np.random.default_rng(3)
    with h5py.File(folder / "c3d.hdf5", "w") as file:
        for number, split in enumerate(("train", "val", "test")):
            videos = {}
            for index in range(2):
                timestamps = [[5, 50], [60 + index, 700]]
                sentences = ["He cuts a plum.", "She waits."]
                vid = f"s{number}-d{index}"
                videos[f"{vid}.avi"] = {
                    "timestamps": timestamps,
                    "sentences": sentences,
                    "fps": 29.4,
                    "num_frames": 3000,
                }
                file[f"{vid}.avi"] = random_array(rng, 40 + index, 7)
                for sentence in range(2):
                    write_features(folder / "text", f"{vid}_{sentence}", random_array(rng, 4, 3), "last_hidden_state")
            (folder / f"{split}.json").write_text(json.dumps(videos))
    return ["--video_features", "c3d.hdf5", "--text_features", "text"]
