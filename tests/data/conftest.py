"""Fixtures for the tests of data."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import pytest

from small_data import GLOVE, write_converted


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Give `datasets` a temporary cache, in this process and in those that it starts."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def in_another_process(cache):
    """Call a function in another process, one that was not forked."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        yield lambda *call: pool.submit(*call).result()


@pytest.fixture(scope="module")
def converted(cache, tmp_path_factory):
    """A converted folder and its arrays, read-only by agreement."""
    folder = tmp_path_factory.mktemp("converted")
    return SimpleNamespace(path=folder, arrays=write_converted(folder))


@pytest.fixture
def glove(tmp_path):
    def make(text=GLOVE):
        path = tmp_path / "glove.txt"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return make
