import json
import os
from pathlib import Path

import numpy as np
import pytest

from modeling_diffusionvmr.training.metrics import evaluate_predictions, scorable
from modeling_diffusionvmr.training.rejection_metrics import set_iou


def pair(qid, windows, true_windows):
    return {"qid": qid, "pred_relevant_windows": windows}, {"qid": qid, "relevant_windows": true_windows}


def evaluate_pairs(*pairs):
    return evaluate_predictions([prediction for prediction, _ in pairs], [reference for _, reference in pairs])


def salient_pair(qid, predicted, clips, scores, duration=8):
    prediction, reference = pair(qid, [[0, 4, 1]], [[0, 4]])
    reference |= {"duration": duration, "relevant_clip_ids": clips, "saliency_scores": scores}
    return {**prediction, "pred_saliency_scores": predicted}, reference


def naive_average_precision(windows, true_windows, threshold):
    """One query, one threshold, in plain Python: the definition."""
    windows = sorted(windows[:10], key=lambda window: -window[2])
    free, hits = list(true_windows), []
    for start, end, _ in windows:
        best, best_iou = None, threshold
        for true in free:
            overlap = max(0, min(end, true[1]) - max(start, true[0]))
            iou = overlap / (end - start + true[1] - true[0] - overlap)
            if iou >= best_iou:
                best, best_iou = true, iou
        if best is not None:
            free.remove(best)
        hits.append(best is not None)
    precisions = [sum(hits[: rank + 1]) / (rank + 1) for rank in range(len(hits))]
    return sum(max(precisions[rank:]) for rank, hit in enumerate(hits) if hit) / len(true_windows)


def random_pairs(seed, count):
    rng = np.random.default_rng(seed)

    def windows(most, least=1):
        windows = np.sort(rng.choice(76, (rng.integers(least, most + 1), 2)) * 2.0, axis=1)
        return windows[windows[:, 0] < windows[:, 1]].tolist()

    for qid in range(count):
        scored = [[*window, rng.integers(5) / 4] for window in windows(14, 0)]
        yield pair(qid, scored, windows(6) or [[0, 2]])


def test_random_windows_against_the_definition():
    pairs = list(random_pairs(0, 200))
    result = evaluate_pairs(*pairs)
    for name, (above, up_to) in {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": (0, 150)}.items():
        precisions = {threshold: [] for threshold in result[name]["MR-mAP"] if threshold != "average"}
        for prediction, reference in pairs:
            true = [window for window in reference["relevant_windows"] if above < window[1] - window[0] <= up_to]
            for threshold, values in precisions.items():
                if true:
                    found = prediction["pred_relevant_windows"]
                    values.append(100 * naive_average_precision(found, true, float(threshold)))
        means = {threshold: np.mean(values) for threshold, values in precisions.items()}
        assert result[name]["MR-mAP"] == pytest.approx({**means, "average": np.mean(list(means.values()))}, abs=0.0051)


def test_windows_by_hand():
    result = evaluate_pairs(
        # The first window counts for R1, not the one of the highest score; IoU 0.7 counts at 0.7
        pair("a", [[0, 7, 0.1], [0, 10, 0.9]], [[0, 10]]),
        pair("b", [[20, 40, 0.5], [0, 2, 0.4]], [[0, 2], [20, 40]]),
    )
    assert result["full"]["MR-R1"] == {
        **dict.fromkeys(["0.5", "0.55", "0.6", "0.65", "0.7"], 100.0),
        **dict.fromkeys(["0.75", "0.8", "0.85", "0.9", "0.95"], 50.0),
    }
    assert result["full"]["MR-mAP"]["average"] == 100.0
    assert result["short"]["MR-R1"]["0.5"] == 50.0  # of b, the first window is none of the short ones
    assert result["short"]["MR-mAP"]["0.5"] == 75.0
    assert result["middle"]["MR-R1"]["0.95"] == 100.0
    assert result["extra"] == {"MR-R1@0.1": 100.0, "MR-R1@0.3": 100.0, "MR-mIoU": 85.0}
    assert list(result) == ["brief", "full", "long", "middle", "short", "extra"]
    assert list(result["brief"]) == sorted(result["brief"]) and len(result["brief"]) == 8
    assert result["brief"]["MR-full-R1@0.7"] == 100.0 and result["brief"]["MR-short-mAP"] == 75.0


def test_first_window_is_scored_as_officially_to_the_last_bit():
    # 0.3 - 1.1 s of 0.0 - 1.6 s: half of the hull, and by the sum of lengths a hair less
    assert evaluate_pairs(pair(1, [[0.0, 1.1, 1]], [[0.3, 1.6]]))["full"]["MR-R1"]["0.5"] == 100.0


def test_only_ten_windows_count():
    misses = [[100, 101, 1 - rank / 100] for rank in range(10)]
    assert evaluate_pairs(pair(1, [*misses[:9], [0, 4, 2]], [[0, 4]]))["brief"]["MR-full-mAP"] == 100.0
    assert evaluate_pairs(pair(1, [*misses, [0, 4, 2]], [[0, 4]]))["brief"]["MR-full-mAP"] == 0.0


def test_what_crashes_the_official_script():
    result = evaluate_pairs(pair(1, [[0, 4, 1]], [[0, 4]]), pair(2, [], [[0, 4]]))
    assert result["full"]["MR-R1"]["0.5"] == result["full"]["MR-mAP"]["average"] == 50.0
    assert result["extra"]["MR-mIoU"] == 50.0
    assert set(result["long"]["MR-mAP"].values()) == set(result["long"]["MR-R1"].values()) == {None}
    assert len(result["long"]["MR-mAP"]) == 11 and result["brief"]["MR-long-mAP"] is None
    nothing = evaluate_pairs(pair(1, [], [[0, 4]]))
    assert nothing["short"]["MR-R1"]["0.5"] == nothing["brief"]["MR-full-mAP"] == 0.0
    scores = [[4, 0, 0]]
    result = evaluate_pairs(salient_pair(1, [9, 1, 1, 1], [0], scores), salient_pair(2, [], [0], scores))
    assert result["HL-min-Fair"] == {"HL-mAP": pytest.approx(100 / 6, abs=0.006), "HL-Hit1": 50.0}


def test_windows_longer_than_any_range_count_in_full():
    result = evaluate_pairs(pair(1, [[0, 400, 1]], [[0, 400]]))
    assert result["brief"]["MR-full-mAP"] == 100.0 and result["brief"]["MR-long-mAP"] is None


def test_highlights_by_hand():
    # Ranked 2, 0, 3, 1. Fair: the first one finds 2 and 0, the second 0, the third nothing
    result = evaluate_pairs(salient_pair(1, [0.5, -1, 0.9, 0.2], [0, 2], [[2, 4, 0], [4, 1, 1]]))
    assert result["HL-min-Fair"] == {"HL-mAP": 50.0, "HL-Hit1": 100.0}  # (1 + 1 / 2 + 0) / 3
    assert result["HL-min-Good"] == {"HL-mAP": 50.0, "HL-Hit1": 100.0}  # 2; 0; nothing
    assert list(result)[:5] == ["brief", "HL-min-Fair", "HL-min-Good", "HL-min-VeryGood", "full"]
    assert list(result["brief"])[-6:] == [
        f"HL-min-{level}-{name}" for level in ("Fair", "Good", "VeryGood") for name in ("mAP", "Hit1")
    ]


@pytest.mark.parametrize(
    "predicted, precision, hit",
    [
        ([1, 1, 0, 0], 50.0, 100.0),  # clips of the same score are found together
        ([0.1, 0.9, 0.5, 0.2], 25.0, 0.0),
        ([-1, -2], 100 / 3, 100.0),  # clips without a score have 0, more than these
        ([0.5, 0.1, 0.2, 0.3, 9.0], 100.0, 0.0),  # the best clip is not in the video
    ],
)
def test_predicted_saliency(predicted, precision, hit):
    result = evaluate_pairs(salient_pair(1, predicted, [0], [[4, 4, 4]]))
    assert result["HL-min-VeryGood"] == {"HL-mAP": pytest.approx(precision, abs=0.006), "HL-Hit1": hit}


def test_videos_of_different_lengths():
    # The last clip of the shorter video has the score that pads it
    short = salient_pair(1, [1, 0], [1], [[4, 4, 4]], duration=4)
    result = evaluate_pairs(short, salient_pair(2, [0, 0, 0, 9], [3], [[4, 4, 4]]))
    assert result["HL-min-Fair"] == {"HL-mAP": 75.0, "HL-Hit1": 50.0}


def test_saliency_on_one_side_only():
    prediction, reference = salient_pair(1, [1, 0, 0, 0], [0], [[4, 4, 4]])
    windows_only, windows_only_true = pair(1, [[0, 4, 1]], [[0, 4]])
    for predictions, references in (([prediction], [windows_only_true]), ([windows_only], [reference])):
        result = evaluate_predictions(predictions, references)
        assert not [key for key in [*result, *result["brief"]] if key.startswith("HL")]


def test_saliency_without_windows():
    predictions, references = zip(*(salient_pair(qid, [1, 0, 3, 2], [0, 2], [[4, 4, 4], [1, 4, 2]]) for qid in (1, 2)))
    both = evaluate_predictions(predictions, references)
    alone = [{name: row[name] for name in ("qid", "pred_saliency_scores")} for row in predictions]
    assert evaluate_predictions(alone, references) == {
        "brief": {name: value for name, value in both["brief"].items() if name.startswith("HL")},
        **{name: value for name, value in both.items() if name.startswith("HL")},
        "extra": {},
    }
    with pytest.raises(ValueError, match="qid 2: `pred_relevant_windows`"):  # all or none
        evaluate_predictions([predictions[0], alone[1]], references)


def test_qids_as_numbers_or_strings_in_any_order():
    pairs = [pair(7, [[0, 4, 1]], [[0, 4]]), pair("s30-d52_0", [[0, 4, 1]], [[50, 60]])]
    predictions, references = zip(*pairs)
    references = [{**reference, "qid": str(reference["qid"])} for reference in references]
    assert evaluate_predictions(predictions, references[::-1])["full"]["MR-R1"]["0.5"] == 50.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qid": None}, "prediction number 1 has no `qid`"),
        ({"qid": 1}, "qid 1: more than one prediction"),
        ({"qid": 3}, "no prediction for qid 2"),
        ({"pred_relevant_windows": None}, "qid 2: `pred_relevant_windows` must be a list of .*, got None"),
        ({"pred_relevant_windows": [[0, 4]]}, r"qid 2: .* \[start, end, score\], got \[\[0, 4\]\]"),
        ({"pred_relevant_windows": [[0, 4, 1], [0, 4]]}, r"qid 2: .* \[start, end, score\]"),
        ({"pred_relevant_windows": [0, 4, 1]}, r"qid 2: .* \[start, end, score\]"),
        ({"pred_relevant_windows": [[0, "x", 1]]}, r"qid 2: .* \[start, end, score\]"),
        ({"pred_relevant_windows": [[0, 4, float("nan")]]}, "qid 2: .* finite numbers, got nan"),
        ({"pred_relevant_windows": [["0", "4", "1"]]}, "qid 2: .* must be a list of .start, end, score., got"),
        ({"pred_relevant_windows": [[0, 10**400, 1]]}, "qid 2: .* must be a list of .start, end, score., got"),
        ({"pred_saliency_scores": [10**400]}, "qid 2: .* must be a list of numbers .one per clip., got"),
        ({"pred_relevant_windows": [[0, float("inf"), 1]]}, "qid 2: .* finite numbers, got inf"),
        ({"pred_relevant_windows": [[4, 0, 1]]}, "qid 2: a predicted window ends before it starts"),
        ({"pred_saliency_scores": None}, "qid 2: has no `pred_saliency_scores`, but other queries have it"),
        ({"pred_saliency_scores": [1, float("nan")]}, "qid 2: .* finite numbers, got nan"),
        ({"pred_saliency_scores": [[1, 2]]}, "qid 2: `pred_saliency_scores` must be a list of numbers"),
    ],
)
def test_rejected_predictions(change, message):
    pairs = [salient_pair(qid, [1, 0, 0, 0], [0], [[4, 4, 4]]) for qid in (1, 2)]
    predictions, references = map(list, zip(*pairs))
    predictions[1] = {**predictions[1], **change}
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(predictions, references)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"qid": 1}, "qid 1: more than one reference"),
        ({"qid": 3}, "no prediction for qid 3"),
        ({"relevant_windows": None}, "qid 2: `relevant_windows` of the reference"),
        ({"relevant_windows": [[4, 4]]}, "qid 2: .* ends after it starts"),
        ({"saliency_scores": None}, "qid 2: has no `saliency_scores`, but other queries have it"),
        ({"relevant_clip_ids": [4]}, "qid 2: `relevant_clip_ids` must be whole numbers from 0 to 3, got 4"),
        ({"duration": None}, "qid 2: `duration` must be a number above 0"),
    ],
)
def test_rejected_references(change, message):
    pairs = [salient_pair(qid, [1, 0, 0, 0], [0], [[4, 4, 4]]) for qid in (1, 2)]
    predictions, references = map(list, zip(*pairs))
    references[1] = {**references[1], **change}
    with pytest.raises(ValueError, match=message):
        evaluate_predictions(predictions, references)


@pytest.mark.parametrize("wrong", [[1, 2], "x", None, 7])
def test_rows_that_are_not_dicts(wrong):
    predictions, references = map(list, zip(*(pair(qid, [[0, 4, 1]], [[0, 4]]) for qid in (1, 2))))
    with pytest.raises(ValueError, match="^prediction number 1 must be a dict, got "):
        evaluate_predictions([predictions[0], wrong], references)
    with pytest.raises(ValueError, match="^reference number 0 must be a dict, got "):
        evaluate_predictions(predictions, [wrong, references[1]])


def test_only_queries_that_are_not_in_the_video():
    with pytest.raises(ValueError, match="qid 1: .* at least one"):
        evaluate_pairs(pair(1, [[0, 4, 1]], []), pair(2, [[0, 4, 1]], []))


def test_rejection_by_hand():
    """Rej-F1 and G-mIoU, with windows that are empty, too low, wrong, and right."""
    pairs = [
        pair(1, [[0, 8, 0.9], [20, 30, 0.3]], [[0, 10], [20, 30]]),  # IoU 0.8 and 1
        pair(2, [[0, 4, 0.4]], [[0, 4]]),  # rejected
        pair(3, [[0, 4, 0.5]], [[8, 9]]),  # rejected at 0.6; no overlap
        pair(4, [], []),
        pair(5, [[0, 4, 0.5], [4, 8, 0.5]], []),
        pair(6, [[0, 4, 0.7]], []),
    ]
    extra = evaluate_pairs(*pairs)["extra"]
    assert list(extra)[:3] == ["MR-R1@0.1", "MR-R1@0.3", "MR-mIoU"]
    # Scores of 0.9, 0.4 and 0.5 against 0, 0.5 and 0.7: 3, 1 and 1.5 of 3
    assert extra["GMR-AUROC"] == round(100 * 5.5 / 9, 2)
    assert extra["GMR-Rej-F1@0.4"] == round(100 * 2 * 1 / (2 * 1 + 1 + 2), 2)  # 4 right, 2 wrong, 5 and 6 missed
    assert extra["GMR-Rej-F1@0.6"] == round(100 * 2 * 2 / (2 * 2 + 2 + 1), 2)  # 4 and 5 right, 2 and 3 wrong, 6 missed
    assert extra["GMR-G-mIoU@1"] == round(100 * (0.8 / 2 + 0 + 0 + 1 + 0 + 0) / 6, 2)
    assert extra["GMR-G-mIoU@3"] == extra["GMR-G-mIoU@5"] == round(100 * (1.8 / 2 + 0 + 0 + 1 + 0 + 0) / 6, 2)


def test_set_iou_of_more_windows_than_true_ones():
    # The first takes its best true window, which leaves the other one, without overlap, for the second
    found, truth = np.array([[0.0, 8], [0, 10], [50, 60]]), np.array([[0.0, 10], [20, 30]])
    assert set_iou(found, truth) == pytest.approx(0.8 / 3)
    assert set_iou(found[1:], truth[:1]) == pytest.approx(1 / 2)


def test_absent_queries_leave_the_official_numbers():
    present = list(random_pairs(3, 30))
    absent = [
        pair(f"absent {qid}", prediction["pred_relevant_windows"], []) for qid, (prediction, _) in enumerate(present)
    ]
    wanted, result = evaluate_pairs(*present), evaluate_pairs(*absent, *present)
    rejection = {name: result["extra"].pop(name) for name in list(result["extra"]) if name.startswith("GMR-")}
    assert result == wanted and len(rejection) == 6
    assert rejection["GMR-AUROC"] == 50.0  # the same scores
    saliency = [salient_pair(qid, [1, 0, 0, 0], [0], [[4, 4, 4]]) for qid in (1, 2)]
    none = ({**absent[0][0], "pred_saliency_scores": [1, 2]}, absent[0][1])  # without annotators' scores
    assert evaluate_pairs(*saliency, none)["brief"] == evaluate_pairs(*saliency)["brief"]


def test_scorable_rows():
    predictions = [{"qid": qid, "pred_relevant_windows": [[0, 4, 1]]} for qid in (3, "1", 2, 4)]
    rows = [
        {"qid": 1, "relevant_windows": [[0, 4]]},
        {"qid": "2", "relevant_windows": []},
        {"qid": 3},
        {"qid": 4, "relevant_windows": [[8, 9]]},
    ]
    scored, references, message = scorable(predictions, rows)
    assert scored == predictions[1:] and references == [rows[0], rows[1], rows[3]]  # all that are labeled
    assert message == (
        "2 of 4 rows are not scored by the official metrics: 1 with `relevant_windows: []` (not in the video), "
        "1 without `relevant_windows` (unlabeled)"
    )
    assert evaluate_predictions(scored, references)["full"]["MR-R1"]["0.5"] == 50.0
    assert scorable(predictions, rows[1:2])[2] == (
        "1 of 1 rows are not scored by the official metrics: 1 with `relevant_windows: []` (not in the video)"
    )
    assert scorable(predictions[1:2], rows[:1]) == (predictions[1:2], rows[:1], None)
    assert scorable(predictions[:1], rows[2:3])[:2] == ([], [])


def test_nothing_to_score():
    with pytest.raises(ValueError, match="no references; at least one"):
        evaluate_predictions([], [])


@pytest.fixture(scope="module")
def official(shared):
    """Predictions, references and what the official script prints for them."""

    def rows(name):
        return [json.loads(line) for line in open(shared / name)]

    return (
        rows("eval/sample_val_preds.jsonl"),
        rows("annotations/qvhighlights/highlight_val_release.jsonl"),
        json.loads((shared / "eval" / "sample_val_preds_metrics_raw.json").read_text()),
    )


def test_official_numbers(official):
    predictions, references, wanted = official
    result = evaluate_predictions(predictions, references)
    assert list(result.pop("extra")) == ["MR-R1@0.1", "MR-R1@0.3", "MR-mIoU"]
    assert json.dumps(result) == json.dumps(wanted)  # the order of the keys, too


def test_evaluate_module(tmp_path, monkeypatch):
    evaluate = pytest.importorskip("evaluate")
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    folder = Path(__file__).resolve().parents[2] / "metrics" / "video_moment_retrieval"
    module = evaluate.load(os.fspath(folder), cache_dir=os.fspath(tmp_path))
    pairs = [pair(7, [[0, 4, 1]], [[0, 4]]), pair("b", [[0, 4, np.float64(0.5)]], [[50, 60]])]
    predictions, references = map(list, zip(*pairs))
    wanted = evaluate_predictions(predictions, references)
    assert module.compute(predictions=predictions, references=references[::-1]) == wanted
    for prediction, reference in pairs:
        module.add(prediction=prediction, reference=reference)
    assert module.compute() == wanted
