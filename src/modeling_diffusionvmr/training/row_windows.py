"""Train on search windows of long videos: the true windows in one of them, and which one to show."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..windows import SearchWindow

MIN_SHARE_INSIDE = 0.5  # of a true window: a search window with less of it does not count as showing it
SHARE_WITH_MOMENT = 0.5  # of the draws in training: choose only among search windows that show a true window


def row_in_window(row: Mapping[str, Any], window: SearchWindow, clip_seconds: float) -> dict[str, Any]:
    """
    Return a row as if its video were only a search window.

    True windows are cut at the edges, and those that are mostly outside are dropped. So are annotators' scores, because
    they refer to clips of the whole video; saliency then follows from the true windows.

    Args:
        row: the annotations of the whole video.
        window: in clips.
        clip_seconds: length of a clip of the features.
    """
    start, end = window.first * clip_seconds, window.last * clip_seconds
    inside = {name: value for name, value in row.items() if name not in ("saliency_scores", "relevant_clip_ids")}
    inside["duration"] = end - start
    if "relevant_windows" in row:
        cut = [(max(a, start), min(b, end), b - a) for a, b in row["relevant_windows"]]
        inside["relevant_windows"] = [
            [a - start, b - start] for a, b, length in cut if a < b and b - a >= MIN_SHARE_INSIDE * length
        ]
    return inside


def draw_window(
    row: Mapping[str, Any], windows: Sequence[SearchWindow], clip_seconds: float, rng: np.random.Generator
) -> SearchWindow:
    """Draw the search window of a training sample: half of the time any, otherwise one that shows a true window."""
    showing = [window for window in windows if row_in_window(row, window, clip_seconds)["relevant_windows"]]
    chosen = showing if showing and rng.random() < SHARE_WITH_MOMENT else windows
    return chosen[int(rng.integers(len(chosen)))]
