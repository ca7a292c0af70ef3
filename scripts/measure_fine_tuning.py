"""
Measure how many sentences fine-tuning needs: train on rendered videos that show pairs of a color and a shape which the
embedded model has never seen, from that model and from nothing, and evaluate on other such videos.

The script runs the commands of docs/how_to/fine_tune_on_your_own_videos.md. Run it again to resume.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from modeling_diffusionvmr.cli import main as diffusionvmr
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser
from modeling_diffusionvmr.data.files import load_jsonl, save_json, save_jsonl
from modeling_diffusionvmr.synthetic.rendered_world import annotation_rows, plan_video, write_video

TRAINING_SEED, TEST_SEED = 42_000_000, 43_000_000  # of the first video
TRAINING_VIDEOS, TEST_VIDEOS = 240, 60
VALIDATION_SENTENCES = 100  # the last ones of the training videos
KINDS = {
    "embedded": ["--model", "embedded", "--learning_rate", "1e-4", "--num_train_epochs", "20"],
    "nothing": [],
}
METRICS = ("MR-full-R1@0.5", "MR-full-R1@0.7", "MR-full-mAP")


def render(folder: Path) -> None:
    """Render the videos and write `train.jsonl`, `val.jsonl` and `test.jsonl`."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rows = {}
    for first, count in ((TRAINING_SEED, TRAINING_VIDEOS), (TEST_SEED, TEST_VIDEOS)):
        plans = [plan_video(seed, unseen_pairs=True) for seed in range(first, first + count)]
        for plan in tqdm(plans, desc="rendering videos"):
            if not (path := folder / "videos" / f"{plan.vid}.mp4").exists():
                write_video(plan, path)
        rows[first] = [row for plan in plans for row in annotation_rows(plan)]
    save_jsonl(rows[TRAINING_SEED][:-VALIDATION_SENTENCES], folder / "train.jsonl")
    save_jsonl(rows[TRAINING_SEED][-VALIDATION_SENTENCES:], folder / "val.jsonl")
    save_jsonl(rows[TEST_SEED], folder / "test.jsonl")


def measure(folder: Path, kind: str, number: int) -> dict:
    """Train on the first sentences, evaluate on the test videos, and return the metrics and the minutes of training."""
    output = folder / f"{kind}_{number}"
    if (output / "measured.json").exists():
        return json.loads((output / "measured.json").read_text())
    features = [
        "--video_features",
        str(folder / "features/clip"),
        "--text_features",
        str(folder / "features/clip_text"),
    ]
    minutes, model = 0.0, "embedded"
    if number:
        annotations = folder / f"train_{number}.jsonl"
        save_jsonl(list(load_jsonl(folder / "train.jsonl"))[:number], annotations)
        data = ["--annotations", str(annotations), "--eval_annotations", str(folder / "val.jsonl"), *features]
        began, model = time.perf_counter(), str(output)
        diffusionvmr(["train", "--output_dir", model, "--use_cpu", "--resume", *data, *KINDS[kind]])
        minutes = (time.perf_counter() - began) / 60
    metrics = folder / f"{kind}_{number}_metrics"
    test = ["--annotations", str(folder / "test.jsonl"), *features]
    diffusionvmr(["evaluate", "--model", model, "--output_dir", str(metrics), *test])
    found = json.loads((metrics / "metrics.json").read_text())["brief"]
    measured = {name: found[name] for name in METRICS} | {"minutes": round(minutes, 1)}
    output.mkdir(exist_ok=True)
    save_json(measured, output / "measured.json")
    return measured


def main(arguments: argparse.Namespace) -> None:
    """Render, extract, train, evaluate, and print a Markdown table."""
    folder: Path = arguments.work_dir
    render(folder)
    for name in ("train", "val", "test"):
        annotations = str(folder / f"{name}.jsonl")
        videos = ["--videos", str(folder / "videos"), "--annotations", annotations]
        diffusionvmr(["extract", str(folder / "features"), *videos, "--model", "embedded"])
    lines = ["| sentences | start | " + " | ".join(METRICS) + " | minutes |", "| ---: | --- |" + " ---: |" * 4]
    for number in (0, *arguments.sentences):
        for kind in KINDS if number else ["embedded"]:
            measured = measure(folder, kind, number)
            figures = [f"{measured[name]:.2f}" for name in METRICS]
            lines.append(f"| {number} | {kind} | " + " | ".join(figures) + f" | {measured['minutes']:.1f} |")
    print("\n".join(lines))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/measure_fine_tuning.py", description=__doc__)
    parser.add_argument("work_dir", type=Path, help="folder for videos, features and checkpoints")
    parser.add_argument(
        "--sentences", type=int, nargs="+", default=[10, 100, 500], help="numbers of sentences to train on"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
