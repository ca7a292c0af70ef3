"""
The metrics of Generalized Moment Retrieval (Ding et al., arXiv 2605.02623), which also score queries that are not in
their video, as its official toolkit computes them.

A query's existence score is the highest score of its predicted windows, and 0 if there is none. A query whose score is
at most a threshold is rejected, so a query without predicted windows is rejected at any threshold.
"""

from collections.abc import Sequence

import numpy as np

from .matching import match_in_turn, window_ious

REJECTION_THRESHOLDS = (0.4, 0.6)  # of Rej-F1
GATE = 0.4  # threshold of G-mIoU
TOP_K = (1, 3, 5)
MAX_WINDOWS = 10


def auroc(present: np.ndarray, absent: np.ndarray) -> float:
    """Return the probability that a score of `present` (P,) is above one of `absent` (A,); equal scores count half."""
    absent = np.sort(absent)
    below, up_to = (np.searchsorted(absent, present, side) for side in ("left", "right"))
    return float((below + up_to).mean() / (2 * len(absent)))


def rejection_f1(present: np.ndarray, absent: np.ndarray, threshold: float) -> float:
    """Return the F1 of rejection: scores of `absent` (A,) should be rejected, those of `present` (P,) should not."""
    right, wrong = (absent <= threshold).sum(), (present <= threshold).sum()
    return float(2 * right / (right + wrong + len(absent)))


def set_iou(found: np.ndarray, truth: np.ndarray) -> float:
    """
    Return how well a set of windows (P, 2) agrees with the true ones (G, 2): 1 if both are empty, 0 if only one is.

    Otherwise the windows are matched in turn (see `match_in_turn`), and the sum of the IoUs is divided by P + G minus
    the number of pairs. In the toolkit's code, though not in its documentation, a pair need not overlap, so the divisor
    is the larger of P and G.
    """
    if not len(found) or not len(truth):
        return float(len(found) == len(truth))
    return float(match_in_turn(window_ious(found, truth)).sum()) / max(len(found), len(truth))


def rejection_metrics(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> dict[str, float]:
    """
    Return `AUROC`, `Rej-F1@0.4`, `Rej-F1@0.6`, `G-mIoU@1`, `G-mIoU@3` and `G-mIoU@5`, as shares.

    G-mIoU@k is the mean of `set_iou` over all queries, for the first k windows, or none if the query is rejected.

    Args:
        found: the predicted windows of each query, in their order, (P, 3) of start, end and score.
        truth: the true windows of each query, (G, 2). Some queries have some, others none.
    """
    scores = np.array([windows[:, 2].max(initial=0.0) for windows in found])
    is_present = np.array([len(windows) > 0 for windows in truth])
    present, absent = scores[is_present], scores[~is_present]
    metrics = {"AUROC": auroc(present, absent)}
    metrics |= {f"Rej-F1@{threshold}": rejection_f1(present, absent, threshold) for threshold in REJECTION_THRESHOLDS}
    returned = [
        windows[windows[:, 1] > windows[:, 0], :2][: MAX_WINDOWS if score > GATE else 0]
        for windows, score in zip(found, scores)
    ]
    for k in TOP_K:
        ious = [set_iou(windows[:k], true_windows) for windows, true_windows in zip(returned, truth)]
        metrics[f"G-mIoU@{k}"] = float(np.mean(ious))
    return metrics
