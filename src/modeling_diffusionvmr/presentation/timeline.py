"""The parts that all timelines share: times as text, ticks, frames, and the curve of the saliency."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ..video import open_video

NUM_FRAMES = 12  # number of frames below or above a timeline
MAX_POINTS = 1000  # of a curve, about one per pixel
SALIENCY_LABEL = "saliency (a ranking, not a probability)"
# In seconds, between two ticks. Longer steps are whole days.
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


def timestamp(seconds: float, decimals: int = 1) -> str:
    """Return a time as `mm:ss.s`, from an hour on as `h:mm:ss.s`, rounded to a number of decimals."""
    units = 10**decimals
    whole, fraction = divmod(round(seconds * units), units)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
    return f"{text}.{fraction:0{decimals}d}" if decimals else text


def tick_times(duration: float, max_ticks: int) -> list[float]:
    """Return round times in seconds, evenly spaced from 0 to a duration, at most `max_ticks` of them (at least 2)."""
    wanted = duration / (max_ticks - 1)
    step = next((step for step in STEPS if step >= wanted), STEPS[-1] * -(-wanted // STEPS[-1]))
    return [index * step for index in range(int(duration / step + 1e-9) + 1)]


def tick_label(seconds: float, ticks: Sequence[float]) -> str:
    """Return the text of one of the ticks, with decimals only where ticks are less than a second apart."""
    return timestamp(seconds, decimals=int(len(ticks) > 1 and ticks[1] < 1))


def saliency_curve(scores: Sequence[float] | np.ndarray, max_points: int = MAX_POINTS) -> np.ndarray:
    """
    Return the saliency of one sentence for display: values in [0, 1], one per clip, or per group of clips in a long
    video, of which the highest counts.

    Saliency scores are unbounded, and only their differences are trained: adding a number to all of them changes no
    loss. So this is the sigmoid of a score minus the mean of the video, and 0.5 is an average clip. It ranks clips; it
    is not a probability. Results in JSON keep the raw scores, because the sigmoid makes the highest ones equal.
    """
    scores = np.asarray(scores, np.float64)
    values = 1 / (1 + np.exp(-np.clip(scores - scores.mean(), -50, 50)))
    # Groups differ by at most one clip. No group is empty.
    groups = np.arange(min(max_points, len(values))) * len(values) // min(max_points, len(values))
    return np.maximum.reduceat(values, groups)


def curve_points(result: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """
    Return the curve of a result of the pipeline with `return_saliency=True`: times in seconds, and `saliency_curve`.
    """
    values = saliency_curve(result["saliency"])
    covered = len(result["saliency"]) * result["clip_seconds"]
    return (np.arange(len(values)) + 0.5) * covered / len(values), values


def frames_of(video: Any, duration: float, progress: bool = False) -> list[np.ndarray]:
    """
    Return the frames of a timeline, (H, W, 3) uint8 RGB, evenly spaced over a video of `duration` seconds. The whole
    video is decoded.
    """
    frames = open_video(video, duration / NUM_FRAMES)
    return list(tqdm(frames, desc="reading frames", total=frames.num_clips, disable=not progress))
