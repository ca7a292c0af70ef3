"""
Make the paper's Tables 1 to 6 and Figures 1, 3, 4 and 5: our numbers beside the paper's, as CSV files and images.

Models are trained as by `diffusionvmr train`, whose flags this script also takes, in OUTPUT_DIR/runs. If interrupted,
the same command resumes and repeats nothing that is finished. Models are measured on --eval_annotations:

    python scripts/ablate.py --tables 4 5 6 --figures 3 4 --seeds 0 1 2 --preset qvhighlights --annotations train.jsonl
        --eval_annotations val.jsonl --video_features slowfast clip --text_features clip_text --max_steps 5000 ...

Tables 1 to 3 take our row from the run of their preset, or from metrics saved by `diffusionvmr evaluate` (--results).
"""

import argparse
import contextlib
import functools
import gc
import json
import platform
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor

from ablation import (
    ABLATION_COLUMNS,
    PAPER,
    SECONDS_COLUMNS,
    SELECTION,
    Measured,
    evaluate_model,
    layer_ious,
    metric_columns,
    paper_table,
    post_processing,
    read_curve,
    sampling_seconds,
    save_csv,
    settings_beside,
    table_rows,
)
from modeling_diffusionvmr import MomentRetrievalDataset, predict_moments
from modeling_diffusionvmr.cli import train
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import check_device, clip_seconds_of
from modeling_diffusionvmr.data.features import open_text_features, open_video_features
from modeling_diffusionvmr.data.files import save_json
from modeling_diffusionvmr.plotting import (
    plot_curves,
    plot_predictions,
    plot_refinement,
    prediction_panels,
    save_figure,
)

RUNS = {
    "default": [],
    "without_l1": ["--l1_loss_coefficient", "0"],
    "without_iou": ["--iou_loss_coefficient", "0"],
    "without_hinge": ["--hinge_loss_coefficient", "0"],
    "without_contrastive": ["--contrastive_loss_coefficient", "0"],
    "without_class": ["--class_loss_coefficient", "0"],
    "stable": ["--proposal_schedule", "stable"],
}
"""The models to train, and the flags in which they differ."""
# Without these, training would choose which proposals to drop. Flags of the user override them.
DEFAULT_FLAGS = ["--preset", "qvhighlights", "--threshold", "0", "--top_k", "null", "--nms_threshold", "null"]

# The run that each row is measured on
TABLE_5 = {"all terms": "default"} | {name.replace("_", " "): name for name in RUNS if name.startswith("without_")}
TABLE_6 = {"stable": "stable", "progress": "default"}
SAMPLING_STEPS = tuple(map(int, PAPER[4].rows))
NUM_PROPOSALS = (5, 10, 20, 30, 40, 50, 75, 100)
TABLE_OF_PRESET = {"qvhighlights": 1, "charades_sta": 2, "charades_sta_vgg": 2, "tacos": 3}
COMPARISONS = (1, 2, 3)  # tables that compare methods
NUM_EXAMPLES = 3
METRICS_FILE, SETTINGS_FILE = "metrics.json", "settings.json"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="All other flags are those of `diffusionvmr train`. The default preset is qvhighlights.",
        allow_abbrev=False,
    )
    parser.add_argument("--tables", type=int, nargs="+", default=[], choices=sorted(PAPER), metavar="N", help="1 to 6")
    parser.add_argument(
        "--figures", type=int, nargs="+", default=[], choices=sorted(FIGURES), metavar="N", help="1, 3, 4, 5"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("ablation"), help="(default: ablation)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run per seed (default: 0)")
    parser.add_argument("--simulated", action="store_true", help="label all results as made from simulated features")
    parser.add_argument(
        "--results",
        nargs="+",
        default=[],
        metavar="NAME=METRICS.json",
        help="Tables 1 to 3: add a row; repeat a name for several runs",
    )
    parser.add_argument(
        "--curves",
        nargs="+",
        default=[],
        metavar="NAME=FILE.csv",
        help="Figure 3: curves of other models, with the columns N and mAP@Avg",
    )
    parser.add_argument("--qids", nargs="+", help="queries of Figures 1 (the first one) and 5 (default: evenly spaced)")
    parser.add_argument("--repeats", type=int, default=5, help="Table 4: repeats; the median counts (default: 5)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the evaluation"
    )
    known, flags = parser.parse_known_args(arguments)
    if not known.tables and not known.figures:
        parser.error("pass --tables, --figures or both")
    known.flags = [*DEFAULT_FLAGS, *flags]
    return known


def named_files(given: Sequence[str], flag: str) -> list[tuple[str, str]]:
    """Split each NAME=FILE into (NAME, FILE)."""
    pairs = [text.partition("=") for text in given]
    for text, (name, _, path) in zip(given, pairs):
        if not name or not path:
            raise ValueError(f"{flag}: must be NAME=FILE, got {text!r}")
    return [(name, path) for name, _, path in pairs]


def load_results(given: Sequence[str]) -> dict[str, list[dict]]:
    """Load the metrics of `--results`, as a list of runs by name."""
    results = {}
    for name, path in named_files(given, "--results"):
        try:
            metrics = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if not isinstance(metrics, dict) or "brief" not in metrics:
            raise ValueError(f"{path}: not the metrics of `diffusionvmr evaluate`: no `brief`")
        results.setdefault(name, []).append(metrics)
    return results


def needed_runs(arguments: argparse.Namespace) -> list[str]:
    """Return the names of the runs that the tables and figures need."""
    needed = set()
    if arguments.figures or 4 in arguments.tables or (set(COMPARISONS) & {*arguments.tables} and not arguments.results):
        needed.add("default")
    for number, rows in ((5, TABLE_5), (6, TABLE_6)):
        if number in arguments.tables:
            needed |= set(rows.values())
    return [name for name in RUNS if name in needed]


def cached(path: Path, compute: Callable[[], dict]) -> dict:
    """Return the content of a JSON file. If it does not exist, compute and save the content first."""
    if not path.exists():
        save_json(compute(), path)
    return json.loads(path.read_text(encoding="utf-8"))


def data_name(annotations: str, split: str | None) -> str:
    """Return the name of annotations in the tables, which does not depend on the folder of the file."""
    name = Path(annotations).resolve().name
    return name if split is None else f"{name} {split}"


class EvaluationData:
    """The data on which every model is measured: the rows with which training chooses its checkpoint."""

    def __init__(self, training: argparse.Namespace):
        self.rows = train.load_rows(training)[1]
        if not self.rows:
            raise ValueError("--eval_annotations is required: models are measured on them")
        if not all(row.get("relevant_windows") for row in self.rows):
            raise ValueError(f"{training.eval_annotations}: every row needs `relevant_windows`")
        self.video = open_video_features(training.eval_video_features or training.video_features)
        self.text = open_text_features(training.eval_text_features or training.text_features, self.rows)
        self.training = training
        path = training.eval_annotations or training.annotations
        is_folder = Path(path).is_dir()
        self.name = data_name(path, (training.eval_split or "val") if is_folder else None)
        if not training.eval_annotations and not is_folder:
            self.name = f"held out of {self.name}"

    def dataset(self, processor, config, rows=None) -> MomentRetrievalDataset:
        seconds = clip_seconds_of(self.training, self.video, config)
        return MomentRetrievalDataset(
            rows or self.rows,
            self.video,
            self.text,
            processor,
            clip_seconds=seconds,
            skip_invalid=self.training.skip_invalid,
        )


class Run:
    """The training of one model and its measurements, each saved atomically in its own file."""

    def __init__(self, name: str, seed: int, output_dir: Path, flags: Sequence[str], data: EvaluationData, device: str):
        self.name = f"{name}_seed{seed}"
        self.folder = output_dir / "runs" / self.name
        flags = [*flags, *RUNS[name], "--seed", str(seed), "--output_dir", str(self.folder), "--resume"]
        self.training = train.parse(flags)
        self.data, self.device = data, device

    @property
    def is_done(self) -> bool:
        return (self.folder / METRICS_FILE).exists()

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def settings(self) -> dict:
        """Return all options of the training except the output folder, in the types of JSON."""
        options = {name: value for name, value in vars(self.training).items() if name not in ("output_dir", "given")}
        return json.loads(json.dumps(options))

    def check_settings(self) -> None:
        """Raise `ValueError` if the folder contains results of a training with other settings."""
        has_results = self.is_done or any(self.folder.glob("checkpoint-*"))
        if has_results and cached(self.folder / SETTINGS_FILE, self.settings) != self.settings():
            raise ValueError(f"{self.folder}: made with other flags; use the same ones or another --output_dir")

    def train(self) -> None:
        """Train or resume, then evaluate. Output goes to the log, progress bars to the terminal."""
        save_json(self.settings(), self.folder / SETTINGS_FILE)
        with open(self.log, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            try:
                train.run(self.training)
                self.evaluation()
            except Exception:
                traceback.print_exc(file=log)
                raise
            finally:
                self.close()
        for checkpoint in self.folder.glob("checkpoint-*"):  # gigabytes that a finished training does not need
            shutil.rmtree(checkpoint)

    @functools.cached_property
    def opened(self) -> tuple[Any, MomentRetrievalDataset]:
        model = AutoModel.from_pretrained(self.folder).to(self.device).eval()
        return model, self.data.dataset(AutoProcessor.from_pretrained(self.folder), model.config)

    def close(self) -> None:
        """Free the memory of the model."""
        self.__dict__.pop("opened", None)
        gc.collect()
        torch.cuda.empty_cache()

    def evaluation(self, num_proposals: int | None = None, num_sampling_steps: int | None = None) -> dict:
        """Return the metrics, optionally with another N or S than the model's own."""
        metrics = cached(self.folder / METRICS_FILE, lambda: evaluate_model(*self.opened))
        n = num_proposals or metrics["settings"]["num_proposals"]
        s = num_sampling_steps or metrics["settings"]["num_sampling_steps"]
        if (n, s) == (metrics["settings"]["num_proposals"], metrics["settings"]["num_sampling_steps"]):
            return metrics
        return cached(self.folder / "evaluations" / f"N{n}_S{s}.json", lambda: evaluate_model(*self.opened, n, s))

    def layers(self) -> dict:
        """Return the numbers of Figure 4."""
        return cached(self.folder / "evaluations" / "layers.json", lambda: layer_ious(*self.opened))

    def seconds(self, repeats: int) -> dict:
        """Return the seconds of Table 4, by batch size and S."""
        device = torch.device(self.device)

        def measure() -> dict:
            seconds = {size: sampling_seconds(*self.opened, size, SAMPLING_STEPS, repeats) for size in SECONDS_COLUMNS}
            on_cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
            return {"device": name, "seconds": seconds}

        return cached(self.folder / "evaluations" / f"seconds_{device.type}.json", measure)


class Ablation:
    """
    The runs, and the tables and figures made from the finished ones.

    Raises:
        ValueError: for any bad input that can be found before the first training.
    """

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.results = load_results(arguments.results)
        self.curves = {name: read_curve(path) for name, path in named_files(arguments.curves, "--curves")}
        names = needed_runs(arguments)
        self.runs: dict[str, list[Run]] = {}
        self.data, self.preset = None, None
        if names:
            self._make_runs(names)
        self.beside = {
            "data": self.data.name if names else None,
            "simulated features": "yes" if arguments.simulated else "no",
        }
        if len({*COMPARISONS} & {*arguments.tables}) > 1 and (self.results or self.preset not in TABLE_OF_PRESET):
            raise ValueError(
                "--tables: only one of 1, 2 and 3 at a time, since --results and preset files do not name a table"
            )

    def _make_runs(self, names: Sequence[str]) -> None:
        arguments = self.arguments
        training = train.parse([*arguments.flags, "--output_dir", str(arguments.output_dir)])
        if "seed" in training.given:
            raise ValueError("--seed: use --seeds instead")
        for flag in (part for name in names for part in RUNS[name] if part.startswith("--")):
            if flag.removeprefix("--") in training.given:
                raise ValueError(f"{flag}: cannot be used, since the runs differ in it")
        self.preset = training.preset
        self.data = EvaluationData(training)
        known = {str(row["qid"]) for row in self.data.rows}
        for qid in arguments.qids or []:
            if qid not in known:
                raise ValueError(f"--qids: no qid {qid} in {self.data.name}")
        options = {"flags": arguments.flags, "data": self.data, "device": arguments.device}
        for name in names:
            self.runs[name] = [
                Run(name, seed, arguments.output_dir, **options) for seed in dict.fromkeys(arguments.seeds)
            ]
            for run in self.runs[name]:
                run.check_settings()

    def train(self) -> list[str]:
        """Train the unfinished runs, all of one seed before the next. Return one line per failed run."""
        runs = [run for of_seed in zip(*self.runs.values()) for run in of_seed]
        failed = []
        for index, run in enumerate(runs):
            place = f"[{index + 1}/{len(runs)}] {run.name}"
            if run.is_done:
                print(f"{place}: done", file=sys.stderr)
                continue
            print(f"{place}: training, log in {run.log}", file=sys.stderr)
            try:
                run.train()
            except Exception as error:
                failed.append(f"{run.name}: {type(error).__name__}: {error} (log: {run.log})")
                print(f"{place}: failed", file=sys.stderr)
        return failed

    def finished(self, name: str) -> list[Run]:
        return [run for run in self.runs[name] if run.is_done]

    @property
    def default(self) -> list[Run]:
        if not self.finished("default"):
            raise ValueError("no default run is finished")
        return self.finished("default")

    def title(self, text: str, settings: Mapping[str, Any]) -> str:
        """Return the title of a figure: what it shows, for which data and settings."""
        beside = settings_beside(settings)
        known = [f"{name} = {beside[name]}" for name in ("N", "S") if beside[name] is not None]
        known.append("no NMS" if beside["NMS"] == "none" else f"NMS {beside['NMS']}")
        simulated = ["simulated features"] if self.arguments.simulated else []
        return f"{text}\n{', '.join([self.beside['data'], *simulated, *known])}"

    @property
    def label(self) -> str:
        """The label of our curves."""
        count = len(self.default)
        return "ours" if count == 1 else f"ours (mean of {count} runs; band: min to max)"

    def measured(self, evaluations: Sequence[dict]) -> Measured:
        """Return one row of a table, from evaluations with the same settings."""
        settings = evaluations[0].get("settings", {}) if evaluations else {}
        beside = settings_beside(settings)
        if settings.get("annotations"):  # --results may come from other data
            beside["data"] = data_name(settings["annotations"], settings.get("split"))
        return Measured([metric_columns(metrics) for metrics in evaluations], beside)

    def table(self, number: int) -> list[dict]:
        """Return the rows of one of Tables 1 to 6."""
        if number in COMPARISONS:
            ours = self.results
            if not ours and TABLE_OF_PRESET.get(self.preset, number) == number:
                ours = {"DiffusionVMR, this library": [run.evaluation() for run in self.default]}
            if not ours:
                print(
                    f"table {number}: contains only the paper's rows, since {self.preset} is another benchmark",
                    file=sys.stderr,
                )
            return paper_table(number, {name: self.measured(of_name) for name, of_name in ours.items()}, self.beside)
        if number == 4:
            return paper_table(4, self.sampling_steps(), self.beside)
        rows = {5: TABLE_5, 6: TABLE_6}[number]
        ours = {label: [run.evaluation() for run in self.finished(name)] for label, name in rows.items()}
        return paper_table(number, {label: self.measured(runs) for label, runs in ours.items()}, self.beside)

    def sampling_steps(self) -> dict[str, Measured]:
        """Return the rows of Table 4. Seconds are measured on one model, since they do not depend on the weights."""
        timing = self.default[0].seconds(self.arguments.repeats)
        rows = {}
        for steps in SAMPLING_STEPS:
            row = self.measured([run.evaluation(num_sampling_steps=steps) for run in self.default])
            for size, column in SECONDS_COLUMNS.items():
                row.runs[0][column] = timing["seconds"][str(size)][str(steps)]
            rows[str(steps)] = row._replace(beside={**row.beside, "device": timing["device"]})
        return rows

    def example_rows(self, run: Run) -> list[dict]:
        """Return the rows of the queries in Figures 1 and 5."""
        rows = run.opened[1].rows
        if not self.arguments.qids:
            return [rows[(2 * index + 1) * len(rows) // (2 * NUM_EXAMPLES)] for index in range(NUM_EXAMPLES)]
        return [row for qid in self.arguments.qids for row in rows if str(row["qid"]) == qid]

    def figure_1(self):
        """Plot how spans are refined from noise, layer by layer."""
        run = self.default[0]
        model, dataset = run.opened
        row = self.example_rows(run)[0]
        sample = run.data.dataset(dataset.processor, model.config, [row])[0]
        inputs = {name: sample[name][None].to(self.arguments.device) for name in ("video_features", "text_features")}
        with torch.inference_mode():
            outputs = model(**inputs, num_sampling_steps=1)  # the last of several steps does not start from noise
        settings = {"num_proposals": model.config.num_proposals, "num_sampling_steps": 1}
        return plot_refinement(
            outputs.intermediate_spans[0].cpu(),
            outputs.logits[0].float().softmax(-1)[:, 0].cpu(),
            sample["covered_duration"],
            row["relevant_windows"],
            self.title(f"“{row['query']}”: spans refined from noise; green: the truth", settings),
        )

    def figure_3(self):
        """Plot and save mAP by the number of proposals at inference. The models are not retrained."""
        curves = self.curves
        ours = {n: [run.evaluation(num_proposals=n) for run in self.default] for n in NUM_PROPOSALS}
        entries = []
        for n in sorted({*ours, *(n for curve in curves.values() for n in curve)}):
            for name, curve in curves.items():
                if n in curve:
                    entries.append((n, name, Measured([{"mAP@Avg": curve[n]}])))
            if n in ours:
                measured = self.measured(ours[n])
                entries.append((n, "ours", measured._replace(beside={**self.beside, **measured.beside})))
        save_csv(
            table_rows("proposals", (*ABLATION_COLUMNS, *SELECTION), entries), self.arguments.output_dir / "figure3.csv"
        )

        lines = {self.label: {n: [metric_columns(one)["mAP@Avg"] for one in ours[n]] for n in ours}}
        lines |= {name: {n: [value] for n, value in curve.items()} for name, curve in curves.items()}
        settings = {**self.default[0].evaluation()["settings"], "num_proposals": None}
        title = self.title("mAP@Avg by the number of proposals at inference", settings)
        return plot_curves(lines, "proposals", "mAP@Avg", title)

    def figure_4(self):
        """Plot and save the IoU with the truth by decoder layer."""
        runs = [run.layers() for run in self.default]
        entries, lines = [], {}
        beside = {**self.beside, **settings_beside(runs[0]["settings"])}
        for name, first in (("best of the layer", 1), ("best of the last layer", 0)):
            points = {layer: list(ious) for layer, ious in enumerate(zip(*(run[name] for run in runs)), first)}
            lines[f"{self.label}: the proposal that is the {name}"] = points
            for layer, ious in points.items():
                measured = Measured([{"IoU": iou} for iou in ious], {"proposal": name, **beside})
                entries.append((layer, "ours", measured))
        save_csv(table_rows("layer", ["IoU"], entries), self.arguments.output_dir / "figure4.csv")
        title = self.title("IoU with the truth by decoder layer; 0: the noise", runs[0]["settings"])
        return plot_curves(lines, "decoder layer", "mean IoU of one proposal per query", title)

    def figure_5(self):
        """Plot predictions beside the truth."""
        run = self.default[0]
        model, dataset = run.opened
        rows = self.example_rows(run)
        examples = run.data.dataset(dataset.processor, model.config, rows)
        panels = prediction_panels(len(rows), 1)
        predictions = predict_moments(model, examples, progress=False, **post_processing(dataset.processor))
        for row, sample, prediction, axes in zip(rows, examples, predictions, panels):
            clip_seconds = sample["covered_duration"] / len(prediction["pred_saliency_scores"])
            plot_predictions(row, {"DiffusionVMR": prediction}, clip_seconds=clip_seconds, axes=axes)
        title = self.title("Predictions beside the truth", run.evaluation()["settings"])
        panels[0].figure.suptitle(title, fontsize=10, x=0, ha="left")
        return panels[0].figure


FIGURES = {1: Ablation.figure_1, 3: Ablation.figure_3, 4: Ablation.figure_4, 5: Ablation.figure_5}


def main(arguments: argparse.Namespace) -> None:
    if arguments.repeats < 1:
        raise ValueError(f"--repeats must be above 0, got {arguments.repeats}")
    check_device(arguments.device)
    ablation = Ablation(arguments)
    failed = ablation.train()
    jobs = [("table", number) for number in sorted({*arguments.tables})]
    jobs += [("figure", number) for number in sorted({*arguments.figures})]
    for kind, number in jobs:
        path = arguments.output_dir / f"{kind}{number}"
        try:
            if kind == "table":
                save_csv(ablation.table(number), path.with_suffix(".csv"))
            else:
                save_figure(FIGURES[number](ablation), path.with_suffix(".png"))
        except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: out of memory
            failed.append(f"{kind} {number}: {error}")
        else:
            print(f"wrote {path.with_suffix('.csv' if kind == 'table' else '.png')}")
    if failed:
        raise ValueError(f"{len(failed)} failed:\n  " + "\n  ".join(failed))


if __name__ == "__main__":
    run_safely(main, parse_arguments())
