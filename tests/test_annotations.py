import json
import warnings

import pytest

from modeling_diffusionvmr.annotations import load_annotations, load_jsonl, save_jsonl, whole_file

ROW = {"qid": 1, "query": "a dog runs", "vid": "v1", "duration": 20, "relevant_windows": [[2, 6], [8.5, 20]]}
SALIENT = {**ROW, "relevant_clip_ids": [1, 2], "saliency_scores": [[4, 3, 2], [0, 1, 2]]}


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_come_back(tmp_path):
    test_row = {"qid": "b_2", "query": "a cat", "vid": "v1", "duration": 31.5, "note": "kept"}
    rows = [ROW, test_row, {**SALIENT, "qid": 3}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_annotations(write(tmp_path / "a.jsonl", *rows)) == rows
        assert load_annotations(str(write(tmp_path / "a.jsonl", "", *rows, ""))) == rows


@pytest.mark.parametrize(
    "row, message",
    [
        ("{broken", "not JSON"),
        ('"a string"', "must be a JSON object"),
        (b'{"qid": "\xff"}', "not JSON"),
        *(({**ROW, field: None}, f"`{field}` is missing") for field in ("qid", "query", "vid", "duration")),
        ({key: value for key, value in ROW.items() if key != "vid"}, "`vid` is missing"),
        ({**ROW, "qid": 1.5}, "`qid` must be a whole number or a string, got 1.5"),
        ({**ROW, "qid": True}, "`qid` must be"),
        ({**ROW, "query": " "}, "`query` must be a string that is not blank"),
        ({**ROW, "vid": 5}, "`vid` must be a string"),
        ({**ROW, "duration": "20"}, "`duration` must be a positive number of seconds, got '20'"),
        ({**ROW, "duration": 0}, "`duration` must be a positive"),
        ({**ROW, "duration": float("nan")}, "`duration` must be a positive"),
        ({**ROW, "relevant_windows": {}}, "must be a list of windows"),
        ({**ROW, "relevant_windows": [2, 6]}, r"must be \[start, end\] in seconds, got 2"),
        ({**ROW, "relevant_windows": [[2, 6, 1]]}, r"must be \[start, end\]"),
        ({**ROW, "relevant_windows": [[2, float("inf")]]}, r"must be \[start, end\]"),
        ({**ROW, "relevant_windows": [[-1, 6]]}, "starts before the video"),
        ({**ROW, "relevant_windows": [[2, 3], [6, 6]]}, r"\[6, 6\] does not end after it starts"),
        ({**ROW, "relevant_windows": [[20, 25]]}, "starts at or after the end of the video, 20 s"),
        ({**SALIENT, "relevant_clip_ids": [1]}, "lists of the same length"),
        ({**SALIENT, "relevant_clip_ids": None}, "lists of the same length"),
        ({**SALIENT, "relevant_clip_ids": [1, 10]}, "from 0 to 9, got 10"),
        ({**SALIENT, "relevant_clip_ids": [1, 1]}, "names a clip twice"),
        ({**SALIENT, "saliency_scores": [[4, 3, 2], [1, 2]]}, r"must be 3 numbers, got \[1, 2\]"),
        (ROW, r"`qid` 1 was used before \(.*a\.jsonl, line 1\)"),
        ({**ROW, "qid": "1"}, "`qid` '1' was used before"),  # both would have the same feature file
    ],
)
def test_refused_rows(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", ROW)
    if not isinstance(row, bytes):
        row = (row if isinstance(row, str) else json.dumps(row)).encode()
    path.write_bytes(path.read_bytes() + b"\n" + row)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: .*{message}") as error:
        load_annotations(path)
    assert "\n" not in str(error.value)


def test_window_that_ends_after_the_video(tmp_path):
    row = {**ROW, "relevant_windows": [[2, 6], [19, 21]]}
    with pytest.warns(UserWarning, match=r"a\.jsonl: windows of 2 rows end after their video") as caught:
        rows = load_annotations(write(tmp_path / "a.jsonl", row, {**ROW, "qid": 2}, {**row, "qid": 3}))
    assert len(caught) == 1
    assert rows[0]["relevant_windows"] == [[2, 6], [19, 20]]
    assert rows[1]["relevant_windows"] == ROW["relevant_windows"]


def test_refused_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl"):
        load_annotations(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl: there are no rows"):
        load_annotations(write(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match=r"a\.csv: annotations are read from \.jsonl"):
        load_annotations(write(tmp_path / "a.csv", ROW))


def test_saved_rows(tmp_path):
    path = tmp_path / "new" / "predictions.jsonl"
    save_jsonl([ROW, {"qid": "ä"}], path)
    assert load_jsonl(path) == [ROW, {"qid": "ä"}]


def test_nothing_half_written(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    with pytest.raises(ValueError):
        save_jsonl([SALIENT, {"score": float("nan")}], path)
    assert load_jsonl(path) == [ROW]
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() != "half"
        raise RuntimeError
    assert load_jsonl(path) == [ROW]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name, count",
    [
        ("qvhighlights/highlight_train_release", 7218),
        ("qvhighlights/highlight_val_release", 1550),
        ("qvhighlights/highlight_test_release", 1542),
        ("qvhighlights/highlight_test_with_gt", 1542),
        ("charades_sta/charades_train_release", 12404),
        ("charades_sta/charades_test_release", 3720),
        ("tacos/tacos_train_release", 9790),
        ("tacos/tacos_val_release", 4436),
        ("tacos/tacos_test_release", 4001),
    ],
)
def test_official_files(shared, name, count):
    path = shared / "annotations" / f"{name}.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = load_annotations(path)
    assert len(rows) == count
    assert rows == [json.loads(line) for line in open(path)]
