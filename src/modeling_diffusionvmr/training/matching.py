"""Match predicted windows with true ones. A window is (start, end) in seconds."""

import numpy as np


def window_ious(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the IoU of windows (..., P, 2) with windows (..., G, 2), as (..., P, G); NaN where one of them is NaN."""
    starts, ends = found[..., :, None, 0], found[..., :, None, 1]
    true_starts, true_ends = truth[..., None, :, 0], truth[..., None, :, 1]
    overlap = np.clip(np.minimum(ends, true_ends) - np.maximum(starts, true_starts), 0, None)
    return overlap / ((ends - starts) + (true_ends - true_starts) - overlap)


def match_in_turn(ious: np.ndarray, min_iou: float = 0.0) -> np.ndarray:
    """
    Match each predicted window in turn to the true one with the highest IoU among those that are still free, if that is
    at least `min_iou`. The result for a window does not depend on later ones.

    Args:
        ious: (P, G), the predicted windows in their order.

    Returns:
        The IoU of each predicted window with its match, (P,); 0 without a match.
    """
    free, matched = list(range(ious.shape[1])), np.zeros(len(ious))
    for rank, overlaps in enumerate(ious.tolist()):
        best = max(free, key=overlaps.__getitem__, default=None)
        if best is not None and overlaps[best] >= min_iou:
            free.remove(best)
            matched[rank] = overlaps[best]
    return matched
