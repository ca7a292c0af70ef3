"""The paper's tables and figures: what it prints, what is measured of a trained model, and both side by side."""

import csv
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from modeling_diffusionvmr.data.files import atomic_write
from modeling_diffusionvmr.spans import iou_and_generalized_iou, keep_inside, window_to_span
from modeling_diffusionvmr.training.collator import DiffusionVMRDataCollator
from modeling_diffusionvmr.training.dataset import MomentRetrievalDataset
from modeling_diffusionvmr.training.metrics import evaluate_predictions
from modeling_diffusionvmr.training.prediction import MODEL_INPUTS, predict_moments

BATCH_SIZE = 100
SECONDS_COLUMNS = {1: "seconds (batch 1)", 100: "seconds (batch 100)"}
METRICS = {
    "R1@0.1": ("extra", "MR-R1@0.1"),
    "R1@0.3": ("extra", "MR-R1@0.3"),
    "R1@0.5": ("brief", "MR-full-R1@0.5"),
    "R1@0.7": ("brief", "MR-full-R1@0.7"),
    "mAP@0.5": ("brief", "MR-full-mAP@0.5"),
    "mAP@0.75": ("brief", "MR-full-mAP@0.75"),
    "mAP@Avg": ("brief", "MR-full-mAP"),
}
"""The paper's names, and where `evaluate_predictions` has them."""
SELECTION = ("best IoU", "chosen IoU", "chosen / true width")
"""What `selection` gives: whether a moment is not among the proposals, or among them and not chosen."""


class PaperTable(NamedTuple):
    """A table as printed: what its rows are, on which data, the columns, and the rows by label; `None` for a dash."""

    rows_are: str
    data: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]


ABLATION_COLUMNS = ("R1@0.5", "R1@0.7", "mAP@Avg")
PAPER = {
    1: PaperTable(
        "method",
        "QVHighlights test",
        ("R1@0.5", "R1@0.7", "mAP@0.5", "mAP@0.75", "mAP@Avg"),
        {
            "MCN": (11.41, 2.72, 24.94, 8.22, 10.67),
            "CAL": (25.49, 11.54, 23.40, 7.65, 9.89),
            "CLIP": (16.88, 5.19, 18.11, 7.00, 7.67),
            "XML": (41.83, 30.35, 44.63, 31.73, 32.14),
            "XML+": (46.69, 33.46, 47.89, 34.67, 34.90),
            "Moment-DETR": (52.89, 33.02, 54.82, 29.40, 30.73),
            "UMT (with audio)": (56.23, 41.18, 53.83, 37.01, 36.12),
            "DiffusionVMR": (61.61, 44.49, 61.55, 40.17, 39.92),
        },
    ),
    2: PaperTable(
        "method",
        "Charades-STA test",
        ("R1@0.5", "R1@0.7"),
        {
            "SAP (VGG)": (27.42, 13.36),
            "SM-RL (VGG)": (24.36, 11.17),
            "TripNet (VGG)": (36.61, 14.50),
            "MAN (VGG)": (41.24, 20.54),
            "2D-TAN (VGG)": (40.94, 22.85),
            "FVMR (VGG)": (42.36, 24.14),
            "UMT (VGG, optical flow)": (49.35, 26.16),
            "DiffusionVMR (VGG)": (54.65, 32.26),
            "CAL (SlowFast, CLIP)": (47.31, 30.19),
            "2D-TAN (SlowFast, CLIP)": (39.70, 23.31),
            "VSLNet (SlowFast, CLIP)": (47.31, 30.19),
            "IVG-DCL (SlowFast, CLIP)": (50.24, 32.88),
            "Moment-DETR (SlowFast, CLIP)": (53.63, 31.37),
            "DiffusionVMR (SlowFast, CLIP)": (55.11, 33.74),
        },
    ),
    3: PaperTable(
        "method",
        "TACoS test",
        ("R1@0.1", "R1@0.3", "R1@0.5"),
        {
            "MCN": (14.42, None, 5.58),
            "CTRL": (24.32, 18.32, 13.30),
            "MCF": (25.84, 18.64, 12.53),
            "TGN": (41.87, 21.77, 18.90),
            "ACRN": (24.22, 19.52, 14.62),
            "ROLE": (20.37, 15.38, 9.94),
            "VAL": (25.74, 19.76, 14.74),
            "ACL-K": (31.64, 24.17, 20.01),
            "CMIN": (36.68, 27.33, 19.57),
            "SM-RL": (26.51, 20.25, 15.95),
            "SLTA": (23.13, 17.07, 11.92),
            "SAP": (31.15, None, 18.24),
            "TripNet": (None, 23.95, 19.17),
            "2D-TAN": (47.59, 37.29, 25.32),
            "CSMGAN": (42.74, 33.90, 27.09),
            "FIAN": (39.55, 33.87, 28.58),
            "LGN": (52.46, 41.71, 30.57),
            "SMRN": (50.44, 42.49, 32.07),
            "VLG-Net": (57.21, 45.46, 34.19),
            "DiffusionVMR": (58.09, 45.41, 32.44),
        },
    ),
    4: PaperTable(
        "sampling steps",
        "QVHighlights val",
        (*ABLATION_COLUMNS, *SECONDS_COLUMNS.values()),  # seconds on one RTX 3090
        {
            "1": (61.56, 47.51, 41.43, 0.061, 1.825),
            "2": (61.87, 47.55, 41.48, 0.116, 3.367),
            "4": (61.15, 47.07, 41.35, 0.194, 6.818),
            "6": (60.81, 47.11, 41.17, 0.273, 10.651),
            "8": (60.96, 47.27, 41.32, 0.354, 15.063),
        },
    ),
    5: PaperTable(
        "loss",
        "QVHighlights val",
        ABLATION_COLUMNS,
        {
            "without l1": (60.32, 44.97, 39.68),
            "without iou": (61.45, 46.13, 38.99),
            "without hinge": (61.74, 46.45, 40.32),
            "without contrastive": (58.90, 43.16, 38.62),
            "without class": (43.03, 27.68, 30.84),
            "all terms": (62.58, 48.45, 41.51),
        },
    ),
    6: PaperTable(
        "proposals in training",
        "QVHighlights val",
        ABLATION_COLUMNS,
        {"stable": (58.39, 42.19, 37.23), "progress": (59.81, 45.29, 39.82)},
    ),
}
"""Tables 1 to 6 of arXiv 2308.15109v1. Figures 3 and 4 are pictures there, and print no numbers."""


# What is measured


def evaluate_model(
    model, dataset: MomentRetrievalDataset, num_proposals: int | None = None, num_sampling_steps: int | None = None
) -> dict[str, Any]:
    """The official metrics, and as `"settings"` what they depend on."""
    num_proposals = num_proposals or model.config.num_proposals
    num_sampling_steps = num_sampling_steps or model.config.num_sampling_steps
    predictions = predict_moments(model, dataset, BATCH_SIZE, num_proposals, num_sampling_steps)
    processor = dataset.processor
    settings = {name: getattr(processor, name) for name in ("threshold", "top_k", "nms_threshold", "round_to")}
    settings |= {"num_proposals": num_proposals, "num_sampling_steps": num_sampling_steps}
    scores = evaluate_predictions(predictions, dataset.rows)
    return {**scores, "selection": selection(predictions, dataset.rows), "settings": settings}


def selection(predictions: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """
    How good the best of all proposals is, and how good the one that has the highest score.

    Returns:
        `"best IoU"` and `"chosen IoU"`: IoU with that true window which it overlaps most, the mean over queries;
        `"chosen / true width"`: the median of their widths' ratio over queries whose chosen window touches a true one.
    """
    best, chosen, ratios = [], [], []
    for prediction, row in zip(predictions, rows):
        windows = torch.tensor(prediction["pred_relevant_windows"], dtype=torch.float64)[:, :2]  # by falling score
        truth = window_to_span(torch.tensor(row["relevant_windows"], dtype=torch.float64))
        ious = iou_and_generalized_iou(window_to_span(windows)[:, None], truth)[0]
        best.append(ious.max().item())
        iou, index = ious[0].max(0)
        chosen.append(iou.item())
        if iou > 0:
            ratios.append(((windows[0, 1] - windows[0, 0]) / truth[index, 1]).item())
    values = (statistics.mean(best), statistics.mean(chosen), statistics.median(ratios) if ratios else None)
    return dict(zip(SELECTION, values))


def _on_device(batch: Mapping[str, Any], model) -> dict[str, Tensor]:
    return {
        name: batch[name].to(model.device, model.dtype if batch[name].is_floating_point() else None)
        for name in MODEL_INPUTS
    }


@torch.inference_mode()
def layer_ious(model, dataset: MomentRetrievalDataset) -> dict[str, Any]:
    """
    IoU with the truth by decoder layer (the paper's Figure 4), with one sampling step, before any rounding or NMS.

    Of each query one proposal is compared with that true window which it overlaps most; the mean is over queries.

    Returns:
        `"best of the layer"`: a number a layer, of the proposal to which that layer gives the highest score: what is
        retrieved when the layers after it are left out. `"best of the last layer"`: a number for the noise and for each
        layer, of the proposal to which the last layer gives the highest score, followed from the noise on.
    """
    model.eval()
    own, followed = [], []
    loader = DataLoader(dataset, BATCH_SIZE, collate_fn=DiffusionVMRDataCollator(with_rows=True))
    for batch in tqdm(loader, desc="layers"):
        outputs = model(**_on_device(batch, model), num_sampling_steps=1)
        spans = keep_inside(outputs.intermediate_spans.float(), 0.0).cpu()  # (B, K + 1, N, 2)
        best = outputs.intermediate_logits.float().softmax(-1)[..., 0].argmax(-1).cpu()  # (B, K)
        for index, row in enumerate(batch["rows"].tolist()):
            windows = torch.tensor(dataset.rows[row]["relevant_windows"], dtype=torch.float32)
            truth = window_to_span(windows / batch["covered_durations"][index].float())
            ious = iou_and_generalized_iou(spans[index, ..., None, :], truth)[0].amax(-1)  # (K + 1, N)
            own.append(ious[1:].gather(1, best[index, :, None])[:, 0])
            followed.append(ious[:, best[index, -1]])
    means = {"best of the layer": own, "best of the last layer": followed}
    settings = {"num_proposals": model.config.num_proposals, "num_sampling_steps": 1, "nms_threshold": None}
    return {name: torch.stack(values).mean(0).tolist() for name, values in means.items()} | {"settings": settings}


@torch.inference_mode()
def sampling_seconds(
    model, dataset: MomentRetrievalDataset, batch_size: int, steps: Iterable[int], repeats: int
) -> dict[str, float]:
    """
    Seconds of the model alone, one encoding and S calls of the decoder, by S: the median of `repeats`, which take turns
    so that what else the machine does is shared fairly, after one that does not count.
    """
    model.eval()
    samples = dataset.__getitems__([index % len(dataset) for index in range(batch_size)])
    inputs = _on_device(DiffusionVMRDataCollator()(samples), model)

    def wait():
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    seconds = {str(num_steps): [] for num_steps in steps}
    for _ in tqdm(range(1 + repeats), desc=f"seconds of batches of {batch_size}"):
        for num_steps, measured in seconds.items():
            wait()
            started = time.perf_counter()
            model(**inputs, num_sampling_steps=int(num_steps))
            wait()
            measured.append(time.perf_counter() - started)
    return {num_steps: statistics.median(measured[1:]) for num_steps, measured in seconds.items()}


# Side by side


class Measured(NamedTuple):
    """A row's numbers by column, a dict a run (seeds), and what stands beside them."""

    runs: Sequence[Mapping[str, float | None]]
    beside: Mapping[str, Any] = {}


def metric_columns(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Metrics as `evaluate_predictions` gives them, by the paper's names."""
    figures = {column: metrics.get(part, {}).get(key) for column, (part, key) in METRICS.items()}
    return figures | metrics.get("selection", {})


def settings_beside(settings: Mapping[str, Any]) -> dict[str, Any]:
    """N, S and NMS of an evaluation's settings."""
    nms = settings.get("nms_threshold")
    return {
        "N": settings.get("num_proposals"),
        "S": settings.get("num_sampling_steps"),
        "NMS": "none" if nms is None else nms,
    }


def table_rows(
    rows_are: str, columns: Sequence[str], entries: Iterable[tuple[str, str, Measured]]
) -> list[dict[str, Any]]:
    """
    Rows of a CSV file: for each entry (label, by whom, numbers) the mean over its runs, and of several runs the least
    and the most.
    """
    rows = []
    for label, by, measured in entries:
        row = {rows_are: label, "by": by, "runs": len(measured.runs) if by == "ours" else None}
        spread = {}
        for column in columns:
            values = [run[column] for run in measured.runs if run.get(column) is not None]
            digits = 2 if column in METRICS else 4
            row[column] = round(statistics.mean(values), digits) if values else None
            for name, choose in (("min", min), ("max", max)):
                spread[f"{column} {name}"] = round(choose(values), digits) if len(values) > 1 else None
        rows.append({**row, **spread, **measured.beside})
    return rows


def paper_table(number: int, ours: Mapping[str, Measured], beside: Mapping[str, Any]) -> list[dict[str, Any]]:
    """
    One of Tables 1 to 6: each row of the paper's, and after it ours of the same label; ours of other labels at the end.

    Args:
        number: of the table.
        ours: by label; columns that are seconds also get their ratio to one sampling step, as do the paper's.
        beside: what stands beside every one of our rows.
    """
    paper = PAPER[number]
    seconds = [column for column in paper.columns if column in SECONDS_COLUMNS.values()]
    entries = []
    for label in [*paper.rows, *(label for label in ours if label not in paper.rows)]:
        if label in paper.rows:
            figures = dict(zip(paper.columns, paper.rows[label]))
            device = {"device": "NVIDIA RTX 3090"} if seconds else {}
            paper_beside = {"data": paper.data, "simulated features": "no", **device}
            entries.append((label, "paper", Measured([figures], paper_beside)))
        if label in ours and ours[label].runs:
            entries.append((label, "ours", ours[label]._replace(beside={**beside, **ours[label].beside})))
    columns = (*paper.columns, *(SELECTION if seconds else ()))
    rows = table_rows(paper.rows_are, columns, entries)
    for column in seconds:
        one_step = {row["by"]: row[column] for row in rows if row[paper.rows_are] == "1"}
        for row in rows:
            known = row[column] is not None and one_step.get(row["by"])
            row[f"{column} / one step"] = round(row[column] / one_step[row["by"]], 2) if known else None
    return rows


def save_csv(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Writes rows, whole or not at all; what a row does not have is left empty."""
    fields = dict.fromkeys(field for row in rows for field in row)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_curve(path: str | os.PathLike) -> dict[int, float]:
    """
    mAP@Avg by number of proposals from a CSV file with the columns `N` and `mAP@Avg`.

    Raises:
        ValueError: for another file; it names the line.
    """
    with open(path, encoding="utf-8", newline="") as file:
        return dict(_curve_points(csv.DictReader(file), Path(path)))


def _curve_points(lines: csv.DictReader, path: Path) -> Iterator[tuple[int, float]]:
    for line in lines:
        try:
            yield int(line["N"]), float(line["mAP@Avg"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"{path}, line {lines.line_num}: needs the columns `N` and `mAP@Avg` with numbers"
            ) from None
