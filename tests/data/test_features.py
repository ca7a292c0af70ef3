import io
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import h5py
import numpy as np
import pyarrow
import pytest
from torch.utils.data import DataLoader

from modeling_diffusionvmr import DiffusionVMRProcessor, MomentRetrievalDataset
from modeling_diffusionvmr.data.features import (
    GloveFeatures,
    common_clip_seconds,
    open_features,
    open_text_features,
    open_video_features,
    write_features,
)

ARRAY = np.arange(12, dtype=np.float32).reshape(4, 3)


def write_hdf5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
    return path


def test_official_layout(tmp_path):
    write_features(tmp_path / "clip", "v_1.5", ARRAY)
    write_features(tmp_path / "clip", "qid_of_nobody", ARRAY + 1)
    video = open_features(tmp_path / "clip")
    np.testing.assert_array_equal(video["v_1.5"], ARRAY)
    assert list(video) == ["qid_of_nobody", "v_1.5"] and len(video) == 2 and "v_1.5" in video and "v_1" not in video
    with np.load(tmp_path / "clip" / "v_1.5.npz") as file:
        assert file.files == ["features"]

    for qid in (7, "a_8"):
        assert write_features(tmp_path / "text", qid, ARRAY, "last_hidden_state").name == f"qid{qid}.npz"
    text = open_features(str(tmp_path / "text"))
    np.testing.assert_array_equal(text[7], ARRAY)
    np.testing.assert_array_equal(text["7"], text["a_8"])
    assert list(text) == ["7", "a_8"] and 7 in text
    # The official files of sentences hold a second array
    np.savez(tmp_path / "text" / "qid9.npz", last_hidden_state=ARRAY, pooler_output=ARRAY[0])
    np.testing.assert_array_equal(open_features(tmp_path / "text")[9], ARRAY)


def test_npy_folder(tmp_path):
    np.save(tmp_path / "v1.npy", ARRAY.astype(np.float16))
    (tmp_path / "README.md").touch()
    features = open_features(tmp_path)
    assert list(features) == ["v1"]
    assert features["v1"].dtype == np.float32
    np.testing.assert_array_equal(features["v1"], ARRAY)
    np.savez(tmp_path / "v1.npz", features=ARRAY)
    with pytest.raises(ValueError, match=r"has both v1\.npz and v1\.npy"):
        open_features(tmp_path)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where `datasets` keeps its Arrow files, here and in processes that are started."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def in_another_process(cache):
    """Calls a function there, in a process that was not forked."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda *call: pool.submit(*call).result()


def test_hdf5_file(tmp_path, in_another_process):
    features = open_features(write_hdf5(tmp_path / "c3d.hdf5", v1=ARRAY, v2=ARRAY + 1))
    assert list(features) == ["v1", "v2"]
    np.testing.assert_array_equal(features["v2"], ARRAY + 1)
    np.testing.assert_array_equal(in_another_process(dict, features)["v1"], ARRAY)
    np.testing.assert_array_equal(open_features(write_hdf5(tmp_path / "text.h5", qid7=ARRAY))[7], ARRAY)


def test_missing_features(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such"):
        open_features(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no features"):
        open_features(tmp_path)
    with pytest.raises(ValueError, match=r"empty\.h5: holds no features"):
        open_features(write_hdf5(tmp_path / "empty.h5"))
    write_features(tmp_path / "clip", "v1", ARRAY)
    features = open_features(tmp_path / "clip")
    with pytest.raises(KeyError, match="clip: no features of v2"):
        features["v2"]
    (tmp_path / "clip" / "v1.npz").unlink()
    with pytest.raises(ValueError, match="clip, v1: cannot be read .*No such file"):
        features["v1"]
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"notes\.txt: neither a folder of features nor an HDF5 file"):
        open_features(tmp_path / "notes.txt")


def as_npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def as_npy(array, **kwargs) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


def with_header(header: str) -> bytes:
    """An `.npy` file of this header, and of a few numbers."""
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117).encode() + b"\n" + bytes(100)


def in_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("features.npy", content)
    return file.getvalue()


def encrypted(content: bytes) -> bytes:
    """A zip file with the bit that says so."""
    content = bytearray(content)
    content[content.rfind(b"PK\1\2") + 8] |= 1
    return bytes(content)


HUGE = with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 200), }")
OPEN = with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2")
NAN = np.where(ARRAY == 7, np.nan, ARRAY)
NOISE = np.random.default_rng(0).random((50, 30))
FLIPPED = bytearray(as_npz(features=NOISE))
FLIPPED[len(FLIPPED) // 2] ^= 255


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("v1.npz", b"", "cannot be read"),
        ("v1.npy", b"", "cannot be read"),
        ("v1.npz", as_npz(features=NOISE)[:3000], "cannot be read"),
        ("v1.npz", bytes(FLIPPED), "cannot be read"),
        ("v1.npy", as_npy(NOISE)[:3000], "cannot be read"),
        ("v1.npz", b"no array at all", "cannot be read"),
        pytest.param("v1.npy", OPEN, "cannot be read", id="a header that does not end"),
        pytest.param("v1.npz", in_zip(OPEN), "cannot be read", id="a header that does not end, in npz"),
        pytest.param("v1.npy", HUGE, "cannot be read", id="more than memory holds"),
        pytest.param("v1.npz", in_zip(HUGE), "cannot be read", id="more than memory holds, in npz"),
        pytest.param("v1.npz", encrypted(as_npz(features=ARRAY)), "cannot be read", id="encrypted"),
        ("v1.npz", pickle.dumps(ARRAY), "cannot be read .*pickle"),
        ("v1.npy", pickle.dumps(ARRAY), "cannot be read .*pickle"),
        ("v1.npy", as_npy(np.array([[None]], object), allow_pickle=True), "cannot be read .*allow_pickle"),
        ("v1.npz", as_npz(features=np.array([[None]], object)), "cannot be read .*allow_pickle"),
        ("v1.npz", as_npz(other=ARRAY), r"needs an array `features` or `last_hidden_state`, has \['other'\]"),
        ("v1.npz", as_npz(features=ARRAY[0]), r"must be \(length, size\), got the shape \(3,\)"),
        ("v1.npy", as_npy(ARRAY[None]), r"must be \(length, size\), got the shape \(1, 4, 3\)"),
        ("v1.npz", as_npz(features=ARRAY[:0]), r"are empty, of the shape \(0, 3\)"),
        ("v1.npz", as_npz(features=NAN), "NaN or infinity in row 2"),
        ("v1.npy", as_npy(np.array([[1e300]])), "NaN or infinity in row 0"),
        ("v1.npy", as_npy(np.array([["a"]])), "must be real numbers"),
    ],
)
def test_refused_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}, v1: .*{message}"):
        open_features(tmp_path)["v1"]


def test_refused_data_sets(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", good=ARRAY, nan=NAN, flat=ARRAY[0], empty=ARRAY[:0])
    with h5py.File(path, "a") as file:
        file.create_group("group")["inner"] = ARRAY
    features = open_features(path)
    for identifier, message in [
        ("nan", "NaN or infinity"), ("flat", "shape"), ("empty", "are empty"), ("group", "a group, not a data set")
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"a\.h5, {identifier}: .*{message}"):
            features[identifier]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"a\.h5"):
        features["good"]


@pytest.mark.parametrize("damage", [b"TREE", b"HEAP", b"SNOD"])
def test_damaged_hdf5_file(tmp_path, damage):
    path = write_hdf5(tmp_path / "a.h5", v1=ARRAY)
    content = path.read_bytes()
    assert damage in content
    path.write_bytes(content.replace(damage, bytes(4)))
    with pytest.raises(ValueError, match=r"a\.h5"):
        open_features(path)["v1"]


@pytest.mark.parametrize("identifier", ["../v1", "a/b", "", ".hidden"])
def test_refused_names(tmp_path, identifier):
    with pytest.raises(ValueError, match="cannot be the name of a file"):
        write_features(tmp_path / "clip", identifier, ARRAY)
    assert not list(tmp_path.iterdir())


def test_refused_arrays(tmp_path):
    with pytest.raises(ValueError, match="clip, v1: features have NaN"):
        write_features(tmp_path / "clip", "v1", NAN)
    with pytest.raises(ValueError, match="`key` must be"):
        write_features(tmp_path / "clip", "v1", ARRAY, "pooler_output")
    assert not list(tmp_path.iterdir())


def test_nothing_half_written(tmp_path, monkeypatch):
    path = write_features(tmp_path, "v1", ARRAY)

    def interrupted(file, **arrays):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_features(tmp_path, "v1", ARRAY + 1)
    np.testing.assert_array_equal(open_features(tmp_path)["v1"], ARRAY)
    assert list(tmp_path.iterdir()) == [path]


# Names of files that have a suffix of their own


def test_names_of_videos_with_their_suffix(tmp_path):
    path = write_hdf5(tmp_path / "c3d.hdf5", **{"s13-d21.avi": ARRAY, "s1.5.2": ARRAY + 1})
    features = open_features(path)
    assert sorted(features) == ["s1.5.2", "s13-d21"] and "s13-d21" in features
    np.testing.assert_array_equal(features["s13-d21"], ARRAY)
    np.testing.assert_array_equal(features["s1.5.2"], ARRAY + 1)
    (tmp_path / "vgg").mkdir()
    np.save(tmp_path / "vgg" / "AO8RW.mp4.npy", ARRAY)
    np.testing.assert_array_equal(open_features(tmp_path / "vgg")["AO8RW"], ARRAY)


@pytest.mark.parametrize("identifier", ["v1.mp4", "s13-d21.avi", "qid7", "7.5"])
def test_what_is_written_is_read_by_the_same_id(tmp_path, identifier):
    write_features(tmp_path, identifier, ARRAY)
    write_features(tmp_path, "another", ARRAY + 1)
    features = open_features(tmp_path)
    assert identifier in features
    np.testing.assert_array_equal(features[identifier], ARRAY)


def test_names_that_differ_by_the_suffix_alone(tmp_path):
    """Neither is silently taken for the other."""
    write_features(tmp_path / "clip", "v1", ARRAY)
    write_features(tmp_path / "clip", "v1.avi", ARRAY + 1)
    path = write_hdf5(tmp_path / "c3d.hdf5", **{"v1.avi": ARRAY, "v1.mp4": ARRAY + 1})
    for place in (tmp_path / "clip", path):
        with pytest.raises(ValueError, match=f"{place}: .*v1"):
            open_features(place)


# The length of a clip


def test_clip_seconds(tmp_path):
    write_features(tmp_path / "clip", "v1", ARRAY)
    assert open_features(tmp_path / "clip").clip_seconds is None
    (tmp_path / "clip" / "features.json").write_text('{"backbone": "clip", "clip_seconds": 0.5}')
    features = open_features(tmp_path / "clip")
    assert features.clip_seconds == 0.5 and list(features) == ["v1"]
    (tmp_path / "clip" / "features.json").write_text("{}")
    assert open_features(tmp_path / "clip").clip_seconds is None

    path = write_hdf5(tmp_path / "vgg.h5", v1=ARRAY)
    assert open_features(path).clip_seconds is None
    with h5py.File(path, "a") as file:
        file.attrs["clip_seconds"] = np.float32(0.25)
    assert open_features(path).clip_seconds == 0.25


@pytest.mark.parametrize(
    "content",
    [
        '{"clip_seconds": "2"}', '{"clip_seconds": 0}', '{"clip_seconds": -1}', '{"clip_seconds": NaN}', "[2]", "{", ""
    ],
)  # fmt: skip
def test_refused_metadata(tmp_path, content):
    write_features(tmp_path, "v1", ARRAY)
    (tmp_path / "features.json").write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}.*(clip_seconds|must be a JSON object)"):
        open_features(tmp_path)


@pytest.mark.parametrize("seconds", ["two", 0.0, -1, np.nan, np.array([1.0, 2.0])])
def test_refused_attribute(tmp_path, seconds):
    path = write_hdf5(tmp_path / "vgg.h5", v1=ARRAY)
    with h5py.File(path, "a") as file:
        file.attrs["clip_seconds"] = seconds
    with pytest.raises(ValueError, match=r"vgg\.h5: .*clip_seconds"):
        open_features(path)


def test_common_clip_seconds(tmp_path):
    stores = []
    for name, seconds in (("a", 2), ("b", None), ("c", 2.0), ("d", 1.5)):
        write_features(tmp_path / name, "v1", ARRAY)
        if seconds is not None:
            (tmp_path / name / "features.json").write_text(json.dumps({"clip_seconds": seconds}))
        stores.append(open_features(tmp_path / name))
    assert common_clip_seconds([]) is None and common_clip_seconds([stores[1], {"v1": ARRAY}]) is None
    assert common_clip_seconds([{"v1": ARRAY}, *stores[:3]]) == 2
    with pytest.raises(ValueError, match=rf"same length, got 2 s in {tmp_path}/a, 1\.5 s in {tmp_path}/d"):
        common_clip_seconds([stores[0], stores[1], stores[3]])


# Word vectors

GLOVE = "the 1 0\nplum 0.5 -2\nbag 3 4\nbag. 7 7\n- 8 9\n"
QUERIES = [
    {"qid": 7, "query": "The plum, the  PLUM"},
    {"qid": "b_1", "query": "(bag) bag. -"},
    {"qid": 9, "query": "zyx's ... plum"},
]
KNOWN = QUERIES[:2]


@pytest.fixture
def glove(tmp_path):
    def make(text=GLOVE):
        path = tmp_path / "glove.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make


def test_word_vectors(glove):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        features = open_text_features(glove(), KNOWN)
    assert features[7].dtype == np.float32
    np.testing.assert_array_equal(features[7], [[1, 0], [0.5, -2], [1, 0], [0.5, -2]])
    np.testing.assert_array_equal(features["b_1"], [[3, 4], [7, 7], [8, 9]])  # as written, where that is a word
    np.testing.assert_array_equal(features["7"], features[7])
    assert list(features) == ["7", "b_1"] and len(features) == 2 and 7 in features and "b_1" in features
    assert 9 not in features
    with pytest.raises(KeyError, match=r"glove\.txt: qid 9 is not of the rows"):
        features[9]
    other = pickle.loads(pickle.dumps(features))
    np.testing.assert_array_equal(other[7], features[7])


def test_unknown_words_are_zeros_and_counted(glove):
    with pytest.warns(UserWarning, match=r"glove\.txt: 2 of 8 words are unknown, .* zeros: \.\.\., zyx's$") as caught:
        features = GloveFeatures(glove(), QUERIES)
    assert len(caught) == 1
    np.testing.assert_array_equal(features[9], [[0, 0], [0, 0], [0.5, -2]])
    np.testing.assert_array_equal(features["b_1"], [[3, 4], [7, 7], [8, 9]])
    many = [{"qid": 1, "query": "plum " + " ".join(f"w{number:02}" for number in range(30))}]
    with pytest.warns(UserWarning, match=r"30 of 31 words .*: w00, w01, .*, w09, \.\.\.$"):
        assert GloveFeatures(glove(), many)[1].shape == (31, 2)


def test_words_that_have_spaces(glove):
    """As some in glove.840B.300d.txt, which begin like other words."""
    text = ", 5 5\nat 1 2\nat name@domain.com 3 4\n. . . 9 9\nplum 0.5 -2\n"
    features = open_text_features(glove(text), [{"qid": 1, "query": "at plum"}])
    np.testing.assert_array_equal(features[1], [[1, 2], [0.5, -2]])


@pytest.mark.parametrize(
    "text, message",
    [
        (GLOVE + "zyx's 1\n", "line 6: must be a word and 2 numbers"),
        (GLOVE + "zyx's 1 two\n", "line 6: must be a word and 2 numbers"),
        (GLOVE + "zyx's 1 nan\n", "line 6: must be a word and 2 numbers"),
        (GLOVE + "zyx's 1e39 1\n", "line 6: must be a word and 2 numbers"),
        ("the\n" + GLOVE, "line 1: must be a word and its numbers"),
        (b"a 1 2\n\xff\xfe 1 2\n", ""),
        ("", "has a vector for none of"),
        ("other 1 2\n", "has a vector for none of"),
    ],
)
def test_refused_word_vectors(glove, text, message):
    path = glove(text)
    with pytest.raises(ValueError, match=rf"glove\.txt.*{message}"):
        open_text_features(path, QUERIES)


def test_lines_of_other_words_are_not_read(glove):
    assert open_text_features(glove(GLOVE + "other 1\n"), KNOWN)[7].shape == (4, 2)
    with pytest.raises(FileNotFoundError, match=r"absent\.txt"):
        open_text_features(glove().with_name("absent.txt"), KNOWN)


# Converted folders

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
    A converted folder, by hand, in row groups of two rows, with the backbones `slow_fast` and `clip` (twice as wide).
    Returns its arrays by column and id, as they were written.
    """
    import datasets

    random = np.random.default_rng(0)
    arrays = {"slow_fast": {}, "clip": {}, "text_features": {}}
    sizes = {"slow_fast": size, "clip": 2 * size, "text_features": 4}
    files = {"annotations": "", "videos": ""}
    for split, counts in lengths.items():
        vids = [f"{split}_{index}" for index in range(len(counts))]
        for column, width in sizes.items():
            for vid, length in zip(vids, counts):
                arrays[column][vid] = (scale * random.normal(size=(length, width))).astype(dtype)
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


@pytest.fixture(scope="module")
def converted(cache, tmp_path_factory):
    """A converted folder and its arrays. Nothing may write there."""
    folder = tmp_path_factory.mktemp("converted")
    return SimpleNamespace(path=folder, arrays=write_converted(folder))


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


def test_columns_of_a_converted_folder(converted, tmp_path):
    with pytest.raises(ValueError, match="`column` must be one of slow_fast, clip, text_features, got None"):
        open_features(converted.path)
    with pytest.raises(ValueError, match="`column` must be one of slow_fast, clip, text_features, got 'vid'"):
        open_features(converted.path, "vid")
    write_features(tmp_path / "clip", "v1", ARRAY)
    with pytest.raises(ValueError, match="clip: only a converted folder has columns, got 'clip'"):
        open_features(tmp_path / "clip", "clip")


def test_all_features_of_paths(converted, tmp_path, glove):
    write_features(tmp_path / "c3d", "val_0", ARRAY)
    stores = open_video_features([str(tmp_path / "c3d"), converted.path])
    assert [store["val_0"].shape for store in stores] == [(4, 3), (2, 3), (2, 6)]
    assert [store.clip_seconds for store in stores] == [None, 2, 2]
    assert open_video_features([]) == []

    rows = [{"qid": "val_0", "query": "the plum"}]
    np.testing.assert_array_equal(
        open_text_features(converted.path, rows)["val_0"], converted.arrays["text_features"]["val_0"]
    )
    write_features(tmp_path / "text", "val_0", ARRAY, "last_hidden_state")
    np.testing.assert_array_equal(open_text_features(tmp_path / "text", rows)["val_0"], ARRAY)
    path = write_hdf5(tmp_path / "text.h5", qidval_0=ARRAY + 1)
    np.testing.assert_array_equal(open_text_features(str(path), rows)["val_0"], ARRAY + 1)
    np.testing.assert_array_equal(open_text_features(glove(), rows)["val_0"], [[1, 0], [0.5, -2]])
    for open_them in (open_video_features, lambda paths: open_text_features(paths[0], rows)):
        with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
            open_them([tmp_path / "nowhere"])


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
    """The Arrow files of the first one, here or elsewhere, are not taken for it."""
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
    write_converted(tmp_path, "float32", lengths={"train": [200] * 40}, size=128)  # 8 MB, and 4 MB
    open_features(tmp_path, "clip")  # makes the Arrow files
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
    assert peak < 2_000_000  # arrays of 205 kB, and what a folder costs to open
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
    assert [sample["row"] for sample in samples] == list(range(8))
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
    with pytest.raises(ValueError, match="video train_0, backbone 0: features have NaN or infinity in row 0"):
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
    with pytest.raises(ValueError, match=f"{tmp_path}: is no converted folder"):
        open_features(tmp_path)


@pytest.mark.parametrize("there", [["00000-of-00002"], ["00001-of-00002"], ["00000-of-00001", "00000-of-00001-2f"]])
def test_converted_folder_that_lacks_a_file(cache, tmp_path, there):
    """Or has one twice, from two conversions."""
    write_converted(tmp_path, lengths={"train": [3]})
    path = tmp_path / "videos" / "x-train-00000-of-00001.parquet"
    content = path.read_bytes()
    path.unlink()
    for name in there:
        (tmp_path / "videos" / f"x-train-{name}.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        open_features(tmp_path, "clip")


WITHOUT_DATASETS = """
import sys
sys.modules["datasets"] = None  # importing it fails
from modeling_diffusionvmr import DiffusionVMRProcessor, MomentRetrievalDataset, load_annotations
from modeling_diffusionvmr.data.features import open_text_features, open_video_features
stores = open_video_features(["npz", "npy", "video.h5"])
rows = load_annotations("rows.jsonl")
for place in ("text", "text.h5", "glove.txt"):
    text = open_text_features(place, rows)
    processor = DiffusionVMRProcessor([3, 3, 3], text["q"].shape[1])
    print(tuple(MomentRetrievalDataset(rows, stores, text, processor)[0]["text_features"].shape))
"""


def test_files_are_read_without_datasets(tmp_path):
    write_features(tmp_path / "npz", "v1", ARRAY)
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "v1.npy", ARRAY)
    write_hdf5(tmp_path / "video.h5", v1=ARRAY)
    write_features(tmp_path / "text", "q", ARRAY, "last_hidden_state")
    write_hdf5(tmp_path / "text.h5", qidq=ARRAY)
    (tmp_path / "glove.txt").write_text(GLOVE)
    row = {"qid": "q", "query": "the plum", "vid": "v1", "duration": 8, "relevant_windows": [[2, 4]]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    command = [sys.executable, "-c", WITHOUT_DATASETS]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["(4, 3)", "(4, 3)", "(2, 2)"]
