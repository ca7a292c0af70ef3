"""
Measure the moments that a person gets, and choose `threshold`, `nms_threshold` and `top_k` by that measure.

A row is a sentence about a video with `relevant_windows` ([start, end] in seconds; none if the sentence is not true in
the video) and `pred_relevant_windows` ([start, end, score], every proposal, by descending score). A moment is right if
its IoU with a true window is at least `MIN_IOU` and no better moment of the sentence was matched to that window. So of
two moments at the same place one is wrong, and every moment of a sentence that is not true in its video is wrong.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ..processing_diffusionvmr import DiffusionVMRProcessor
from ..spans import iou_and_generalized_iou, nms, window_to_span
from .dataset import MomentRetrievalDataset
from .matching import match_in_turn
from .prediction import predict_moments

MIN_IOU = 0.5
MIN_SENTENCES = 20  # with fewer, a choice would be chance
THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20))
NMS_THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))
TOP_K = (1, 2, 3, 4, 5, 7, 10, 20)


def match_moments(row: Mapping[str, Any], nms_threshold: float | None) -> list[tuple[float, bool]]:
    """
    Return (score, whether it is right) for each moment of a row that NMS keeps, by descending score.

    The result for a moment does not depend on later ones, so it stays the same if `threshold` or `top_k` drop those.
    """
    kept = torch.tensor(row["pred_relevant_windows"], dtype=torch.float64).reshape(-1, 3)
    if nms_threshold is not None:
        kept = kept[nms(kept[:, :2], nms_threshold)]
    truth = torch.tensor(row["relevant_windows"], dtype=torch.float64).reshape(-1, 2)
    ious, _ = iou_and_generalized_iou(window_to_span(kept[:, :2])[:, None], window_to_span(truth)[None])
    is_right = match_in_turn(ious.numpy(), MIN_IOU) > 0
    return list(zip(kept[:, 2].tolist(), is_right.tolist()))


def measure_moments(
    rows: Sequence[Mapping[str, Any]], threshold: float, nms_threshold: float | None, top_k: int | None
) -> dict[str, Any]:
    """
    Measure the moments that the processor returns with these values.

    Returns:
        `n`, the number of rows; the mean number of moments; precision, recall and F1 in percent, "-" where there is
        nothing to count; and the percentage of rows without a moment.
    """
    matched = [match_moments(row, nms_threshold)[:top_k] for row in rows]
    shown = [[right for score, right in moments if score >= threshold] for moments in matched]
    moments, right = sum(map(len, shown)), sum(map(sum, shown))
    true = sum(len(row["relevant_windows"]) for row in rows)
    return {
        "n": len(rows),
        "moments per sentence": moments / len(rows),
        "precision": _percent(right, moments),
        "recall": _percent(right, true),
        "F1": _percent(2 * right, moments + true) if true else "-",
        "no moment": _percent(sum(not of_row for of_row in shown), len(rows)),
    }


def _percent(part: int, whole: int) -> float | str:
    return 100 * part / whole if whole else "-"


def choose_post_processing(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Return the `threshold`, `nms_threshold` and `top_k` with the best F1 over all rows. Ties go to smaller values.

    Return nothing if no moment is right: all values would be equally bad.
    """
    true = sum(len(row["relevant_windows"]) for row in rows)
    best: dict[str, Any] = {}
    best_f1 = 0.0
    for nms_threshold in NMS_THRESHOLDS:
        moments = [(rank, *moment) for row in rows for rank, moment in enumerate(match_moments(row, nms_threshold))]
        ranks, scores, right = np.array(moments).T
        for top_k, threshold in itertools.product(TOP_K, THRESHOLDS):
            shown = (ranks < top_k) & (scores >= threshold)
            f1 = 2 * right[shown].sum() / max(shown.sum() + true, 1)
            if f1 > best_f1:
                best_f1 = f1
                best = {"threshold": threshold, "nms_threshold": nms_threshold, "top_k": top_k}
    return best


def choose_on_dataset(
    model, processor: DiffusionVMRProcessor, dataset: MomentRetrievalDataset | None
) -> dict[str, Any]:
    """
    Choose the processor's `threshold`, `nms_threshold` and `top_k` for the moments that people get, on the sentences of
    a validation dataset. Each is searched in its own video. A sentence that is true there is also searched in another
    video, where nothing should be found, as for sentences that are labeled as absent (`relevant_windows: []`).

    Returns:
        The values; empty if there are fewer than `MIN_SENTENCES` labeled sentences, if none is absent or can be paired
        with another video, or if no moment is right.
    """
    rows = [] if dataset is None else [row for row in dataset.rows if "relevant_windows" in row]
    elsewhere = with_other_videos([row for row in rows if row["relevant_windows"]])
    if dataset is None or len(rows) < MIN_SENTENCES or all(row["relevant_windows"] for row in rows + elsewhere):
        return {}
    predicted = []
    for part in (rows, elsewhere):
        own = MomentRetrievalDataset(
            part,
            dataset.video_features,
            dataset.text_features,
            processor,
            clip_seconds=dataset.clip_seconds,
            windows=dataset.windows is not None,
        )
        predictions = predict_moments(model, own, progress=False)
        predicted += [{**row, **prediction} for row, prediction in zip(own.rows, predictions)]
    return choose_post_processing(predicted)


def with_other_videos(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """
    Return each row with a video of another row and no windows: a sentence that is most likely not true there. Empty if
    all rows have the same video.
    """
    videos = {row["vid"]: row["duration"] for row in rows}
    if len(videos) < 2:
        return []
    vids = list(videos)
    next_vid = dict(zip(vids, [*vids[1:], vids[0]]))
    absent = []
    for row in rows:
        vid = next_vid[row["vid"]]
        video = {"vid": vid, "duration": videos[vid]}
        absent.append({"qid": row["qid"], "query": row["query"], **video, "relevant_windows": []})
    return absent
