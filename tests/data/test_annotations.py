import json
import warnings

import numpy as np
import pytest
import torch

from modeling_diffusionvmr.data.annotations import check_row, hold_out, load_annotations
from modeling_diffusionvmr.data.files import load_jsonl
from modeling_diffusionvmr.spans import relevant_clips, window_to_span

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
        pytest.param("[" * 100_000, "not JSON", id="deep"),
        ('"a string"', "must be a JSON object"),
        (b'{"qid": "\xff"}', "not JSON"),
        *(({**ROW, field: None}, f"`{field}` is missing") for field in ("qid", "query", "vid", "duration")),
        ({key: value for key, value in ROW.items() if key != "vid"}, "`vid` is missing"),
        ({**ROW, "qid": 1.5}, "`qid` must be a whole number or a string, got 1.5"),
        ({**ROW, "qid": True}, "`qid` must be"),
        ({**ROW, "query": " "}, "`query` must be a string that is not blank"),
        ({**ROW, "query": "a \ud800 dog"}, r"`query` cannot be encoded as UTF-8, because of '\\ud800'"),
        ({**ROW, "vid": "v\udcff"}, r"`vid` cannot be encoded as UTF-8, because of '\\udcff'"),
        ({**ROW, "qid": "q\udcff"}, r"`qid` cannot be encoded as UTF-8, because of '\\udcff'"),
        ({**ROW, "qid": ""}, "`qid` must be a string that is not blank"),
        ({**ROW, "vid": 5}, "`vid` must be a string"),
        ({**ROW, "duration": "20"}, "`duration` must be a number above 0, got '20'"),
        ({**ROW, "duration": True, "relevant_windows": []}, "`duration` must be a number above 0, got True"),
        ({**ROW, "duration": 0}, "`duration` must be a number above 0"),
        ({**ROW, "duration": float("nan")}, "`duration` must be a number above 0"),
        ({**ROW, "duration": 10**30}, "`duration` must be a number above 0"),  # no tensor can hold it
        ({**ROW, "duration": 10**400}, "`duration` must be a number above 0"),  # does not fit a float
        ({**ROW, "relevant_windows": {}}, "must be a list of windows"),
        ({**ROW, "relevant_windows": [2, 6]}, r"must be \[start, end\] in seconds, got 2"),
        ({**ROW, "relevant_windows": [[2, 6, 1]]}, r"must be \[start, end\]"),
        ({**ROW, "relevant_windows": [[2, float("inf")]]}, r"must be \[start, end\]"),
        ({**ROW, "relevant_windows": [[2, 10**400]]}, r"must be \[start, end\]"),
        ({**ROW, "relevant_windows": [[20, 20]]}, "does not end after it starts"),
        ({**ROW, "relevant_windows": [[-1, 6]]}, "starts before the video"),
        ({**ROW, "relevant_windows": [[2, 3], [6, 6]]}, r"\[6, 6\] does not end after it starts"),
        ({**ROW, "relevant_windows": [[20, 25]]}, "starts at or after the end of the video, 20 s"),
        ({**SALIENT, "relevant_clip_ids": [1]}, "lists of the same length"),
        ({**SALIENT, "relevant_clip_ids": None}, "lists of the same length"),
        ({**SALIENT, "relevant_clip_ids": [1, 10]}, "from 0 to 9, got 10"),
        ({**SALIENT, "relevant_clip_ids": [1, 1]}, "contains a clip twice"),
        ({**SALIENT, "saliency_scores": [[4, 3, 2], [1, 2]]}, r"must be 3 numbers.*, got \[1, 2\]"),
        ({**SALIENT, "saliency_scores": [[4, 3, 2], [1, 2, -4]]}, r"got \[1, 2, -4\]"),
        (ROW, r"`qid` 1 was already used \(.*a\.jsonl, line 1\)"),
        ({**ROW, "qid": "1"}, "`qid` '1' was already used"),  # would share a feature file with 1
    ],
)
def test_rejected_rows(tmp_path, row, message):
    path = write(tmp_path / "a.jsonl", ROW)
    if not isinstance(row, bytes):
        row = (row if isinstance(row, str) else json.dumps(row)).encode()
    path.write_bytes(path.read_bytes() + b"\n" + row)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3: .*{message}") as error:
        load_annotations(path)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(" (skip_invalid=True, or --skip_invalid, skips such rows)")


@pytest.mark.parametrize("row", [None, 5, "row", b"row", ["qid"], [("qid", 1)], np.arange(3)], ids=repr)
def test_rows_that_are_not_dicts(row):
    with pytest.raises(ValueError, match="^a row must be a dict of fields, got "):
        check_row(row)


def test_window_that_ends_after_the_video(tmp_path):
    row = {**ROW, "relevant_windows": [[2, 6], [19, 21]]}
    with pytest.warns(UserWarning, match=r"a\.jsonl: 2 rows have windows that end after the video") as caught:
        rows = load_annotations(write(tmp_path / "a.jsonl", row, {**ROW, "qid": 2}, {**row, "qid": 3}))
    assert len(caught) == 1
    assert rows[0]["relevant_windows"] == [[2, 6], [19, 20]]
    assert rows[1]["relevant_windows"] == ROW["relevant_windows"]


def test_rejected_files(tmp_path):
    for name in ("nothing.jsonl", "nothing.txt", "nothing.json", "nothing.csv", "nothing"):
        with pytest.raises(FileNotFoundError) as error:
            load_annotations(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: no such annotation file or folder"
    with pytest.raises(ValueError, match=r"a\.jsonl: contains no rows"):
        load_annotations(write(tmp_path / "a.jsonl"))
    with pytest.raises(
        ValueError, match=r"a\.csv: annotations must be a \.jsonl, \.txt, \.json file or a converted folder"
    ):
        load_annotations(write(tmp_path / "a.csv", ROW))


# Unusable rows


BROKEN = [
    ("{broken", "not JSON"),
    ({**ROW, "qid": 2, "vid": None}, "`vid` is missing"),
    ({**ROW, "qid": 2, "query": "\ud800"}, "`query` cannot be encoded as UTF-8"),
    ({**ROW, "qid": 3, "relevant_windows": [[6, 6]]}, r"\[6, 6\] does not end after it starts"),
    ({**ROW, "qid": 4, "relevant_windows": [[20, 21]]}, "starts at or after the end of the video"),
    ({**ROW, "note": "again"}, r"`qid` 1 was already used \(.*line 1\)"),
]


def test_skip_invalid(tmp_path):
    good = {**ROW, "qid": 4}  # a skipped row does not reserve its qid
    path = write(tmp_path / "a.jsonl", ROW, *(row for row, _ in BROKEN), good)
    with pytest.warns(UserWarning) as caught:
        assert load_annotations(path, skip_invalid=True) == [ROW, good]
    assert len(caught) == 1 and caught[0].filename == __file__
    first, *lines = str(caught[0].message).splitlines()
    assert first == f"{path}: skipped 6 of 8 rows:"
    assert len(lines) == 6
    for number, (line, (_, reason)) in enumerate(zip(lines, BROKEN), start=2):
        assert line.startswith(f"  {path}, line {number}: ") and "--skip_invalid" not in line
        with pytest.raises(ValueError, match=reason):
            raise ValueError(line)


def test_skip_invalid_where_nothing_is(tmp_path):
    path = write(tmp_path / "a.jsonl", ROW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_annotations(path, skip_invalid=True) == [ROW]


def test_skip_invalid_where_all_are(tmp_path):
    path = write(tmp_path / "a.jsonl", BROKEN[0][0])
    with pytest.warns(UserWarning, match="skipped 1 of 1 rows"), pytest.raises(ValueError, match="contains no rows"):
        load_annotations(path, skip_invalid=True)


def test_windows_are_cut_in_rows_that_stay(tmp_path):
    rows = [{**ROW, "qid": qid, "relevant_windows": [[19, 21]]} for qid in (1, 1, 2)]
    with pytest.warns(UserWarning) as caught:
        assert len(load_annotations(write(tmp_path / "a.jsonl", *rows), skip_invalid=True)) == 2
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and "2 rows have windows that end after" in messages[1]


# Charades-STA


@pytest.fixture
def charades(tmp_path):
    """Write an annotation file of Charades-STA, with two CSV files of durations beside it."""

    def make(*lines: str | bytes, name="charades_sta_train.txt"):
        text = 'id,script,length\nAAAAA,"Someone sits,\nand ""waits"".",30.5\n'
        (tmp_path / "Charades_v1_train.csv").write_text(text)
        (tmp_path / "Charades_v1_test.csv").write_text("id,length,script\nB5B5B,10,\n")
        data = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return make


CHARADES_LINES = ["AAAAA 0.0 6.9##someone sits down.", "B5B5B 2 7.25##a ## b, \u00e9."]
CHARADES_ROWS = [
    {"qid": 0, "query": "someone sits down.", "vid": "AAAAA", "duration": 30.5, "relevant_windows": [[0.0, 6.9]]},
    {"qid": 1, "query": "a ## b, \u00e9.", "vid": "B5B5B", "duration": 10.0, "relevant_windows": [[2.0, 7.25]]},
]


def test_charades_rows(charades):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_annotations(charades(*CHARADES_LINES)) == CHARADES_ROWS
        rows = load_annotations(charades(*CHARADES_LINES, name="charades_sta_test.txt"))
    assert rows == [{**row, "qid": 12404 + index} for index, row in enumerate(CHARADES_ROWS)]


@pytest.mark.parametrize("name, first", [("charades_sta_train.txt", 0), ("charades_sta_test.txt", 12404)])
def test_charades_numbers_do_not_count_lines_that_end_before_they_start(charades, name, first):
    one, other = CHARADES_LINES
    path = charades("AAAAA 8.0 7.0##x", one, "", "B5B5B 3.0 2.9##x", "B5B5B 3.0 3.0##x", other, one, name=name)
    with pytest.warns(UserWarning, match="skipped 3 of 6 rows") as caught:
        rows = load_annotations(path, skip_invalid=True)
    assert [row["qid"] for row in rows] == [first, first + 1, first + 2]
    assert [row["vid"] for row in rows] == ["AAAAA", "B5B5B", "AAAAA"]
    for line in (1, 4, 5):
        assert f"{name}, line {line}: the window" in str(caught[0].message)
    with pytest.raises(ValueError, match=rf"{name}, line 1: the window \[8\.0, 7\.0\] does not end after it starts"):
        load_annotations(path)


@pytest.mark.parametrize(
    "line", ["CCCCC 0.0 6.9##in no CSV", "no line", "AAAAA 40 50##beyond the video", "AAAAA 0.0 6.9## "]
)
def test_charades_numbers_count_all_other_lines(charades, line):
    """Otherwise the sentences after it would get the features of their neighbors."""
    path = charades(CHARADES_LINES[0], line, CHARADES_LINES[1])
    with pytest.warns(UserWarning, match="skipped 1 of 3 rows"):
        assert [row["qid"] for row in load_annotations(path, skip_invalid=True)] == [0, 2]


@pytest.mark.parametrize(
    "line, message",
    [
        ("AAAAA 0.0 6.9#someone sits", "a line must be 'vid start end##query', got b'AAAAA 0.0"),
        ("AAAAA 0.0##someone sits", "a line must be"),
        ("AAAAA 0.0 6.9 8.0##someone sits", "a line must be"),
        ("AAAAA zero 6.9##someone sits", "a line must be"),
        (b"AAAAA 0.0 6.9##caf\xe9", "decode"),
        ("AAAAA 0.0 6.9## ", "`query` must be a string that is not blank"),
        ("CCCCC 0.0 6.9##someone sits", r"the duration of video CCCCC is not in Charades_v1_\*\.csv"),
        ("AAAAA nan 6.9##someone sits", r"must be \[start, end\] in seconds"),
        ("AAAAA 0.0 inf##someone sits", r"must be \[start, end\] in seconds"),
        ("AAAAA -1 6.9##someone sits", "starts before the video"),
        ("AAAAA 30.5 40##someone sits", "starts at or after the end of the video, 30.5 s"),
    ],
)
def test_rejected_charades_lines(charades, line, message):
    path = charades(CHARADES_LINES[0], line)
    with pytest.raises(ValueError, match=rf"charades_sta_train\.txt, line 2: .*{message}"):
        load_annotations(path)
    with pytest.warns(UserWarning, match=rf"skipped 1 of 2 rows:\n .*line 2: .*{message}"):
        assert load_annotations(path, skip_invalid=True) == CHARADES_ROWS[:1]


@pytest.mark.parametrize(
    "table, message",
    [
        (b"id,script\nAAAAA,x\n", r"Charades_v1_train\.csv, line 2: needs an `id` and a `length`"),
        (b"id,length\nAAAAA,30.5\nC,long\n", r"Charades_v1_train\.csv, line 3: needs an `id` and a `length`"),
        (b"id,length\nAAAAA\n", r"Charades_v1_train\.csv, line 2: needs"),
        (b"id,length\n\xff,1\n", r"Charades_v1_train\.csv"),
        (b"id,length\n" + b"A" * 200_000 + b",1\n", r"Charades_v1_train\.csv"),
        (b"id,length\nAAAAA,-3\n", r"charades_sta_train\.txt, line 1: `duration` must be a number above 0"),
        (None, r"Charades-STA needs Charades_v1_\*\.csv in this folder"),
    ],
)
def test_rejected_charades_durations(charades, tmp_path, table, message):
    path = charades(CHARADES_LINES[0])
    for file in tmp_path.glob("*.csv"):
        file.unlink()
    if table is not None:
        (tmp_path / "Charades_v1_train.csv").write_bytes(table)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{message}"):
        load_annotations(path)


# TACoS

TACOS = {
    "s1-d2.avi": {
        "timestamps": [[50, 100], [125, 1000]],
        "sentences": ["He peels a plum.", "He eats it."],
        "fps": 25.0,
        "num_frames": 1000,
    },
    "s3-d4.avi": {"timestamps": [[0, 30]], "sentences": ["A pot."], "fps": 10, "num_frames": 305},
}
TACOS_ROWS = [
    ("s1-d2_0", "He peels a plum.", "s1-d2", 40.0, [2.0, 4.0]),
    ("s1-d2_1", "He eats it.", "s1-d2", 40.0, [5.0, 40.0]),
    ("s3-d4_0", "A pot.", "s3-d4", 30.5, [0.0, 3.0]),
]
TACOS_ROWS = [
    {"qid": qid, "query": query, "vid": vid, "duration": duration, "relevant_windows": [window]}
    for qid, query, vid, duration, window in TACOS_ROWS
]


def test_tacos_rows(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_annotations(write(tmp_path / "train.json", TACOS)) == TACOS_ROWS


@pytest.mark.parametrize(
    "video, message",
    [
        *(({name: None}, "s1-d2.avi: a video needs `fps`, `num_frames`") for name in TACOS["s1-d2.avi"]),
        ({"fps": 0}, "s1-d2.avi: `fps` must be a number above 0, got 0"),
        ({"num_frames": 10**400}, "s1-d2.avi: `num_frames` must be a number above 0, got 1000"),
        ({"fps": 10**400}, "s1-d2.avi: `fps` must be a number above 0, got 1000"),
        ({"timestamps": {}}, "s1-d2.avi: `timestamps` and `sentences` must be lists"),
        ({"sentences": "ab"}, "s1-d2.avi: `timestamps` and `sentences` must be lists"),
        ({"sentences": ["He peels a plum."]}, "s1-d2.avi: has 2 `timestamps` for 1 `sentences`"),
    ],
)
def test_rejected_tacos_videos(tmp_path, video, message):
    path = write(tmp_path / "train.json", {**TACOS, "s1-d2.avi": {**TACOS["s1-d2.avi"], **video}})
    with pytest.raises(ValueError, match=rf"train\.json, {message}"):
        load_annotations(path)
    with pytest.warns(UserWarning, match=rf"skipped 1 of 2 rows:\n .*train\.json, {message}"):
        assert load_annotations(path, skip_invalid=True) == TACOS_ROWS[2:]


@pytest.mark.parametrize(
    "sentence, message",
    [
        ({"timestamps": [[50, 100], [200, 200]]}, r"\[8\.0, 8\.0\] does not end after it starts"),
        ({"timestamps": [[50, 100], [1000, 1001]]}, r"starts at or after the end of the video, 40\.0 s"),
        ({"timestamps": [[50, 100], [-1, 1000]]}, "starts before the video"),
        ({"timestamps": [[50, 100], [1, 2, 3]]}, r"must be \[start, end\]"),
        ({"timestamps": [[50, 100], [50, "x"]]}, r"must be \[start, end\] in frames, got \[50, 'x'\]"),
        ({"timestamps": [[50, 100], [50, 10**400]]}, r"each of `timestamps` must be \[start, end\] in frames"),
        ({"timestamps": [[50, 100], 7]}, r"must be \[start, end\] in frames, got 7"),
        ({"sentences": ["He peels a plum.", " "]}, "`query` must be a string that is not blank"),
    ],
)
def test_rejected_tacos_sentences(tmp_path, sentence, message):
    path = write(tmp_path / "train.json", {**TACOS, "s1-d2.avi": {**TACOS["s1-d2.avi"], **sentence}})
    with pytest.raises(ValueError, match=rf"train\.json, s1-d2\.avi, sentence 1: .*{message}"):
        load_annotations(path)
    with pytest.warns(UserWarning, match="skipped 1 of 3 rows"):  # the others keep their qids
        assert load_annotations(path, skip_invalid=True) == [TACOS_ROWS[0], TACOS_ROWS[2]]


def test_tacos_window_that_ends_after_the_video(tmp_path):
    video = {**TACOS["s1-d2.avi"], "timestamps": [[50, 100], [125, 1001]]}
    with pytest.warns(UserWarning, match=r"train\.json: 1 rows have windows that end after the video"):
        assert load_annotations(write(tmp_path / "train.json", {**TACOS, "s1-d2.avi": video})) == TACOS_ROWS


@pytest.mark.parametrize("content", ['{"s1-d2.avi": ', "[]", "", "\0"])
@pytest.mark.parametrize("skip_invalid", [False, True])
def test_tacos_file_that_is_none(tmp_path, content, skip_invalid):
    (tmp_path / "train.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{tmp_path}/train\.json: "):
        load_annotations(tmp_path / "train.json", skip_invalid=skip_invalid)


# A validation split


def rows_of_videos(count):
    return [{**ROW, "qid": f"{video}_{index}", "vid": f"v{video}"} for index in range(3) for video in range(count)]


@pytest.mark.parametrize(
    "count, share, wanted", [(100, 0.05, 5), (10, 0.05, 1), (10, 0.26, 3), (3, 0.5, 2), (2, 0.5, 1)]
)
def test_hold_out_is_a_share_of_videos(count, share, wanted):
    rows = rows_of_videos(count)
    kept, held = hold_out(rows, share)
    assert len({row["vid"] for row in held}) == wanted and len(held) == 3 * wanted
    assert not {row["vid"] for row in kept} & {row["vid"] for row in held}
    for part in (kept, held):  # rows stay in order
        assert part == [row for row in rows if row in part]
    assert len(kept) + len(held) == len(rows)


def test_hold_out_depends_on_the_videos_and_the_seed():
    rows = rows_of_videos(100)
    chosen = {row["vid"] for row in hold_out(rows, 0.05)[1]}
    assert chosen == {row["vid"] for row in hold_out(rows[::-1][:250], 0.05)[1]}  # all videos, fewer rows
    assert chosen != {row["vid"] for row in hold_out(rows, 0.05, seed=1)[1]}
    assert chosen != {f"v{number}" for number in range(5)}


@pytest.mark.parametrize("count, share", [(10, 0.0), (10, 1.0), (10, -0.1), (10, 0.96), (1, 0.5), (0, 0.5), (10, 1.5)])
def test_hold_out_that_leaves_one_side_empty(count, share):
    with pytest.raises(ValueError, match=f"a share of {share} of {count} videos: one side would be empty"):
        hold_out(rows_of_videos(count), share)


# Official files


@pytest.fixture(scope="module")
def official(shared):
    """Load an official file, once, and return its rows and the messages of its warnings."""
    read = {}

    def rows(name):
        if name not in read:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                loaded = load_annotations(shared / "annotations" / name, skip_invalid=True)
            read[name] = loaded, [str(warning.message) for warning in caught]
        return read[name]

    return rows


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


@pytest.mark.parametrize(
    "name, converted, num_skipped, num_cut",
    [
        ("charades_sta/charades_sta_train.txt", "charades_sta/charades_train_release.jsonl", 4, 1802),
        ("charades_sta/charades_sta_test.txt", "charades_sta/charades_test_release.jsonl", 0, 562),
        ("tacos/train.json", "tacos/tacos_train_release.jsonl", 0, 43),
        ("tacos/val.json", "tacos/tacos_val_release.jsonl", 0, 0),
        ("tacos/test.json", "tacos/tacos_test_release.jsonl", 0, 5),
    ],
)
def test_official_files_are_those_in_the_qvhighlights_shape(official, shared, name, converted, num_skipped, num_cut):
    rows, messages = official(name)
    assert rows == load_jsonl(shared / "annotations" / converted)
    assert len(messages) == bool(num_skipped) + bool(num_cut)
    if num_skipped:
        first, *lines = messages[0].splitlines()
        assert f"skipped {num_skipped} of {num_skipped + len(rows)} rows" in first and len(lines) == num_skipped
        assert all("does not end after it starts" in line for line in lines)
        with pytest.raises(ValueError, match=r"line \d+: the window .* does not end after it starts"):
            load_annotations(shared / "annotations" / name)
    if num_cut:
        assert f"{num_cut} rows have windows that end after the video" in messages[-1]


def test_official_videos_are_of_one_split(official):
    """So the features of each video are stored once."""
    for names in (
        ["charades_sta/charades_sta_train.txt", "charades_sta/charades_sta_test.txt"],
        ["tacos/train.json", "tacos/val.json", "tacos/test.json"],
    ):
        videos = [{row["vid"] for row in official(name)[0]} for name in names]
        assert len(set.union(*videos)) == sum(map(len, videos))
    train, val = hold_out(official("charades_sta/charades_sta_train.txt")[0], 0.05)
    videos = len({row["vid"] for row in val}), len({row["vid"] for row in train})
    assert videos[0] == round(0.05 * sum(videos))
    assert 0.04 < len(val) / len(train + val) < 0.06


def test_official_windows_narrower_than_a_part_have_a_clip(official):
    parts, narrow, total = 75, 0, 0
    for name in ("train", "val", "test"):
        rows, _ = official(f"tacos/{name}.json")
        windows = torch.tensor([row["relevant_windows"][0] for row in rows], dtype=torch.float64)
        durations = torch.tensor([row["duration"] for row in rows], dtype=torch.float64)
        spans = window_to_span(windows / durations[:, None])[:, None].float()
        relevant = relevant_clips(
            spans, torch.ones(len(rows), 1, dtype=torch.bool), torch.full((len(rows),), parts), parts
        )
        assert (relevant.sum(1) >= 1).all()
        is_narrow = spans[:, 0, 1] < 1 / parts
        assert (relevant.sum(1)[is_narrow] <= 2).all()
        narrow, total = narrow + int(is_narrow.sum()), total + len(rows)
    assert narrow / total == pytest.approx(0.0862, abs=1e-4)
