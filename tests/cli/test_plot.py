"""`diffusionvmr plot`, and the figure that it draws: predictions beside the truth."""

import json

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.patches import Rectangle, StepPatch
from PIL import Image

from modeling_diffusionvmr.cli import main
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.plotting import SOURCES, TOP_K, TRUE, plot_predictions, prediction_panels, save_figure

ROW = {
    "qid": 7,
    "query": "a red dog",
    "vid": "dogs",
    "duration": 10,
    "relevant_windows": [[0, 2], [6, 10]],
    "relevant_clip_ids": [0, 3, 4],
    "saliency_scores": [[4, 4, 4], [0, 2, 4], [1, 1, 1]],
}
OURS = {
    "qid": 7,
    "query": "a red dog",
    "vid": "dogs",
    "pred_relevant_windows": [[1, 3, 0.2], [6.5, 10, 0.9], [4, 4, 0.1]],
    "pred_saliency_scores": [-1, 0, 0, 3, 1],
}
THEIRS = {**OURS, "qid": "7", "pred_relevant_windows": [[0, 10, 17.5]], "pred_saliency_scores": None}


def bars(axes, color) -> list[tuple]:
    """(start, end, opacity) of each bar of this color, from top to bottom."""
    shown = [bar for bar in axes.patches if isinstance(bar, Rectangle)]
    shown = [bar for bar in shown if bar.get_facecolor()[:3] == matplotlib.colors.to_rgb(color)]
    shown.sort(key=lambda bar: -bar.get_y())
    return [(bar.get_x(), bar.get_x() + bar.get_width(), round(bar.get_facecolor()[3], 3)) for bar in shown]


def lanes(axes) -> dict[str, str]:
    """The labels on the left, from top to bottom, with their colors."""
    labels = sorted(axes.get_yticklabels(), key=lambda label: -label.get_position()[1])
    return {label.get_text(): label.get_color() for label in labels}


def curves(axes) -> list[tuple]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if line.get_linestyle() == "-"]


def test_the_caption_explains_what_is_drawn():
    """An area only if annotators gave scores, curves only if there are some."""
    unlabeled = {name: ROW[name] for name in ("qid", "query", "vid", "duration")}
    for row, prediction, area, curve in (
        (ROW, OURS, True, True),
        (unlabeled, OURS, False, True),
        (unlabeled, THEIRS, False, False),
    ):
        (axes,) = plot_predictions(row, {"ours": prediction}).axes
        caption = axes.get_xlabel()
        assert ("area" in caption, "lines" in caption) == (area, curve)


def test_predictions_beside_the_truth(tmp_path):
    figure = plot_predictions(ROW, {"ours": OURS, "theirs": THEIRS}, top_k=2)
    (axes,) = figure.axes
    assert lanes(axes) == {"saliency": "black", "truth": TRUE, "ours": SOURCES[0], "theirs": SOURCES[1]}
    assert [bar[:2] for bar in bars(axes, TRUE)] == [(0, 2), (6, 10)]
    # The two best by score; the better one is stronger. A score above 1 is as strong as 1
    best, second = bars(axes, SOURCES[0])
    assert best[:2] == (6.5, 10) and second[:2] == (1, 3) and best[2] > second[2]
    assert bars(axes, SOURCES[1]) == [(0, 10, pytest.approx(0.9))]
    assert [text.get_text() for text in axes.texts] == ["0.90", "0.20", "17.50"]
    ((times, heights),) = curves(axes)  # the other source has none
    assert times == [1, 3, 5, 7, 9] and heights == [0, 0.25, 0.25, 1, 0.5]
    (people,) = (patch for patch in axes.patches if isinstance(patch, StepPatch))
    np.testing.assert_allclose(people.get_data().values, [1, 0, 0, 0.5, 0.25])
    np.testing.assert_allclose(people.get_data().edges, [0, 2, 4, 6, 8, 10])
    assert axes.get_xlim() == (0, 10) and axes.get_title("left") == "“a red dog”"
    assert "dogs (qid 7)" in axes.get_xlabel()
    top, bottom = axes.get_ylim()[::-1]
    assert top > 1 and all(bottom < bar.get_y() for bar in axes.patches if isinstance(bar, Rectangle))
    save_figure(figure, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.width > 800 and len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_edges_of_the_truth_reach_down_to_the_predictions():
    (axes,) = plot_predictions(ROW, {"ours": OURS}).axes
    edges = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in edges] == [0, 2, 6, 10]
    lowest = min(bar.get_y() for bar in axes.patches if isinstance(bar, Rectangle))
    assert all(min(line.get_ydata()) <= lowest for line in edges)


def test_unknown_values_are_not_drawn():
    bare = {name: ROW[name] for name in ("qid", "query", "vid", "duration")}
    (axes,) = plot_predictions(bare, {"theirs": THEIRS}).axes
    assert lanes(axes) == {"theirs": SOURCES[0]}
    assert not axes.lines and axes.get_ylim()[1] == 0 and "saliency" not in axes.get_xlabel()
    (axes,) = plot_predictions(bare, {"ours": OURS}, clip_seconds=1.0).axes
    assert lanes(axes) == {"saliency": "black", "ours": SOURCES[0]}
    assert curves(axes)[0][0] == [0.5, 1.5, 2.5, 3.5, 4.5]
    (axes,) = plot_predictions(bare, {"nothing": {"qid": 7, "pred_relevant_windows": []}}).axes
    assert lanes(axes) == {"nothing": SOURCES[0]} and not axes.texts


def test_more_sources_than_colors():
    names = [f"source {index}" for index in range(len(SOURCES) + 1)]
    (axes,) = plot_predictions(ROW, dict.fromkeys(names, OURS)).axes
    assert list(lanes(axes))[2:] == names


def test_panels_of_one_figure():
    panels = prediction_panels(2, 1)
    figures = {plot_predictions(ROW, {"ours": OURS}, axes=axes) for axes in panels}
    assert figures == {panels[0].figure} and panels[0].figure.axes == panels
    assert all(len(bars(axes, TRUE)) == 2 for axes in panels)


@pytest.mark.parametrize(
    "row, prediction, options, message",
    [
        ({}, {"qid": 8}, {}, "ours: the prediction has qid 8, the row has qid 7"),
        ({}, {"pred_relevant_windows": [[1, 2]]}, {}, r"ours: qid 7: .* \[start, end, score\]"),
        ({}, {"pred_relevant_windows": [[3, 2, 1]]}, {}, "ours: qid 7: a predicted window ends before it starts"),
        ({}, {"pred_saliency_scores": ["x"]}, {}, "ours: qid 7: `pred_saliency_scores` must be a list of numbers"),
        ({"relevant_clip_ids": [9, 0, 1]}, {}, {}, "`relevant_clip_ids` must be whole numbers from 0 to 4, got 9"),
        ({}, {}, {"top_k": 0}, "top_k must be a number above 0, got 0"),
        ({}, {}, {"clip_seconds": float("nan")}, "clip_seconds must be a number above 0, got nan"),
    ],
)
def test_rejected(row, prediction, options, message):
    with pytest.raises(ValueError, match=message):
        plot_predictions({**ROW, **row}, {"ours": {**OURS, **prediction}}, **options)


def test_prediction_that_is_not_a_dict():
    with pytest.raises(ValueError, match=r"ours: a prediction must be a dict, got \[7\]"):
        plot_predictions(ROW, {"ours": [7]})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_jsonl([ROW, {**ROW, "qid": "b"}, {**ROW, "qid": 9}], tmp_path / "truth.jsonl")
    save_jsonl([OURS, {**OURS, "qid": "b"}], tmp_path / "ours.jsonl")
    save_jsonl([{**THEIRS, "qid": "b"}, THEIRS], tmp_path / "theirs.jsonl")
    return tmp_path


def argv(*arguments) -> list[str]:
    return ["plot", "--annotations", "truth.jsonl", "--output", "out.png", *arguments]


def test_command(folder, capsys):
    heights = []
    for qids in (["7"], ["7", "b"]):
        main(argv("--predictions", "ours.jsonl", "theirs.jsonl", "--qid", *qids))
        assert capsys.readouterr().out == "saved out.png\n"
        with Image.open(folder / "out.png") as picture:
            heights.append(picture.height)
    assert heights[1] > 1.8 * heights[0]  # one panel per query


def test_default_of_top_k():
    from modeling_diffusionvmr.cli import plot

    assert plot.parse(argv("--predictions", "ours.jsonl", "--qid", "7")[1:]).top_k == TOP_K


def test_any_text_of_a_user(folder):
    text = "$5_ \\frac{ $x_{$ ^ \n to $10"
    save_jsonl([{**ROW, "query": text, "vid": text}], folder / "truth.jsonl")
    (folder / "ours.jsonl").rename("a $b_$.jsonl")
    main(argv("--predictions", "a $b_$.jsonl", "theirs.jsonl", "--names", "$_{$", "\udcff", "--qid", "7"))
    main(argv("--predictions", "a $b_$.jsonl", "--qid", "7"))
    with Image.open(folder / "out.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--predictions", "ours.jsonl", "--qid", "8"], "truth.jsonl: no qid 8"),
        (["--predictions", "ours.jsonl", "--qid", "9"], "ours.jsonl: no qid 9"),
        (["--predictions", "absent.jsonl", "--qid", "7"], "No such file or directory: 'absent.jsonl'"),
        (["--predictions", "folder", "--qid", "7"], "folder"),
        (["--predictions", "ours.jsonl", "--qid", "7", "--annotations", "absent.jsonl"], "absent.jsonl"),
        (["--predictions", "ours.jsonl", "--qid", "7", "--annotations", "folder"], "folder"),
        (["--predictions", "ours.jsonl", "theirs.jsonl", "--names", "one", "--qid", "7"], "1 names for 2 prediction"),
        (["--predictions", "ours.jsonl", "ours.jsonl", "--qid", "7"], "must have different names, got ours, ours"),
        (["--predictions", "twice.jsonl", "--qid", "7"], "twice.jsonl: qid 7: "),
        (["--predictions", "empty.jsonl", "--qid", "7"], "empty.jsonl: "),
        (["--predictions", "broken.jsonl", "--qid", "7"], "broken.jsonl, line 1: not JSON"),
        (["--predictions", "list.jsonl", "--qid", "7"], "list.jsonl, line 1: must be a JSON object"),
        (["--predictions", "bad.jsonl", "--qid", "7"], "bad: qid 7: `pred_relevant_windows` must be"),
        (["--predictions", "ours.jsonl", "--qid", "7", "--top_k", "-99"], "top_k must be a number above 0, got -99"),
        (
            ["--predictions", "ours.jsonl", "--qid", "7", "--top_k", "999999999"],
            "out.png: the figure exceeds",
        ),
        (["--predictions", "ours.jsonl", "--qid", "7", "--clip_seconds", "0"], "clip_seconds must be a number above 0"),
        (
            ["--predictions", "absent.jsonl", "--qid", "7", "--output", "out.doc"],
            "--output out.doc: the extension must be",
        ),
        (["--predictions", "absent.jsonl", "--qid", "7", "--top_k", "0"], "--top_k must be a number above 0, got 0"),
        (
            ["--predictions", "absent.jsonl", "--qid", "7", "--clip_seconds", "nan"],
            "--clip_seconds must be a number abo",
        ),
        (["--predictions", "absent.jsonl", "--qid", "7", "--output", "none/out.png"], "there is no folder none"),
        (["--predictions", "ours.jsonl", "--qid", "7", "--output", "ours.jsonl/out.png"], "ours.jsonl"),
        (["--predictions", "ours.jsonl", "--qid", "7", "--output", "folder"], "folder"),
    ],
)
def test_bad_input(folder, error_of, arguments, message):
    save_jsonl([OURS, THEIRS], folder / "twice.jsonl")
    save_jsonl([{**OURS, "pred_relevant_windows": None}], folder / "bad.jsonl")
    (folder / "broken.jsonl").write_text("{")
    (folder / "list.jsonl").write_text("[7]")
    (folder / "empty.jsonl").touch()
    (folder / "folder").mkdir()
    assert message in error_of(*argv(*arguments))
    assert not list(folder.glob("*out.*"))


def test_bad_input_is_one_line(folder, error_of):
    assert error_of(*argv("--predictions", "ours.jsonl", "--qid", "8")) == "error: truth.jsonl: no qid 8"


def test_official_predictions(shared, tmp_path):
    def rows(name):
        return {row["qid"]: row for row in map(json.loads, open(shared / name))}

    truth = rows("annotations/qvhighlights/highlight_val_release.jsonl")
    predictions = rows("eval/sample_val_preds.jsonl")
    most = max(truth.values(), key=lambda row: len(row["relevant_windows"]))
    longest = max(truth.values(), key=lambda row: len(row["query"]))
    panels = prediction_panels(2, 1)
    for row, axes in zip((most, longest), panels):
        plot_predictions(row, {"Moment-DETR": predictions[row["qid"]]}, axes=axes)
    assert len(bars(panels[0], TRUE)) == len(most["relevant_windows"]) > 20
    assert "\n" in panels[1].get_title("left")  # too long for one line
    save_figure(panels[0].figure, tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").width < 1400  # the title does not widen the picture
