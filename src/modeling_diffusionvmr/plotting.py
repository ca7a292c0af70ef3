"""Pictures of results: timelines of a video, predictions beside the truth, and spans as they are refined from noise."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .data.annotations import SALIENCY_CLIP_SECONDS, check_row
from .data.files import atomic_write
from .spans import span_to_window
from .training.metrics import predicted_saliency, predicted_windows

PREDICTED, TRUE, SALIENCY = "#d1495b", "#2e7d32", "#33658a"
SOURCES = (PREDICTED, SALIENCY, "#c17c00", "#6d597a", "#3a3a3a")  # a colour a source of predictions
MOST_SALIENT = 4  # what people gave at most
WIDTH = 11  # of a picture in inches
TOP, BAR = 1.15, 0.3  # of a panel: curves are drawn from 0 to 1, bars of this height below 0
RANK, GAP, TOP_K = 0.16, 0.12, 5  # of a source's windows: the height of one, the space above them, and how many


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a picture, whole or not at all; its format is that of the path's extension."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=110, bbox_inches="tight")


def _draw_curve(axes: Axes, scores: Sequence[float], clip_seconds: float, **style) -> None:
    """Scores of clips, scaled to [0, 1]: saliency has no unit."""
    scores = np.asarray(scores)
    low, high = scores.min(), max(scores.max(), scores.min() + 1e-6)
    axes.plot((np.arange(len(scores)) + 0.5) * clip_seconds, (scores - low) / (high - low), linewidth=1.2, **style)


def _draw_windows(axes: Axes, y: float, windows: Sequence[Sequence[float]], color: str, **style) -> None:
    """Bars for windows [start, end] in seconds, all at one height; a label is that of all."""
    style = {"height": BAR, "alpha": 0.75, **style}
    for start, end in windows:
        axes.barh(y, end - start, left=start, color=color, **style)
        style["label"] = None


def _finish_panel(axes: Axes, query: str, duration: float, bottom: float, top: float = TOP) -> None:
    axes.set(xlim=(0, duration), ylim=(bottom, top))
    axes.set_title("\n".join(textwrap.wrap(f"“{query}”", 130)), fontsize=10, loc="left")
    axes.spines[["top", "right", "left"]].set_visible(False)


def plot_timeline(
    queries: Sequence[str],
    results: Sequence[dict[str, Any]],
    duration: float,
    frames: Sequence[np.ndarray],
    truth: Sequence[Sequence[Sequence[float]]] | None = None,
) -> Figure:
    """
    A panel a query with its saliency as a curve, and predicted and true moments as bars; frames along the bottom.

    Args:
        queries: the sentences.
        results: of the pipeline with `return_saliency=True`, one a query.
        duration: seconds of the video.
        frames: (H, W, 3) each, spread evenly over the video.
        truth: for each query its windows in seconds; `None` where it is not known.
    """
    figure = Figure(figsize=(WIDTH, 1.5 * len(queries) + 1.2))
    grid = figure.add_gridspec(len(queries) + 1, 1, height_ratios=[1.5] * len(queries) + [1], hspace=0.55)
    for index, (query, result) in enumerate(zip(queries, results)):
        axes = figure.add_subplot(grid[index])
        _draw_curve(axes, result["saliency"], result["clip_seconds"], color=SALIENCY, label="saliency")
        windows = [(moment["start"], moment["end"]) for moment in result["moments"]]
        _draw_windows(axes, -0.25, windows, PREDICTED, label="predicted (score)")
        labelled: list[float] = []  # where a score stands, so that none stands on another
        for moment in result["moments"]:
            middle = (moment["start"] + moment["end"]) / 2
            if all(abs(middle - other) > duration / 25 for other in labelled):
                labelled.append(middle)
                axes.text(middle, -0.25, f"{moment['score']:.2f}", ha="center", va="center", fontsize=7, color="white")
        _draw_windows(axes, -0.65, truth[index] if truth is not None else [], TRUE, label="true")
        _finish_panel(axes, query, duration, bottom=-0.95)
        axes.set_yticks([])
        axes.legend(fontsize=7, loc="upper right", ncols=3, bbox_to_anchor=(1, 1.28), frameon=False)
    axes.set_xlabel("seconds", fontsize=8)

    strip = figure.add_subplot(grid[len(queries)])
    slot = duration / len(frames)
    for index, frame in enumerate(frames):
        strip.imshow(frame, extent=(index * slot, (index + 0.96) * slot, 0, 1), aspect="auto")
    strip.set(xlim=(0, duration), ylim=(0, 1), xticks=[], yticks=[])
    strip.spines[:].set_visible(False)
    return figure


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < np.inf:
            raise ValueError(f"`{name}` must be above 0, got {number}")


def _draw_ranked(axes: Axes, y: float, windows: np.ndarray, color: str) -> None:
    """Bars for windows (P, 3), [start, end, score], from `y` down; their scores are a column on the right."""
    for rank, (start, end, score) in enumerate(windows):
        middle = y - (rank + 0.5) * RANK
        strength = 0.25 + 0.65 * np.clip(score, 0, 1)
        _draw_windows(axes, middle, [(start, end)], color, height=0.8 * RANK, alpha=strength)
        style = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 7, "color": color}
        axes.text(1.005, middle, f"{score:.2f}", **style)


def prediction_panels(num_rows: int, num_sources: int, top_k: int = TOP_K) -> list[Axes]:
    """The panels of a new picture, one under the other, for `plot_predictions` of several rows."""
    _check_positive(num_rows=num_rows, num_sources=num_sources, top_k=top_k)
    height = 1.6 + num_sources * (top_k * RANK + GAP)
    figure = Figure(figsize=(WIDTH, num_rows * (height + 0.6)), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)
    return list(figure.subplots(num_rows, 1, squeeze=False)[:, 0])


def plot_predictions(
    row: Mapping[str, Any],
    predictions: Mapping[str, Mapping[str, Any]],
    top_k: int = TOP_K,
    clip_seconds: float | None = None,
    axes: Axes | None = None,
) -> Figure:
    """
    Predictions of one query beside the truth (the paper's Figure 5).

    From top to bottom: saliency, with the people's mean as an area and each source's as a curve; the true windows; each
    source's windows by falling score, which stands on the right and which a stronger colour tells.

    Args:
        row: of `load_annotations`; true windows and saliency are drawn where it has them.
        predictions: by the name of their source, each in the official format (`pred_relevant_windows` in seconds and,
            if any, `pred_saliency_scores`), for this row.
        top_k: windows of a source at most.
        clip_seconds: seconds that one of `pred_saliency_scores` covers; by default 2, as officially, where the row has
            annotators' scores, and otherwise they share the duration.
        axes: one of `prediction_panels` to draw in, by default of a new picture.

    Raises:
        ValueError: for a row or a prediction of another shape, or of another query than the row's; it names the source.
    """
    row = check_row(row)
    _check_positive(top_k=top_k, clip_seconds=1 if clip_seconds is None else clip_seconds)
    if clip_seconds is None and row.get("saliency_scores"):
        clip_seconds = SALIENCY_CLIP_SECONDS
    axes = axes or prediction_panels(1, len(predictions), top_k)[0]
    lanes, y = [], 0.0  # (middle, name, colour), and where the next one begins
    has_saliency = bool(row.get("saliency_scores"))
    if has_saliency:
        mean = np.zeros(int(row["duration"] / SALIENCY_CLIP_SECONDS))
        mean[row["relevant_clip_ids"]] = np.mean(row["saliency_scores"], axis=1) / MOST_SALIENT
        axes.stairs(mean, np.arange(len(mean) + 1) * SALIENCY_CLIP_SECONDS, fill=True, color=TRUE, alpha=0.2)
    if row.get("relevant_windows"):
        lanes.append((y - GAP - BAR / 2, "truth", TRUE))
        _draw_windows(axes, lanes[-1][0], row["relevant_windows"], TRUE)
        y -= GAP + BAR
    for (name, prediction), color in zip(predictions.items(), cycle(SOURCES)):
        try:
            if str(prediction.get("qid")) != str(row["qid"]):
                raise ValueError(f"the prediction is of qid {prediction.get('qid')}, the row of qid {row['qid']}")
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
    for edge in np.ravel(row.get("relevant_windows", [])):  # down to the last source, for the eye
        axes.plot([edge, edge], [y, -GAP], color=TRUE, linewidth=0.8, linestyle=":")
    unit = f"seconds of {row['vid']} (qid {row['qid']})"
    if has_saliency:
        lanes.append((0.5, "saliency", "black"))
        unit += "; saliency: area, the mean that people gave; lines, predicted, each to its own scale"
    _finish_panel(axes, row["query"], row["duration"], bottom=y - 0.05, top=TOP if has_saliency else 0)
    axes.set_yticks([middle for middle, _, _ in lanes], [name for _, name, _ in lanes], fontsize=9)
    for label, (_, _, color) in zip(axes.get_yticklabels(), lanes):
        label.set_color(color)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit, fontsize=8)
    return axes.figure


def plot_refinement(
    spans: torch.Tensor,
    scores: torch.Tensor,
    covered_duration: float,
    truth: Sequence[Sequence[float]] | None = None,
    title: str = "",
) -> Figure:
    """
    How the proposals of one query are refined from noise, layer by layer (the paper's Figure 1).

    Args:
        spans: (K + 1, N, 2), `intermediate_spans` of one sample.
        scores: (N,), the foreground scores after the last layer; darker proposals end with a higher one.
        covered_duration: seconds that the features cover.
        truth: windows in seconds, drawn as bands.
    """
    windows = span_to_window(spans.float()).clamp(0, 1).numpy() * covered_duration
    order = scores.argsort().numpy()
    figure = Figure(figsize=(WIDTH, 1.15 * len(windows) + 0.8))
    panels = figure.subplots(len(windows), 1, sharex=True)
    for layer, (axes, layer_windows) in enumerate(zip(panels, windows)):
        for start, end in truth or []:
            axes.axvspan(start, end, color=TRUE, alpha=0.18, linewidth=0)
        layer_windows = layer_windows[order]
        colours = colormaps["plasma_r"](Normalize(-0.15, 1.0)(scores.numpy()[order]))
        rows = np.arange(len(layer_windows))
        axes.barh(rows, layer_windows[:, 1] - layer_windows[:, 0], left=layer_windows[:, 0], height=0.85, color=colours)
        axes.set(xlim=(0, covered_duration), yticks=[])
        axes.set_ylabel("noise" if layer == 0 else f"layer {layer}", fontsize=9, rotation=0, ha="right", va="center")
        axes.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_title(title, fontsize=10, loc="left")
    panels[-1].set_xlabel("seconds", fontsize=8)
    return figure


def plot_curves(
    curves: Mapping[str, Mapping[float, Sequence[float]]], x_label: str, y_label: str, title: str = ""
) -> Figure:
    """
    Numbers by number (the paper's Figures 3 and 4).

    Args:
        curves: by name, and of each the values at each x, one a run: the line is their mean, the band goes from the
            least to the most.
        x_label, y_label, title: what is written.
    """
    figure = Figure(figsize=(0.7 * WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), color in zip(curves.items(), cycle(SOURCES)):
        places = sorted(values)
        axes.plot(places, [np.mean(values[x]) for x in places], color=color, marker="o", markersize=4, label=name)
        if any(len(values[x]) > 1 for x in places):
            low, high = ([choose(values[x]) for x in places] for choose in (min, max))
            axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xticks(sorted({x for values in curves.values() for x in values}))
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(y_label, fontsize=9)
    axes.set_title("\n".join(textwrap.fill(line, 95) for line in title.splitlines()), fontsize=10, loc="left")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return figure
