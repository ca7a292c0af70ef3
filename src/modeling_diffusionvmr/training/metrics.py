"""
The official metrics of QVHighlights, as printed by Moment-DETR's `standalone_eval/eval.py`, for all queries at once.

Q queries, P predicted windows, G true windows, C clips, T thresholds. Queries have different numbers of windows, so
arrays of windows (Q, P or G, 2) are padded with NaN, for which every comparison is false.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.annotations import NUM_SALIENCY_ANNOTATORS, SALIENCY_CLIP_SECONDS, check_saliency
from .matching import window_ious
from .rejection_metrics import rejection_metrics

IOU_THRESHOLDS = np.array([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])
EXTRA_IOU_THRESHOLDS = (0.1, 0.3)
# In seconds: above the first number, up to and including the second
LENGTH_RANGES = {"short": (0, 10), "middle": (10, 30), "long": (30, 150), "full": (0, np.inf)}
SALIENCY_LEVELS = {"Fair": 2, "Good": 3, "VeryGood": 4}  # the minimum score of a highlight
MAX_WINDOWS = 10  # the number of windows per prediction that count toward the average precision


def evaluate_predictions(
    predictions: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """
    Score predictions as the official evaluation of QVHighlights does.

    Args:
        predictions: dicts with `qid` and `pred_relevant_windows` ([[start, end, score], ...], seconds; the first one
            counts for R1, the first ten, sorted by score, for the average precision). Either all or none also have
            `pred_saliency_scores`, one per 2 s clip. As in the official script, missing scores at the end count as 0
            and surplus ones are ignored. If no prediction has windows, only saliency is scored.
        references: rows from `load_annotations` (see `scorable`), of which at least one has windows. Of those that do,
            either all or none have `saliency_scores`. `relevant_windows: []` means that the query is not in the video;
            such a row only counts for the metrics of Generalized Moment Retrieval. References have the qids of the
            predictions, in any order; 7 and "7" are the same.

    Returns:
        Percentages with two digits. The official keys come first: `"brief"`; `"HL-min-Fair"`, `"HL-min-Good"` and
        `"HL-min-VeryGood"` (omitted, also from `"brief"`, if one side has no saliency); `"full"`, `"long"`, `"middle"`
        and `"short"` (true windows of all lengths, over 30 s, over 10 s up to 30 s, up to 10 s). Then `"extra"`, which
        is not official: `"MR-R1@0.1"`, `"MR-R1@0.3"` and `"MR-mIoU"`, the mean IoU of the first window over all
        queries with windows. If some queries are not in their video, it also has the metrics of Generalized Moment
        Retrieval over all queries: `"GMR-AUROC"`, `"GMR-Rej-F1@0.4"`, `"GMR-Rej-F1@0.6"`, `"GMR-G-mIoU@1"`,
        `"GMR-G-mIoU@3"` and `"GMR-G-mIoU@5"` (see `rejection_metrics`).

        The official script crashes on some inputs and drops others. Here a query without a predicted window or a
        saliency score is a miss, and the numbers of a range of lengths without true windows are `None`.

    Raises:
        ValueError: if a row is not a dict; a qid is missing, repeated, or on one side only; windows or scores have a
            wrong shape or values that are not finite; a window ends before it starts; or a reference has no
            `relevant_windows`, or all have an empty list. The message names the qid or the row's number.
    """
    truth, found = rows_by_qid(references, "reference"), rows_by_qid(predictions, "prediction")
    for rows, others, kind in ((truth, found, "prediction"), (found, truth, "reference")):
        alone = [qid for qid in rows if qid not in others]
        if alone:
            more = f" (and {len(alone) - 1} more qids)" if len(alone) > 1 else ""
            raise ValueError(f"no {kind} for qid {alone[0]}{more}")
    all_rows = found, truth
    absent = {qid for qid, row in truth.items() if _is_absent(row)}
    if 0 < len(absent) < len(truth):
        found, truth = ({qid: row for qid, row in rows.items() if qid not in absent} for rows in all_rows)
    saliency = _saliency(found, truth)
    highlights_only = saliency is not None and all("pred_relevant_windows" not in row for row in found.values())
    scores, extra = ({}, {}) if highlights_only else _moment_scores(found, truth)
    if absent and not highlights_only:
        extra |= _rejection_scores(*all_rows)
    brief: dict[str, float | None] = {}
    if not highlights_only:
        brief |= {f"MR-{name}-mAP": scores[name]["MR-mAP"]["average"] for name in LENGTH_RANGES}
        brief |= {f"MR-full-mAP@{iou}": scores["full"]["MR-mAP"][iou] for iou in ("0.5", "0.75")}
        brief |= {f"MR-full-R1@{iou}": scores["full"]["MR-R1"][iou] for iou in ("0.5", "0.7")}
    brief = dict(sorted(brief.items()))
    if saliency is not None:
        for level_name, (precision, hit) in _highlight_scores(*saliency).items():
            scores[f"HL-min-{level_name}"] = {"HL-mAP": precision, "HL-Hit1": hit}
            brief |= {f"HL-min-{level_name}-mAP": precision, f"HL-min-{level_name}-Hit1": hit}
    return {"brief": brief, **dict(sorted(scores.items())), "extra": extra}


def scorable(
    predictions: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]], str | None]:
    """
    Select what `evaluate_predictions` can score: the labeled rows if any of them has windows, and the predictions for
    them.

    Args:
        predictions: dicts with `qid`, in any order.
        rows: from `load_annotations`. `relevant_windows: []` means that the query is not in the video, a missing field
            that the row is unlabeled.

    Returns:
        Predictions, rows, and one message that counts the rows that the official metrics do not score, or `None` if
        there are none. Both lists may be empty, which `evaluate_predictions` rejects.
    """
    absent = sum(map(_is_absent, rows))
    unlabeled = sum(row.get("relevant_windows") is None for row in rows)
    reasons = [f"{absent} with `relevant_windows: []` (not in the video)"] if absent else []
    reasons += [f"{unlabeled} without `relevant_windows` (unlabeled)"] if unlabeled else []
    message = (
        f"{absent + unlabeled} of {len(rows)} rows are not scored by the official metrics: {', '.join(reasons)}"
        if reasons
        else None
    )
    labeled = [row for row in rows if row.get("relevant_windows") is not None] if absent + unlabeled < len(rows) else []
    qids = {str(row["qid"]) for row in labeled}
    return [prediction for prediction in predictions if str(prediction["qid"]) in qids], labeled, message


def _is_absent(row: Mapping[str, Any]) -> bool:
    """Return whether a row says that its query is not in the video, by an empty list of windows."""
    windows = row.get("relevant_windows")
    return isinstance(windows, (list, tuple, np.ndarray)) and not len(windows)


def _rejection_scores(
    predictions: Mapping[str, Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]]
) -> dict[str, float | None]:
    """Return the metrics of Generalized Moment Retrieval. Some references have windows, others have none."""
    found = [predicted_windows(qid, row) for qid, row in predictions.items()]
    truth = [
        np.empty((0, 2)) if _is_absent(references[qid]) else _true_windows(qid, references[qid]) for qid in predictions
    ]
    return {f"GMR-{name}": _percent(value) for name, value in rejection_metrics(found, truth).items()}


def _moment_scores(
    predictions: Mapping[str, Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, float | None]]:
    """Return the official numbers for each range of lengths, and the additional ones."""
    found = _padded([predicted_windows(qid, row) for qid, row in predictions.items()])[:, :MAX_WINDOWS]
    truth = _padded([_true_windows(qid, references[qid]) for qid in predictions])
    order = np.argsort(-found[..., 2], axis=1, kind="stable")
    by_score = np.take_along_axis(found, order[..., None], axis=1)
    lengths = truth[..., 1] - truth[..., 0]

    scores, extra = {}, {}
    for name, (above, up_to) in LENGTH_RANGES.items():
        in_range = (above < lengths) & (lengths <= up_to)
        rows = in_range.any(axis=1)
        true_windows = np.where(in_range[..., None], truth, np.nan)[rows]
        precisions = _mean(_average_precisions(by_score[rows], true_windows))
        first_ious = _first_ious(found[rows, 0], true_windows)
        scores[name] = {
            "MR-mAP": {**_by_threshold(precisions), "average": _percent(precisions.mean())},
            "MR-R1": _by_threshold(_mean(first_ious[:, None] >= IOU_THRESHOLDS)),
        }
        if name == "full":
            extra = {f"MR-R1@{iou}": _percent(_mean(first_ious >= iou)) for iou in EXTRA_IOU_THRESHOLDS}
            extra["MR-mIoU"] = _percent(_mean(first_ious))
    return scores, extra


def rows_by_qid(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, Mapping[str, Any]]:
    """
    Index rows by their qid as a string: 7 and "7" are the same.

    Raises:
        ValueError: if there are no rows, for a row that is not a dict or has no qid, and for two rows with one qid.
    """
    by_qid: dict[str, Mapping[str, Any]] = {}
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{kind} number {index} must be a dict, got {str(row)[:80]!r}")
        if row.get("qid") is None:
            raise ValueError(f"{kind} number {index} has no `qid`")
        if str(row["qid"]) in by_qid:
            raise ValueError(f"qid {row['qid']}: more than one {kind}")
        by_qid[str(row["qid"])] = row
    if not by_qid:
        raise ValueError(f"no {kind}s; at least one is required")
    return by_qid


def _numbers(values: Any, columns: tuple[int, ...], what: str) -> np.ndarray:
    """Return finite numbers as float64 (n, *columns), where n may be 0. Raise `ValueError` for anything else."""
    try:
        array = np.asarray(values)
        if array.dtype.kind in "US":  # NumPy would parse text
            raise ValueError
        array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError):  # OverflowError: a whole number beyond the largest float
        raise ValueError(f"{what}, got {str(values)[:80]}") from None
    if array.shape == (0,):
        array = array.reshape(0, *columns)
    if array.ndim != 1 + len(columns) or array.shape[1:] != columns:
        raise ValueError(f"{what}, got {str(values)[:80]}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} that are finite numbers, got {array[~np.isfinite(array)][0]}")
    return array


def predicted_windows(qid: int | str, prediction: Mapping[str, Any]) -> np.ndarray:
    """
    Return a prediction's windows, float64 (P, 3): start and end in seconds, and score. P may be 0.

    Raises:
        ValueError: if they are not a list of finite [start, end, score], or if one ends before it starts.
    """
    what = f"qid {qid}: `pred_relevant_windows` must be a list of [start, end, score]"
    windows = _numbers(prediction.get("pred_relevant_windows"), (3,), what)
    if (windows[:, 0] > windows[:, 1]).any():
        raise ValueError(f"qid {qid}: a predicted window ends before it starts")
    return windows


def predicted_saliency(qid: int | str, prediction: Mapping[str, Any]) -> np.ndarray | None:
    """
    Return a prediction's saliency scores, float64 (C,), or `None` if it has none.

    Raises:
        ValueError: if they are not a list of finite numbers.
    """
    if prediction.get("pred_saliency_scores") is None:
        return None
    what = f"qid {qid}: `pred_saliency_scores` must be a list of numbers (one per clip)"
    return _numbers(prediction["pred_saliency_scores"], (), what)


def _true_windows(qid: str, reference: Mapping[str, Any]) -> np.ndarray:
    what = f"qid {qid}: `relevant_windows` of the reference must be a list of [start, end]"
    windows = _numbers(reference.get("relevant_windows"), (2,), what)
    if not len(windows) or (windows[:, 0] >= windows[:, 1]).any():
        raise ValueError(f"{what}, at least one, each of which ends after it starts, got {windows.tolist()}")
    return windows


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Stack Q arrays (n, D) to (Q, largest n but at least 1, D), padded with NaN."""
    padded = np.full((len(rows), max(1, *map(len, rows)), rows[0].shape[1]), np.nan)
    for row, array in zip(padded, rows):
        row[: len(array)] = array
    return padded


def _mean(values: np.ndarray) -> np.ndarray:
    """Average over the queries (Q, ...); NaN if there are none."""
    return values.mean(axis=0) if len(values) else np.full(values.shape[1:], np.nan)


def _percent(value: Any) -> float | None:
    return None if np.isnan(value) else float(f"{100 * value:.2f}")


def _by_threshold(values: np.ndarray) -> dict[str, float | None]:
    return {str(threshold): _percent(value) for threshold, value in zip(IOU_THRESHOLDS.tolist(), values)}


def _ious(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the IoU of windows (Q, P, 2) and (Q, G, 2), as (Q, P, G); -1 for padding."""
    return np.nan_to_num(window_ious(found, truth), nan=-1)


def _first_ious(first: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the IoU of one window per query (Q, 2) with its best true window (Q, G, 2), as (Q,); 0 for padding."""
    best = _ious(first[:, None], truth)[:, 0].argmax(axis=1)
    starts, ends = first[:, 0], first[:, 1]
    true_starts, true_ends = truth[np.arange(len(truth)), best].T
    overlap = np.clip(np.minimum(ends, true_ends) - np.maximum(starts, true_starts), 0, None)
    # The official script divides by the hull here. For windows that meet, it equals the union except for the last bit,
    # which matters because an IoU can equal a threshold such as 0.7 exactly.
    return np.nan_to_num(overlap / (np.maximum(ends, true_ends) - np.minimum(starts, true_starts)))


def _average_precisions(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """
    Return the interpolated average precisions (Q, T) of predicted windows (Q, P, 2), sorted by descending score, for
    true windows (Q, G, 2).
    """
    ious = _ious(found, truth)
    num_queries, num_found, num_true = ious.shape
    free = np.ones((num_queries, len(IOU_THRESHOLDS), num_true), dtype=bool)  # not yet found, per threshold
    hits = np.zeros((num_found, num_queries, len(IOU_THRESHOLDS)))
    for rank in range(num_found):
        # Take the best true window that is still free, and the last one of several equally good ones, as in the
        # official script. (There an unstable sort decides, which may depend on the machine. But only true windows that
        # touch can tie; QVHighlights has none.)
        candidates = np.where(free, ious[:, rank, None], -1)[..., ::-1]
        best = candidates.argmax(axis=-1)[..., None]
        hit = np.take_along_axis(candidates, best, axis=-1) >= IOU_THRESHOLDS[:, None]
        best = num_true - 1 - best
        np.put_along_axis(free, best, np.take_along_axis(free, best, axis=-1) & ~hit, axis=-1)
        hits[rank] = hit[..., 0]
    num_hits = hits.cumsum(axis=0)
    precision = num_hits / np.arange(1, num_found + 1)[:, None, None]
    best_from_here = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    recall = num_hits / (~np.isnan(truth[:, :, 0])).sum(axis=1)[:, None]
    return (np.diff(recall, axis=0, prepend=0) * best_from_here).sum(axis=0)


def _saliency(
    predictions: Mapping[str, Mapping[str, Any]], references: Mapping[str, Mapping[str, Any]]
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray] | None:
    """
    Return each query's predicted scores, the annotators' scores padded to (Q, 3, C), and the number of clips (Q,).

    Queries are in the order of the predictions. `None` if one side has no saliency.
    """
    for rows, key in ((predictions, "pred_saliency_scores"), (references, "saliency_scores")):
        without = [qid for qid in predictions if rows[qid].get(key) is None]
        if len(without) == len(rows):
            return None
        if without:
            raise ValueError(f"qid {without[0]}: has no `{key}`, but other queries have it")
    scores, num_clips = [], []
    for qid, prediction in predictions.items():
        values = predicted_saliency(qid, prediction)
        assert values is not None  # checked above
        scores.append(values)
        try:
            check_saliency(references[qid])
        except ValueError as error:
            raise ValueError(f"qid {qid}: {error}") from None
        num_clips.append(int(references[qid]["duration"] / SALIENCY_CLIP_SECONDS))
    true_scores = np.zeros((len(scores), NUM_SALIENCY_ANNOTATORS, max(1, *num_clips)))
    for qid, row in zip(predictions, true_scores):
        row[:, references[qid]["relevant_clip_ids"]] = np.transpose(references[qid]["saliency_scores"])
    return scores, true_scores, np.array(num_clips)


def _highlight_scores(
    scores: Sequence[np.ndarray], true_scores: np.ndarray, num_clips: np.ndarray
) -> dict[str, tuple[float | None, float | None]]:
    """Return, per saliency level, the mean average precision and how often the best clip is a highlight, both in %."""
    num_queries, _, most_clips = true_scores.shape
    real = np.arange(most_clips) < num_clips[:, None]
    predicted = np.zeros((num_queries, most_clips))
    for row, count, values in zip(predicted, num_clips, scores):
        row[: min(count, len(values))] = values[:count]
    given = np.array([len(values) > 0 for values in scores])
    best_clip = np.array([values.argmax() if len(values) else most_clips for values in scores])

    order = np.argsort(np.where(real, -predicted, np.inf), axis=1, kind="stable")
    predicted = np.take_along_axis(predicted, order, axis=1)
    # Clips with equal scores are retrieved together: only the last of them gets a precision
    is_last = np.take_along_axis(real, order, axis=1)
    is_last[:, :-1] &= (predicted[:, 1:] != predicted[:, :-1]) | ~is_last[:, 1:]
    is_last = is_last[:, None]
    result = {}
    for name, min_score in SALIENCY_LEVELS.items():
        highlights = true_scores >= min_score
        num_hits = np.take_along_axis(highlights, order[:, None], axis=2).cumsum(axis=2)
        precision = np.where(is_last, num_hits / np.arange(1, most_clips + 1), 0)
        best_from_here = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
        before = np.maximum.accumulate(np.where(is_last, num_hits, 0), axis=2)
        before = np.pad(before, ((0, 0), (0, 0), (1, 0)))[..., :-1]
        counts = is_last & (num_hits > before)
        average = (best_from_here * counts).sum(axis=2) / np.maximum(counts.sum(axis=2), 1)
        in_video = best_clip < num_clips
        is_highlight = np.asarray(highlights.any(axis=1))
        hits = in_video & is_highlight[np.arange(num_queries), np.where(in_video, best_clip, 0)]
        result[name] = _percent((average * given[:, None]).mean()), _percent(hits.mean())
    return result
