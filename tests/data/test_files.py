import json

import pytest

from modeling_diffusionvmr.data.files import atomic_write, load_jsonl, save_jsonl

ROW = {"qid": 1, "query": "a dog runs", "vid": "v1", "duration": 20, "relevant_windows": [[2, 6], [8.5, 20]]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_saved_rows(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    save_jsonl([ROW, {"qid": "ä"}], path)
    assert load_jsonl(path) == [ROW, {"qid": "ä"}]


def test_nothing_half_written(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    with pytest.raises(ValueError):
        save_jsonl([{**ROW, "qid": 2}, {"score": float("nan")}], path)
    assert load_jsonl(path) == [ROW]
    with pytest.raises(RuntimeError), atomic_write(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() != "half"
        raise RuntimeError
    assert load_jsonl(path) == [ROW]
    assert list(tmp_path.iterdir()) == [path]
