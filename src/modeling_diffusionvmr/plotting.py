"""Pictures of results: timelines of a video, and spans as they are refined from noise."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from .annotations import whole_file
from .spans import span_to_window

PREDICTED, TRUE, SALIENCY = "#d1495b", "#2e7d32", "#33658a"


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a picture, whole or not at all; its format is that of the path's extension."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png", dpi=110, bbox_inches="tight")


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
    figure = Figure(figsize=(11, 1.5 * len(queries) + 1.2))
    grid = figure.add_gridspec(len(queries) + 1, 1, height_ratios=[1.5] * len(queries) + [1], hspace=0.55)
    for index, (query, result) in enumerate(zip(queries, results)):
        axes = figure.add_subplot(grid[index])
        centers = (np.arange(len(result["saliency"])) + 0.5) * result["clip_seconds"]
        saliency = np.asarray(result["saliency"])
        low, high = saliency.min(), max(saliency.max(), saliency.min() + 1e-6)
        axes.plot(centers, (saliency - low) / (high - low), color=SALIENCY, linewidth=1.2, label="saliency")
        labelled: list[float] = []  # where a score stands, so that none stands on another
        for rank, moment in enumerate(result["moments"]):
            label = "predicted (score)" if rank == 0 else None
            width = moment["end"] - moment["start"]
            axes.barh(-0.25, width, left=moment["start"], height=0.3, color=PREDICTED, alpha=0.75, label=label)
            middle = moment["start"] + width / 2
            if all(abs(middle - other) > duration / 25 for other in labelled):
                labelled.append(middle)
                axes.text(middle, -0.25, f"{moment['score']:.2f}", ha="center", va="center", fontsize=7, color="white")
        for rank, (start, end) in enumerate(truth[index] if truth is not None else []):
            label = "true" if rank == 0 else None
            axes.barh(-0.65, end - start, left=start, height=0.3, color=TRUE, alpha=0.75, label=label)
        axes.set(xlim=(0, duration), ylim=(-0.95, 1.15), yticks=[])
        axes.set_title(f"“{query}”", fontsize=10, loc="left")
        axes.legend(fontsize=7, loc="upper right", ncols=3, bbox_to_anchor=(1, 1.28), frameon=False)
        axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("seconds", fontsize=8)

    strip = figure.add_subplot(grid[len(queries)])
    slot = duration / len(frames)
    for index, frame in enumerate(frames):
        strip.imshow(frame, extent=(index * slot, (index + 0.96) * slot, 0, 1), aspect="auto")
    strip.set(xlim=(0, duration), ylim=(0, 1), xticks=[], yticks=[])
    strip.spines[:].set_visible(False)
    return figure


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
    figure = Figure(figsize=(11, 1.15 * len(windows) + 0.8))
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
