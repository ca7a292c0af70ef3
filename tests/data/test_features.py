import io
import json
import os
import pickle
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest

from modeling_diffusionvmr.data import features as features_module
from modeling_diffusionvmr.data.features import (
    common_clip_seconds,
    open_features,
    open_text_features,
    open_video_features,
    write_features,
)
from small_data import ARRAY, GLOVE, write_hdf5


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
    # Official sentence files contain a second array
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
    with pytest.raises(ValueError, match=r"contains both v1\.npz and v1\.npy"):
        open_features(tmp_path)


def test_hdf5_file(tmp_path, in_another_process):
    features = open_features(write_hdf5(tmp_path / "c3d.hdf5", v1=ARRAY, v2=ARRAY + 1))
    assert list(features) == ["v1", "v2"]
    np.testing.assert_array_equal(features["v2"], ARRAY + 1)
    np.testing.assert_array_equal(in_another_process(dict, features)["v1"], ARRAY)
    np.testing.assert_array_equal(open_features(write_hdf5(tmp_path / "text.h5", qid7=ARRAY))[7], ARRAY)


def test_missing_features(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such"):
        open_features(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="contains no features"):
        open_features(tmp_path)
    with pytest.raises(ValueError, match=r"empty\.h5: contains no features"):
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
    """Return an `.npy` file with this header and a few numbers."""
    return b"\x93NUMPY\x01\x00\x76\x00" + header.ljust(117).encode() + b"\n" + bytes(100)


def in_zip(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("features.npy", content)
    return file.getvalue()


def encrypted(content: bytes) -> bytes:
    """Set the bit of a zip file that marks it as encrypted."""
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
        ("v1.npz", as_npz(features=ARRAY[0]), r"must be \(length, size\), got shape \(3,\)"),
        ("v1.npy", as_npy(ARRAY[None]), r"must be \(length, size\), got shape \(1, 4, 3\)"),
        ("v1.npz", as_npz(features=ARRAY[:0]), r"are empty, with shape \(0, 3\)"),
        ("v1.npz", as_npz(features=NAN), "NaN or infinity in row 2"),
        ("v1.npy", as_npy(np.array([[1e300]])), "NaN or infinity in row 0"),
        ("v1.npy", as_npy(np.array([["a"]])), "must be real numbers"),
    ],
)
def test_rejected_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path}, v1: .*{message}"):
        open_features(tmp_path)["v1"]


def test_rejected_data_sets(tmp_path):
    path = write_hdf5(tmp_path / "a.h5", good=ARRAY, nan=NAN, flat=ARRAY[0], empty=ARRAY[:0])
    with h5py.File(path, "a") as file:
        file.create_group("group")["inner"] = ARRAY
    features = open_features(path)
    for identifier, message in [
        ("nan", "NaN or infinity"), ("flat", "shape"), ("empty", "are empty"), ("group", "a group, not a dataset")
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=rf"a\.h5, {identifier}: .*{message}"):
            features[identifier]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"a\.h5"):
        features["good"]


def test_small_files_of_large_arrays(tmp_path, monkeypatch):
    """They are refused before memory is allocated."""
    monkeypatch.setattr(features_module, "EXPANDABLE_BYTES", 10_000)
    monkeypatch.setattr(features_module, "MAX_ARRAY_BYTES", 1_000_000)
    zeros = np.zeros((1, 10_000), np.float32)
    for folder in ("expands", "stored", "npy"):
        (tmp_path / folder).mkdir()
    np.savez_compressed(tmp_path / "expands" / "v.npz", features=zeros)
    np.savez_compressed(tmp_path / "expands" / "small.npz", features=zeros[:, :1000])
    np.savez(tmp_path / "stored" / "v.npz", features=zeros)
    np.save(tmp_path / "npy" / "v.npy", np.zeros((1, 300_000), np.float32))
    with h5py.File(tmp_path / "claims.h5", "w") as file:
        file.create_dataset("v", shape=(10**6, 10**6), dtype="f4", chunks=(1, 1000))  # nothing is stored
    for name, message in (
        ("expands", "an array of 40,128 bytes, of which the file stores"),
        ("npy", "an array of 1,200,128 bytes; the limit is 1,000,000"),
        ("claims.h5", "an array of 4,000,000,000,000 bytes; the limit is 1,000,000"),
    ):
        with pytest.raises(ValueError, match=message):
            open_features(tmp_path / name)["v"]
    assert open_features(tmp_path / "expands")["small"].shape == (1, 1000)
    assert open_features(tmp_path / "stored")["v"].shape == zeros.shape


@pytest.mark.parametrize("kind", ["external link", "virtual", "raw"])
def test_values_in_other_files(tmp_path, kind):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["v"] = ARRAY
    (tmp_path / "secret.raw").write_bytes(ARRAY.astype("f4").tobytes())
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["own"] = ARRAY
        if kind == "external link":
            file["v"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "v")
        elif kind == "virtual":
            layout = h5py.VirtualLayout(ARRAY.shape, "f4")
            layout[...] = h5py.VirtualSource(tmp_path / "secret.h5", "v", ARRAY.shape)
            file.create_virtual_dataset("v", layout)
        else:
            file.create_dataset("v", ARRAY.shape, "f4", external=str(tmp_path / "secret.raw"))
    features = open_features(tmp_path / "features.h5")
    np.testing.assert_array_equal(features["own"], ARRAY)
    with pytest.raises(ValueError, match="another file"):
        features["v"]


def test_named_pipes(tmp_path):
    """Opening one would wait for somebody to write to it."""
    write_features(tmp_path / "clip", "v", ARRAY)
    os.mkfifo(tmp_path / "clip" / "w.npz")
    os.mkfifo(tmp_path / "features.h5")
    assert list(open_features(tmp_path / "clip")) == ["v"]
    with pytest.raises(ValueError, match="neither a file nor a folder of features"):
        open_features(tmp_path / "features.h5")


@pytest.mark.parametrize("damage", [b"TREE", b"HEAP", b"SNOD"])
def test_damaged_hdf5_file(tmp_path, damage):
    path = write_hdf5(tmp_path / "a.h5", v1=ARRAY)
    content = path.read_bytes()
    assert damage in content
    path.write_bytes(content.replace(damage, bytes(4)))
    with pytest.raises(ValueError, match=r"a\.h5"):
        open_features(path)["v1"]


@pytest.mark.parametrize("identifier", ["../v1", "a/b", "", ".hidden"])
def test_rejected_names(tmp_path, identifier):
    with pytest.raises(ValueError, match="cannot be part of a file name"):
        write_features(tmp_path / "clip", identifier, ARRAY)
    assert not list(tmp_path.iterdir())


def test_rejected_arrays(tmp_path):
    with pytest.raises(ValueError, match="clip, v1: features contain NaN"):
        write_features(tmp_path / "clip", "v1", NAN)
    with pytest.raises(ValueError, match="`key` must be"):
        write_features(tmp_path / "clip", "v1", ARRAY, "pooler_output")
    assert not list(tmp_path.iterdir())


# Names with the suffix of a video file


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
    """Neither silently replaces the other."""
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
        '{"clip_seconds": "2"}', '{"clip_seconds": 0}', '{"clip_seconds": -1}', '{"clip_seconds": NaN}', "[2]", "{", "",
        '{"clip_seconds": 1' + 400 * "0" + "}", '{"clip_seconds": true}', "[" * 100_000,
    ],
)  # fmt: skip
def test_rejected_metadata(tmp_path, content):
    write_features(tmp_path, "v1", ARRAY)
    (tmp_path / "features.json").write_text(content)
    wanted = "(`clip_seconds` must be a number above 0|must be a JSON object|not JSON)"
    with pytest.raises(ValueError, match=f"{tmp_path}.*{wanted}") as error:
        open_features(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "seconds", ["two", 0.0, -1, np.nan, np.arange(1, 1000), np.longdouble("1e400"), h5py.Empty("f8")]
)
def test_rejected_attribute(tmp_path, seconds):
    path = write_hdf5(tmp_path / "vgg.h5", v1=ARRAY)
    with h5py.File(path, "a") as file:
        file.attrs["clip_seconds"] = seconds
    with pytest.raises(ValueError, match=r"vgg\.h5: .*clip_seconds") as error:
        open_features(path)
    assert "\n" not in str(error.value)


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


# Converted folders


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
