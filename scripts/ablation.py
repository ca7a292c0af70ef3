"""
Numbers for the paper's tables and figures: the printed ones, those measured on a trained model, and both side by side.

`paper_tables.csv` contains Tables 1 to 6 of the paper (arXiv 2308.15109v1), one line per printed row, in the printed
order and with the printed digits:

- `table`: the number of the table.
- `data`: the dataset and the split it was measured on.
- `rows are`: what distinguishes the rows of this table.
- `row`: the row's label, without citation and with the table's features column, if any, in parentheses.
- one column per metric, in the order of the tables. A dash is a dash in the paper. An empty cell means that this table
  does not have the column. Seconds (Table 4) were measured on one NVIDIA RTX 3090.

Figures 3 and 4 are pictures in the paper and print no numbers.
"""

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
from modeling_diffusionvmr.processing_diffusionvmr import POST_PROCESSING
from modeling_diffusionvmr.spans import iou_and_generalized_iou, keep_inside, window_to_span
from modeling_diffusionvmr.training.collator import DiffusionVMRDataCollator
from modeling_diffusionvmr.training.dataset import MomentRetrievalDataset
from modeling_diffusionvmr.training.metrics import evaluate_predictions
from modeling_diffusionvmr.training.prediction import MODEL_INPUTS, predict_moments

BATCH_SIZE = 100
SECONDS_COLUMNS = {1: "seconds (batch 1)", 100: "seconds (batch 100)"}  # by batch size
METRICS = {
    "R1@0.1": ("extra", "MR-R1@0.1"),
    "R1@0.3": ("extra", "MR-R1@0.3"),
    "R1@0.5": ("brief", "MR-full-R1@0.5"),
    "R1@0.7": ("brief", "MR-full-R1@0.7"),
    "mAP@0.5": ("brief", "MR-full-mAP@0.5"),
    "mAP@0.75": ("brief", "MR-full-mAP@0.75"),
    "mAP@Avg": ("brief", "MR-full-mAP"),
}
"""The paper's name of each metric, and the (part, key) under which `evaluate_predictions` returns it."""
SELECTION = ("best IoU", "chosen IoU", "chosen / true width")
"""The keys of `selection`. They distinguish moments that no proposal covers from moments that are not chosen."""


class PaperTable(NamedTuple):
    """
    A table as printed.

    Args:
        rows_are: what distinguishes the rows, such as "method".
        data: dataset and split.
        columns: names of the metrics.
        rows: one value per column, by the row's label; `None` for a dash.
    """

    rows_are: str
    data: str
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]


def read_paper_tables(path: str | os.PathLike) -> dict[int, PaperTable]:
    """Read Tables 1 to 6, by number, from a CSV file in the layout described at the top of this module."""
    tables = {}
    with open(path, encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            number, data, rows_are, label = (line.pop(name) for name in ("table", "data", "rows are", "row"))
            cells = {column: cell for column, cell in line.items() if cell}
            table = tables.setdefault(int(number), PaperTable(rows_are, data, tuple(cells), {}))
            table.rows[label] = tuple(None if cell == "-" else float(cell) for cell in cells.values())
    return tables


PAPER = read_paper_tables(Path(__file__).with_name("paper_tables.csv"))
ABLATION_COLUMNS = PAPER[5].columns


# Measurements


def evaluate_model(
    model, dataset: MomentRetrievalDataset, num_proposals: int | None = None, num_sampling_steps: int | None = None
) -> dict[str, Any]:
    """
    Evaluate a model on a dataset with N proposals and S sampling steps, by default those of its configuration.

    Returns:
        The official metrics, `selection` under `"selection"`, and under `"settings"` everything they depend on.
    """
    num_proposals = num_proposals or model.config.num_proposals
    num_sampling_steps = num_sampling_steps or model.config.num_sampling_steps
    chosen = post_processing(dataset.processor)
    predictions = predict_moments(model, dataset, BATCH_SIZE, num_proposals, num_sampling_steps, **chosen)
    settings = {**chosen, "num_proposals": num_proposals, "num_sampling_steps": num_sampling_steps}
    scores = evaluate_predictions(predictions, dataset.rows)
    return {**scores, "selection": selection(predictions, dataset.rows), "settings": settings}


def post_processing(processor) -> dict[str, Any]:
    """Return how a processor selects moments. It is a setting of an experiment, which applies to its evaluation too."""
    return {name: getattr(processor, name) for name in POST_PROCESSING}


def selection(predictions: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """
    Compare the best proposal of each query with the chosen one, which has the highest score.

    Args:
        predictions: with `pred_relevant_windows` by descending score.
        rows: annotations, in the order of `predictions`.

    Returns:
        `"best IoU"` and `"chosen IoU"`: the highest IoU with any true window, averaged over queries.
        `"chosen / true width"`: the ratio of the chosen window's width to that of the true window it overlaps most, the
        median over queries whose chosen window overlaps any; `None` if there are none.
    """
    best, chosen, ratios = [], [], []
    for prediction, row in zip(predictions, rows):
        windows = torch.tensor(prediction["pred_relevant_windows"], dtype=torch.float64)[:, :2]
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
    Measure the IoU with the truth per decoder layer (the paper's Figure 4): one sampling step, no rounding, no NMS.

    One proposal per query counts, with its highest IoU with any true window; the mean is over queries.

    Returns:
        `"best of the layer"`: K values. In each layer the proposal with the highest score in that layer counts, which
        would be retrieved if the layers after it were removed. `"best of the last layer"`: K + 1 values, for the noise
        and for each layer. In all of them the proposal with the highest score in the last layer counts.
    """
    model.eval()
    own, followed = [], []
    loader = DataLoader(dataset, BATCH_SIZE, collate_fn=DiffusionVMRDataCollator(with_indices=True))
    for batch in tqdm(loader, desc="layers"):
        outputs = model(**_on_device(batch, model), num_sampling_steps=1)
        spans = keep_inside(outputs.intermediate_spans.float(), 0.0).cpu()  # (B, K + 1, N, 2)
        best = outputs.intermediate_logits.float().softmax(-1)[..., 0].argmax(-1).cpu()  # (B, K)
        for place, index in enumerate(batch["indices"].tolist()):
            row = dataset.rows[index]  # without search windows, each row is one sample
            windows = torch.tensor(row["relevant_windows"], dtype=torch.float32)
            truth = window_to_span(windows / batch["covered_durations"][place].float())
            ious = iou_and_generalized_iou(spans[place, ..., None, :], truth)[0].amax(-1)  # (K + 1, N)
            own.append(ious[1:].gather(1, best[place, :, None])[:, 0])
            followed.append(ious[:, best[place, -1]])
    means = {"best of the layer": own, "best of the last layer": followed}
    settings = {"num_proposals": model.config.num_proposals, "num_sampling_steps": 1, "nms_threshold": None}
    return {name: torch.stack(values).mean(0).tolist() for name, values in means.items()} | {"settings": settings}


@torch.inference_mode()
def sampling_seconds(
    model, dataset: MomentRetrievalDataset, batch_size: int, steps: Iterable[int], repeats: int
) -> dict[str, float]:
    """
    Measure the seconds of one forward pass: one call of the encoder and S calls of the decoder.

    The numbers of steps take turns, so that other load on the machine affects all of them alike. The first round is not
    counted.

    Returns:
        The median of `repeats` measurements, by S.
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


# Our numbers beside the paper's


class Measured(NamedTuple):
    """
    The numbers of one row.

    Args:
        runs: one dict per run (seed), from column to value.
        beside: further cells of the row, such as its settings.
    """

    runs: Sequence[Mapping[str, float | None]]
    beside: Mapping[str, Any] = {}


def metric_columns(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return what `evaluate_model` measured by the paper's names, with `None` for missing metrics."""
    figures = {column: metrics.get(part, {}).get(key) for column, (part, key) in METRICS.items()}
    return figures | metrics.get("selection", {})


def settings_beside(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the cells N, S and NMS for the settings of an evaluation."""
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
    Return the rows of a CSV file, with the mean over each entry's runs and, if there are several, minimum and maximum.

    Args:
        rows_are: name of the first column, which holds the labels.
        columns: the columns with numbers.
        entries: (label, "ours" or "paper" or another source, numbers) of each row.
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
    Return the rows of one of Tables 1 to 6. Each of the paper's rows is followed by our row with the same label; our
    rows with other labels come last. Seconds also appear relative to one sampling step.

    Args:
        number: the table's number.
        ours: our numbers, by label.
        beside: further cells of each of our rows.
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
    """Write rows atomically. A field that a row lacks is left empty."""
    fields = dict.fromkeys(field for row in rows for field in row)
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_curve(path: str | os.PathLike) -> dict[int, float]:
    """
    Read mAP@Avg by number of proposals from a CSV file with the columns `N` and `mAP@Avg`.

    Raises:
        ValueError: if a line lacks these numbers. The message names the file and the line.
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
