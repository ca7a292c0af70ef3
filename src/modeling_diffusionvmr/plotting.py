"""
Figures: timelines of a video, predictions beside the truth, spans as they are refined from noise, and curves.

Text from outside is drawn with `parse_math=False`: otherwise Matplotlib reads text between two `$` as a formula, which
usually fails.
"""

import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from .checks import check_positive
from .data.annotations import MAX_SALIENCY, SALIENCY_CLIP_SECONDS, check_row
from .data.files import atomic_write
from .presentation.timeline import SALIENCY_LABEL, curve_points, tick_label, tick_times
from .spans import span_to_window
from .training.metrics import predicted_saliency, predicted_windows

PREDICTED, TRUE, SALIENCY = "#d1495b", "#2e7d32", "#33658a"
SOURCES = (PREDICTED, SALIENCY, "#c17c00", "#6d597a", "#3a3a3a")  # one color per source of predictions
WIDTH = 11  # inches
DPI, MAX_PIXELS = 110, 2**16  # resolution, and the maximum height and width of a figure
TOP, BAR = 1.15, 0.3  # upper end of a panel and height of a bar: curves are drawn from 0 to 1, bars below 0
RANK, GAP = 0.16, 0.12  # height of one ranked window, and space above the windows of a source
OUTLINE = 2  # points around a bar of a timeline: 4 s of two hours would be less than a pixel
MAX_TICKS = 13  # of a timeline
TOP_K = 5  # default number of windows per source


def check_picture(path: str | os.PathLike, name: str) -> None:
    """
    Raise `ValueError` unless the extension of a path is a known format and its folder exists. The message begins with
    `name`.
    """
    formats = FigureCanvasBase.get_supported_filetypes()
    if _format(path) not in formats:
        raise ValueError(f"{name} {path}: the extension must be one of {', '.join(sorted(formats))}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"{name} {path}: there is no folder {Path(path).parent}")


def _format(path: str | os.PathLike) -> str:
    return Path(path).suffix.lstrip(".").lower() or "png"


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """
    Save a figure, atomically, in the format of the path's extension.

    Raises:
        ValueError: if the format is unknown or the figure is too large.
    """
    if max(figure.get_size_inches()) * DPI > MAX_PIXELS:
        raise ValueError(f"{path}: the figure exceeds {MAX_PIXELS} pixels; draw fewer windows or panels")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=_format(path), dpi=DPI, bbox_inches="tight")


def _drawable(text: str) -> str:
    """Replace lone surrogates, which file names may contain but Matplotlib cannot draw."""
    return text.encode(errors="replace").decode()


def _draw_curve(axes: Axes, scores: Sequence[float] | np.ndarray, clip_seconds: float, **style) -> None:
    """Draw the scores of clips, scaled to [0, 1] because saliency has no unit."""
    values = np.asarray(scores)
    low, high = values.min(), max(values.max(), values.min() + 1e-6)
    axes.plot((np.arange(len(values)) + 0.5) * clip_seconds, (values - low) / (high - low), linewidth=1.2, **style)


def _draw_windows(axes: Axes, y: float, windows: Sequence[Sequence[float]], color: str, **style) -> None:
    """Draw windows [start, end] in seconds as bars at one height. They share one legend entry."""
    style = {"height": BAR, "alpha": 0.75, **style}
    for start, end in windows:
        axes.barh(y, end - start, left=start, color=color, **style)
        style["label"] = None


def _finish_panel(axes: Axes, query: str, duration: float, bottom: float, top: float = TOP) -> None:
    axes.set(xlim=(0, duration), ylim=(bottom, top))
    title = "\n".join(textwrap.wrap(f"“{_drawable(query)}”", 130))
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_moments(axes: Axes, moments: Sequence[Mapping[str, float]], duration: float) -> None:
    """Draw moments as bars, with their scores below. Where scores would overlap, only the best one is written."""
    windows = [(moment["start"], moment["end"]) for moment in moments]
    _draw_windows(axes, -0.25, windows, PREDICTED, edgecolor=PREDICTED, linewidth=OUTLINE, label="found (score)")
    written: list[float] = []  # positions of the scores
    for moment in moments:
        # Half of the text at either end of the panel would be outside
        middle = np.clip((moment["start"] + moment["end"]) / 2, 0.015 * duration, 0.985 * duration)
        if all(abs(middle - other) > duration / 25 for other in written):
            written.append(middle)
            axes.text(middle, -0.62, f"{moment['score']:.2f}", ha="center", va="center", fontsize=7, color=PREDICTED)
    if not moments:
        axes.text(0, -0.25, "no moment found", va="center", fontsize=8, color=PREDICTED)


def plot_timeline(
    queries: Sequence[str],
    results: Sequence[dict[str, Any]],
    duration: float,
    frames: Sequence[np.ndarray],
    truth: Sequence[Sequence[Sequence[float]]] | None = None,
) -> Figure:
    """
    Plot one panel per query, with its saliency as a curve (see `saliency_curve`) and the predicted and true moments as
    bars, above a row of frames. It is readable for hours of video: bars have a minimum width.

    Args:
        queries: sentences.
        results: one per query, from the pipeline with `return_saliency=True`.
        duration: length of the video in seconds.
        frames: arrays (H, W, 3), evenly spaced over the video.
        truth: the true windows of each query, in seconds; `None` if unknown.
    """
    figure = Figure(figsize=(WIDTH, 1.6 * len(queries) + 1.2))
    grid = figure.add_gridspec(len(queries) + 1, 1, height_ratios=[1.6] * len(queries) + [1], hspace=0.75)
    ticks = tick_times(duration, MAX_TICKS)
    for index, (query, result) in enumerate(zip(queries, results)):
        axes = figure.add_subplot(grid[index])
        axes.plot(*curve_points(result), linewidth=1.2, color=SALIENCY, label=SALIENCY_LABEL)
        _draw_moments(axes, result["moments"], duration)
        true_windows = truth[index] if truth is not None else []
        _draw_windows(axes, -1.0, true_windows, TRUE, edgecolor=TRUE, linewidth=OUTLINE, label="true")
        _finish_panel(axes, query, duration, bottom=-1.3)
        axes.set_yticks([])
        axes.set_xticks(ticks, [tick_label(tick, ticks) for tick in ticks], fontsize=8)
        axes.legend(fontsize=7, loc="upper right", ncols=3, bbox_to_anchor=(1, 1.28), frameon=False)

    strip = figure.add_subplot(grid[len(queries)])
    slot = duration / len(frames)
    for index, frame in enumerate(frames):
        strip.imshow(frame, extent=(index * slot, (index + 0.96) * slot, 0, 1), aspect="auto")
    strip.set(xlim=(0, duration), ylim=(0, 1), xticks=[], yticks=[])
    strip.spines[:].set_visible(False)
    return figure


def _draw_ranked(axes: Axes, y: float, windows: np.ndarray, color: str) -> None:
    """Draw windows (P, 3), [start, end, score], as bars from `y` down, with the scores in a column on the right."""
    for rank, (start, end, score) in enumerate(windows):
        middle = y - (rank + 0.5) * RANK
        strength = 0.25 + 0.65 * np.clip(score, 0, 1)
        _draw_windows(axes, middle, [(start, end)], color, height=0.8 * RANK, alpha=strength)
        place = axes.get_yaxis_transform()
        axes.text(1.005, middle, f"{score:.2f}", transform=place, va="center", fontsize=7, color=color)


def prediction_panels(num_rows: int, num_sources: int, top_k: int = TOP_K) -> list[Axes]:
    """Return the panels of a new figure, from top to bottom, in which `plot_predictions` can draw several rows."""
    for name, number in {"num_rows": num_rows, "num_sources": num_sources, "top_k": top_k}.items():
        check_positive(number, name)
    height = 1.6 + num_sources * (top_k * RANK + GAP)
    figure = Figure(figsize=(WIDTH, num_rows * (height + 0.6)), layout=ConstrainedLayoutEngine(h_pad=0.12))
    return list(figure.subplots(num_rows, 1, squeeze=False)[:, 0])


def plot_predictions(
    row: Mapping[str, Any],
    predictions: Mapping[str, Mapping[str, Any]],
    top_k: int = TOP_K,
    clip_seconds: float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """
    Plot the predictions for one query beside the truth (the paper's Figure 5).

    From top to bottom: saliency, with the annotators' mean as an area and each source's scores as a curve; the true
    windows; each source's windows by descending score. A higher score, written on the right, gives a stronger color.

    Args:
        row: an annotation from `load_annotations`. Its windows and saliency are drawn if it has them.
        predictions: the prediction of each source for this row, by the name of the source, in the official format
            (`pred_relevant_windows` in seconds and, optionally, `pred_saliency_scores`).
        top_k: maximum number of windows to draw per source.
        clip_seconds: seconds per entry of `pred_saliency_scores`. Default: 2, the official length, if the row has
            annotated saliency; otherwise the entries divide the duration equally.
        axes: a panel from `prediction_panels` to draw in. Default: a new figure.

    Raises:
        ValueError: if `check_row` rejects the row, or if a prediction is malformed or for another query. The message
            names the source of the prediction.
    """
    row = check_row(row)
    check_positive(top_k, "top_k")
    if clip_seconds is not None:
        check_positive(clip_seconds, "clip_seconds")
    elif row.get("saliency_scores"):
        clip_seconds = SALIENCY_CLIP_SECONDS
    axes = axes or prediction_panels(1, len(predictions), top_k)[0]
    lanes, y = [], 0.0  # (middle, name, color), and where the next one begins
    has_saliency = bool(row.get("saliency_scores"))
    if has_saliency:
        mean = np.zeros(int(row["duration"] / SALIENCY_CLIP_SECONDS))
        mean[row["relevant_clip_ids"]] = np.mean(row["saliency_scores"], axis=1) / MAX_SALIENCY
        axes.stairs(mean, np.arange(len(mean) + 1) * SALIENCY_CLIP_SECONDS, fill=True, color=TRUE, alpha=0.2)
    if row.get("relevant_windows"):
        lanes.append((y - GAP - BAR / 2, "truth", TRUE))
        _draw_windows(axes, lanes[-1][0], row["relevant_windows"], TRUE)
        y -= GAP + BAR
    for (name, prediction), color in zip(predictions.items(), cycle(SOURCES)):
        try:
            if not isinstance(prediction, Mapping):
                raise ValueError(f"a prediction must be a dict, got {str(prediction)[:60]}")
            if str(prediction.get("qid")) != str(row["qid"]):
                raise ValueError(f"the prediction has qid {prediction.get('qid')}, the row has qid {row['qid']}")
            windows = predicted_windows(row["qid"], prediction)
            saliency = predicted_saliency(row["qid"], prediction)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if saliency is not None and len(saliency):
            has_saliency = True
            _draw_curve(axes, saliency, clip_seconds or row["duration"] / len(saliency), color=color)
        best = windows[np.argsort(-windows[:, 2], kind="stable")[:top_k]]
        height = max(1, len(best)) * RANK
        y -= GAP
        lanes.append((y - height / 2, name, color))
        _draw_ranked(axes, y, best, color)
        y -= height
    for edge in np.ravel(row.get("relevant_windows", [])):  # lines down to the last source, as a guide for the eye
        axes.plot([edge, edge], [y, -GAP], color=TRUE, linewidth=0.8, linestyle=":")
    unit = f"seconds of {row['vid']} (qid {row['qid']})"
    if has_saliency:
        lanes.append((0.5, "saliency", "black"))
        area = "area, the annotators' mean; " if row.get("saliency_scores") else ""
        unit += f"; saliency: {area}lines, predicted, each on its own scale"
    _finish_panel(axes, row["query"], row["duration"], bottom=y - 0.05, top=TOP if has_saliency else 0)
    axes.set_yticks(
        [middle for middle, _, _ in lanes], [_drawable(name) for _, name, _ in lanes], fontsize=9, parse_math=False
    )
    for label, (_, _, color) in zip(axes.get_yticklabels(), lanes):
        label.set_color(color)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(_drawable(unit), fontsize=8, parse_math=False)
    return cast(Figure, axes.figure)


def plot_refinement(
    spans: torch.Tensor,
    scores: torch.Tensor,
    covered_duration: float,
    truth: Sequence[Sequence[float]] | None = None,
    title: str = "",
) -> Figure:
    """
    Plot how the proposals of one query are refined from noise, layer by layer (the paper's Figure 1).

    Args:
        spans: (K + 1, N, 2), the `intermediate_spans` of one sample.
        scores: (N,), the foreground scores after the last layer. A higher score gives a darker color.
        covered_duration: seconds that the features cover.
        truth: windows in seconds, drawn as bands.
        title: text above the figure.
    """
    windows = span_to_window(spans.float()).clamp(0, 1).numpy() * covered_duration
    order = scores.argsort().numpy()
    figure = Figure(figsize=(WIDTH, 1.15 * len(windows) + 0.8))
    panels = figure.subplots(len(windows), 1, sharex=True)
    for layer, (axes, layer_windows) in enumerate(zip(panels, windows)):
        for start, end in truth or []:
            axes.axvspan(start, end, color=TRUE, alpha=0.18, linewidth=0)
        layer_windows = layer_windows[order]
        colors = colormaps["plasma_r"](Normalize(-0.15, 1.0)(scores.numpy()[order]))
        rows = np.arange(len(layer_windows))
        axes.barh(rows, layer_windows[:, 1] - layer_windows[:, 0], left=layer_windows[:, 0], height=0.85, color=colors)
        axes.set(xlim=(0, covered_duration), yticks=[])
        axes.set_ylabel("noise" if layer == 0 else f"layer {layer}", fontsize=9, rotation=0, ha="right", va="center")
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_title(_drawable(title), fontsize=10, loc="left", parse_math=False)
    panels[-1].set_xlabel("seconds", fontsize=8)
    return figure


def plot_curves(
    curves: Mapping[str, Mapping[float, Sequence[float]]], x_label: str, y_label: str, title: str = ""
) -> Figure:
    """
    Plot measured values over a variable (the paper's Figures 3 and 4).

    Args:
        curves: the values of one or more runs at each x, by the name of the curve. The line is their mean, the band
            their range.
        x_label, y_label, title: text of the figure.
    """
    figure = Figure(figsize=(0.7 * WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), color in zip(curves.items(), cycle(SOURCES)):
        places = sorted(values)
        axes.plot(
            places, [np.mean(values[x]) for x in places], color=color, marker="o", markersize=4, label=_drawable(name)
        )
        if any(len(values[x]) > 1 for x in places):
            low, high = ([choose(values[x]) for x in places] for choose in (min, max))
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xticks(sorted({x for values in curves.values() for x in values}))
    axes.set_xlabel(_drawable(x_label), fontsize=9, parse_math=False)
    axes.set_ylabel(_drawable(y_label), fontsize=9, parse_math=False)
    lines = [textwrap.fill(line, 95) for line in _drawable(title).splitlines()]
    axes.set_title("\n".join(lines), fontsize=10, loc="left", parse_math=False)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)
    return figure
