"""`scripts/measure_export.py`, on two videos."""

import re

import pytest

import measure_export as script


def test_table(traced_before, capsys, monkeypatch):
    monkeypatch.setattr(script, "TIMED_CALLS", 2)
    script.main(script.parse_arguments(["--videos", "2"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    header, _, *rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    assert header[0] == "2 videos" and [row[0] for row in rows] == ["PyTorch", "ONNX", "ONNX, int8"]
    original, exact, small = (dict(zip(header, row)) for row in rows)
    assert original["with other moments"] == exact["with other moments"] == "0"
    assert exact["mAP"] == original["mAP"] and float(exact["median difference (s)"]) < 0.01
    assert abs(float(small["mAP"]) - float(original["mAP"])) < 10
    assert int(original["sentences"]) == 2 * int(original["n"]) > 4
    assert float(small["size (MiB)"]) < float(exact["size (MiB)"]) / 2


def test_differences():
    row = {"pred_relevant_windows": [[1.0, 2.0, 0.9], [3.0, 4.0, 0.8]]}
    other = {"pred_relevant_windows": [[1.0, 2.5, 0.9], [3.0, 4.0, 0.7]]}
    empty = {"pred_relevant_windows": []}
    assert script.difference(row, row) == script.difference(empty, empty) == 0
    assert script.difference(row, other) == 0.5 and script.difference(row, empty) == float("inf")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--videos", "0"], "--videos must be at least 1, got 0"),
        (["--videos", "201"], "--videos must be at most 200, got 201"),
        (["--model", "no/such/model"], "no/such/model: not a local folder or a valid Hub id"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        script.main(script.parse_arguments(options))
