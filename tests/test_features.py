import io
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import h5py
import numpy as np
import pytest

from modeling_diffusionvmr.features import open_features, write_features

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


def read_in_another_process(features):
    return features["v1"]


def test_hdf5_file(tmp_path):
    features = open_features(write_hdf5(tmp_path / "c3d.hdf5", v1=ARRAY, v2=ARRAY + 1))
    assert list(features) == ["v1", "v2"]
    np.testing.assert_array_equal(features["v2"], ARRAY + 1)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        np.testing.assert_array_equal(pool.submit(read_in_another_process, features).result(), ARRAY)
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
