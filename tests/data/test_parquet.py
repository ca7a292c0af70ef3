import os
import pickle
import tracemalloc
import warnings

import numpy as np
import pyarrow
import pytest
from torch.utils.data import DataLoader

from modeling_diffusionvmr import DiffusionVMRProcessor, MomentRetrievalDataset
from modeling_diffusionvmr.data.features import open_features, open_text_features, open_video_features
from small_data import ARRAY, write_converted


@pytest.mark.parametrize("column", ["slow_fast", "clip", "text_features"])
def test_converted_features(converted, column):
    features = open_features(str(converted.path), column)
    wanted = converted.arrays[column]
    assert sorted(features) == sorted(wanted) and len(features) == 8 and "val_0" in features and "val_1" not in features
    for identifier, array in wanted.items():
        assert features[identifier].dtype == array.dtype
        np.testing.assert_array_equal(features[identifier], array)
    assert features.clip_seconds == (None if column == "text_features" else 2)
    with pytest.raises(KeyError, match=f"{converted.path}: no features of val_1"):
        features["val_1"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_mapped_cannot_be_changed(cache, tmp_path, dtype):
    arrays = write_converted(tmp_path, dtype)
    read = open_features(tmp_path, "clip")["train_0"]
    assert read.dtype == dtype
    with pytest.raises(ValueError, match="read-only"):
        read[:] = 0
    processor = DiffusionVMRProcessor(video_feature_sizes=[6])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared = processor.prepare_video([read])
    wanted = arrays["clip"]["train_0"].astype(np.float32)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True) + 1e-5
    np.testing.assert_allclose(prepared.numpy(), wanted, rtol=1e-6)
    np.testing.assert_array_equal(read, arrays["clip"]["train_0"])


def test_one_backbone_needs_no_name(cache, tmp_path):
    import datasets

    arrays = write_converted(tmp_path, clip_seconds=None)
    for path in (tmp_path / "videos").glob("*.parquet"):
        datasets.Dataset.from_parquet(str(path)).remove_columns("slow_fast").to_parquet(path)
    features = open_features(tmp_path)
    np.testing.assert_array_equal(features["train_2"], arrays["clip"]["train_2"])
    assert features.clip_seconds is None


@pytest.mark.parametrize("place", ["a/qvhighlights", "b/qvhighlights"])
def test_another_folder_of_the_same_name(cache, tmp_path, place):
    """It is not confused with the first one in the cache, wherever it is."""
    write_converted(tmp_path / "a" / "qvhighlights")
    before = open_features(tmp_path / "a" / "qvhighlights", "clip")["test_0"]
    arrays = write_converted(tmp_path / place, scale=3.0)
    after = open_features(tmp_path / place, "clip")["test_0"]
    np.testing.assert_array_equal(after, arrays["clip"]["test_0"])
    assert (after != before).any()


def mapped_files() -> str:
    with open("/proc/self/maps") as file:
        return file.read()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="the system does not list mapped files")
def test_converted_features_are_mapped_not_loaded(cache, tmp_path):
    write_converted(tmp_path, "float32", lengths={"train": [200] * 40}, size=128)  # 8 MB and 4 MB
    open_features(tmp_path, "clip")  # writes the Arrow files
    tracemalloc.start()
    try:
        allocated = pyarrow.total_allocated_bytes()
        features = open_features(tmp_path, "clip")
        array = features["train_39"]
        features["train_0"]
        peak = tracemalloc.get_traced_memory()[1]
        assert pyarrow.total_allocated_bytes() - allocated < 100_000
    finally:
        tracemalloc.stop()
    assert array.shape == (200, 256)
    assert peak < 2_000_000  # two arrays of 205 kB and the cost of opening a folder
    assert f"{cache}/" in mapped_files()
    assert len(pickle.dumps(features)) < 1000


def test_converted_features_in_other_processes(converted, in_another_process):
    features = open_features(converted.path, "clip")
    read = in_another_process(dict, features)
    assert list(read) == list(features)
    for identifier, array in read.items():
        np.testing.assert_array_equal(array, features[identifier])


def test_converted_features_in_workers(converted):
    stores = open_video_features([converted.path])
    text = open_text_features(converted.path, [])
    rows = [{"qid": name, "query": "a plum", "vid": name, "duration": 14.0} for name in text]
    dataset = MomentRetrievalDataset(rows, stores, text, DiffusionVMRProcessor([3, 6], 4))
    loader = DataLoader(dataset, batch_size=3, num_workers=2, collate_fn=list)
    samples = [sample for batch in loader for sample in batch]
    assert [sample["index"] for sample in samples] == list(range(8))
    for sample, alone in zip(samples, map(dataset.__getitem__, range(8))):
        assert sample["covered_duration"] == alone["covered_duration"] == 2 * len(alone["video_features"])
        for name in ("video_features", "text_features"):
            np.testing.assert_array_equal(sample[name], alone[name])


def test_broken_values_in_a_converted_folder(cache, tmp_path):
    write_converted(tmp_path, scale=np.inf, lengths={"train": [3]})
    row = {"qid": 1, "query": "a", "vid": "train_0", "duration": 6, "relevant_windows": [[0, 2]]}
    dataset = MomentRetrievalDataset(
        [row], open_features(tmp_path, "clip"), {1: ARRAY}, DiffusionVMRProcessor([6], text_feature_size=3)
    )
    with pytest.raises(ValueError, match="video train_0, backbone 0: features contain NaN or infinity in row 0"):
        dataset[0]


@pytest.mark.parametrize("split, length", [("train", -100), ("val", 0), ("val", 50), ("test", -1)])
def test_broken_file_in_a_converted_folder(cache, tmp_path, split, length):
    write_converted(tmp_path)
    path = tmp_path / "videos" / f"x-{split}-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        open_features(tmp_path, "clip")


def test_folder_that_is_not_a_converted_one(tmp_path):
    (tmp_path / "videos").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: not a converted folder"):
        open_features(tmp_path)


@pytest.mark.parametrize("there", [["00000-of-00002"], ["00001-of-00002"], ["00000-of-00001", "00000-of-00001-2f"]])
def test_converted_folder_that_lacks_a_file(cache, tmp_path, there):
    """Or has files of two conversions."""
    write_converted(tmp_path, lengths={"train": [3]})
    path = tmp_path / "videos" / "x-train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.unlink()
    for name in there:
        (tmp_path / "videos" / f"x-train-{name}.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        open_features(tmp_path, "clip")


@pytest.mark.parametrize("table, column, opened", [("videos", "vid", "clip"), ("annotations", "qid", "text_features")])
def test_converted_folder_that_lacks_a_column(cache, tmp_path, table, column, opened):
    import datasets

    write_converted(tmp_path)
    for path in (tmp_path / table).glob("*.parquet"):
        datasets.Dataset.from_parquet(str(path)).rename_column(column, "other").to_parquet(path)
    with pytest.raises(ValueError, match=f"{tmp_path}: {table}, .*, needs a column '{column}' and .* '{opened}'"):
        open_features(tmp_path, opened)


def test_converted_folder_without_text_features(cache, tmp_path):
    import datasets

    write_converted(tmp_path)
    for path in (tmp_path / "annotations").glob("*.parquet"):
        datasets.Dataset.from_parquet(str(path)).remove_columns("text_features").to_parquet(path)
    with pytest.raises(ValueError, match=f"{tmp_path}: annotations, .*, needs .* an Array2D 'text_features'"):
        open_features(tmp_path, "text_features")
