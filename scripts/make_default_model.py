"""
Make the embedded checkpoint from one seed: train a tiny CLIP on rendered frames, extract its features from rendered mp4
files, train a tiny DiffusionVMR on them, and choose `threshold`, `nms_threshold` and `top_k` on validation videos. Then
print the model's results on held-out videos.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import TrainingArguments, pipeline, set_seed

from modeling_diffusionvmr import (
    DEFAULT_MODEL,
    DiffusionVMRConfig,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    DiffusionVMRTrainer,
    MomentRetrievalDataset,
    VideoMomentRetrievalPipeline,
    evaluate_predictions,
    load_annotations,
    open_features,
)
from modeling_diffusionvmr.backbones import Backbones
from modeling_diffusionvmr.cli.errors import run_safely
from modeling_diffusionvmr.cli.options import CommandParser
from modeling_diffusionvmr.data.extraction import extract_sentence, extract_video
from modeling_diffusionvmr.data.files import load_jsonl, save_json, save_jsonl
from modeling_diffusionvmr.dual_encoders import ClipBackbone
from modeling_diffusionvmr.modeling_diffusionvmr import TASK
from modeling_diffusionvmr.synthetic.rendered_world import (
    VideoPlan,
    absent_queries,
    annotation_rows,
    clip_frames,
    plan_long_video,
    plan_video,
    write_video,
)
from modeling_diffusionvmr.training.moment_quality import choose_post_processing, measure_moments
from modeling_diffusionvmr.training.prediction import EVERY_PROPOSAL, every_proposal
from modeling_diffusionvmr.training.rejection_metrics import auroc
from rendered_clip import measure_clip, train_rendered_clip

CLIP_SECONDS = 2.0
TRAINING_VIDEOS = 1200
ABSENT_SENTENCES_PER_VIDEO = 4  # true nowhere in their video
LONG_VIDEOS = 120  # searched in windows, most of which do not show the moment of a sentence
LONG_VIDEO_SECONDS = (600.0, 1200.0, 2400.0, 3600.0)  # in turn
TRAINING_STEPS = 8000
OTHER_VIDEOS = 100  # held out or for validation: number with seen pairs, and with pairs that training never shows
# Seeds of the first video with seen pairs and of the first with unseen pairs; training videos start at `--seed`
HELD_OUT_SEEDS, VALIDATION_SEEDS = (10_000_000, 20_000_000), (30_000_000, 40_000_000)


# Stages. Each writes one folder in the work directory, and is skipped if that folder exists


def make_backbones(seed: int, folder: Path) -> None:
    """Train the tiny CLIP and save it as the only backbone."""
    with tqdm(desc="training the CLIP", unit="step", mininterval=5) as bar:

        def progress(step: int, steps: int, losses: dict[str, float]):
            bar.total = steps
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
            bar.update()

        clip, tokenizer, image_processor = train_rendered_clip(seed, progress=progress)
    ClipBackbone(clip, image_processor, tokenizer).save_pretrained(folder)


def open_backbones(folder: Path) -> Backbones:
    """Load what `make_backbones` saved."""
    clip = ClipBackbone.from_pretrained(folder)
    description = {
        "name": "clip",
        "folder": "clip",
        "feature_size": clip.feature_size,
        "text_feature_size": clip.text_feature_size,
        "clip_seconds": CLIP_SECONDS,
    }
    return Backbones([description], [clip])


def make_features(seed: int, backbones: Backbones, folder: Path) -> None:
    """Render the training videos, and save their annotations and features in the official formats."""
    seeds = range(seed, seed + TRAINING_VIDEOS)
    (folder / "rendered").mkdir()
    state = folder, backbones, ABSENT_SENTENCES_PER_VIDEO
    of_videos = list(in_two_processes(encode_video_file, seeds, "rendering and encoding", *state))
    (folder / "rendered").rmdir()
    long = [(seed + i, LONG_VIDEO_SECONDS[i % len(LONG_VIDEO_SECONDS)]) for i in range(LONG_VIDEOS)]
    of_videos += in_two_processes(encode_long_video, long, "long videos", folder, backbones)
    save_jsonl((row for rows in of_videos for row in rows), folder / "annotations.jsonl")


def encode_video_file(seed: int, folder: Path, backbones: Backbones, num_absent: int) -> list[dict]:
    """
    Render one training video to an mp4 file, save its features, and delete the file. Return its annotations, with up to
    `num_absent` sentences that are true nowhere in it.
    """
    plan = plan_video(seed)
    path = render(plan, folder / "rendered")
    rows = annotation_rows(plan) + absent_rows(plan, seed, num_absent)
    encode(path, plan.vid, rows, folder, backbones)
    path.unlink()
    return rows


def encode_long_video(seed_and_seconds: tuple[int, float], folder: Path, backbones: Backbones) -> list[dict]:
    """Save the features of a long training video, without a file. Return its annotations."""
    plan = plan_long_video(*seed_and_seconds)
    rows = annotation_rows(plan)
    encode(clip_frames(plan, CLIP_SECONDS), plan.vid, rows, folder, backbones)
    return rows


def encode(video: Any, vid: str, rows: Iterable[dict], folder: Path, backbones: Backbones) -> None:
    """Save the features of one video and of the sentences about it."""
    (clip,) = backbones.models
    extract_video({folder / "video": clip}, video, vid, CLIP_SECONDS)
    for row in rows:
        extract_sentence(clip, row["query"], folder / "text", row["qid"])


def render(plan: VideoPlan, folder: Path) -> Path:
    """Write a video to `folder/<vid>.mp4` and return the path."""
    path = folder / f"{plan.vid}.mp4"
    write_video(plan, path)
    return path


def stage(folder: Path, make: Callable, *arguments: Any) -> Path:
    """Run `make(*arguments, folder)` and print the time, unless the folder exists. It appears only when complete."""
    if not folder.exists():
        began = time.perf_counter()
        temporary = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        make(*arguments, temporary)
        temporary.rename(folder)
        print(f"{folder.name}: {(time.perf_counter() - began) / 60:.1f} min", flush=True)
    return folder


def in_two_processes(function: Callable, items: Sequence, description: str, *state: Any) -> Iterator:
    """Yield `function(item, *state)` for each item, computed by two processes with one thread each."""
    with multiprocessing.get_context("spawn").Pool(2, _start_process, (function, state)) as pool:
        yield from tqdm(pool.imap(_call, items, chunksize=4), total=len(items), desc=description, mininterval=5)


def _start_process(function: Callable, state: tuple) -> None:
    global _function, _state
    _function, _state = function, state
    torch.set_num_threads(1)


def _call(item: Any) -> Any:
    return _function(item, *_state)


# Training


def make_model(seed: int, backbones: Backbones, features: Path, folder: Path) -> None:
    """
    Train the tiny DiffusionVMR on the features of rendered videos.

    It learns what is absent from sentences that are known to be. `absent_loss_coefficient` is 0, because the sentences
    of other videos often happen to be true in a rendered one.
    """
    set_seed(seed)
    description = backbones.descriptions[0]
    config = DiffusionVMRConfig(
        d_model=128,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        input_dropout=0.05,
        roi_bins=8,
        dynamic_size=8,
        max_training_proposals=10,
        num_sampling_steps=2,  # chosen on separate videos: better than 1, and more do not improve R1@0.5
        video_feature_size=description["feature_size"],
        text_feature_size=description["text_feature_size"],
        backbones=backbones.descriptions,
    )
    processor = DiffusionVMRProcessor(
        [config.video_feature_size], config.text_feature_size, config.max_clips, config.max_tokens
    )
    model = DiffusionVMRForMomentRetrieval(config)
    dataset = MomentRetrievalDataset(
        load_annotations(features / "annotations.jsonl"),
        dict(open_features(features / "video")),  # small enough for memory
        dict(open_features(features / "text")),
        processor,
        config=config,
        clip_seconds=CLIP_SECONDS,
        seed=seed,
        windows=True,
    )
    print(f"{len(dataset)} training sentences, {model.num_parameters():,} parameters", flush=True)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=TRAINING_STEPS,
        per_device_train_batch_size=32,
        learning_rate=7e-4,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=1e-4,
        max_grad_norm=0.5,
        use_cpu=True,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )
    DiffusionVMRTrainer(model=model, args=arguments, train_dataset=dataset).train()
    shutil.rmtree(folder / "trainer", ignore_errors=True)
    save(model, processor, backbones, folder)


def save(model: DiffusionVMRForMomentRetrieval, processor: DiffusionVMRProcessor, backbones: Backbones, folder: Path):
    """Save the checkpoint. Weights are stored in float16 and loaded in float32, the dtype of the configurations."""
    retrieve = VideoMomentRetrievalPipeline(model=model, processor=processor, backbones=backbones, task=TASK)
    retrieve.save_pretrained(folder)
    for path in folder.rglob("*.safetensors"):
        halve(path)


def publish(made: Path, folder: Path) -> None:
    """
    Copy the checkpoint to its destination, replacing a checkpoint there. Inside the package it needs no remote code.

    Raises:
        ValueError: if the destination exists and is not a checkpoint.
    """
    check_destination(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(made, partial)
    if folder.resolve() == Path(DEFAULT_MODEL):
        drop_code(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def check_destination(folder: Path) -> None:
    """Raise `ValueError` unless `publish` may write a checkpoint to this folder."""
    if folder.exists() and not is_checkpoint(folder):
        raise ValueError(f"--model: {folder} exists and is not a checkpoint; choose another folder or remove it")


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder contains a model."""
    return (folder / "config.json").is_file()


def drop_code(checkpoint: Path) -> None:
    """Remove the remote code from a checkpoint, the fields that refer to it, and the card: docs/ has a longer one."""
    for path in [*checkpoint.glob("*.py"), *checkpoint.glob("README.md")]:
        path.unlink()
    for name in ("config.json", "processor_config.json"):
        content = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        kept = {field: value for field, value in content.items() if field not in ("auto_map", "custom_pipelines")}
        save_json(kept, checkpoint / name)


def halve(path: Path) -> None:
    """Convert the float32 tensors of a safetensors file to float16."""
    from safetensors.torch import load_file, save_file

    tensors = {name: t.half() if t.dtype == torch.float32 else t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


# Retrieval from other videos


def draw_videos(first_seen: int, first_unseen: int) -> list[tuple[VideoPlan, list[dict]]]:
    """Draw videos, each with its annotated sentences and as many sentences that are true nowhere in it."""
    videos = []
    for first, unseen_pairs in ((first_seen, False), (first_unseen, True)):
        for seed in range(first, first + OTHER_VIDEOS):
            plan = plan_video(seed, unseen_pairs)
            rows = annotation_rows(plan)
            videos.append((plan, rows + absent_rows(plan, seed, len(rows))))
    return videos


def absent_rows(plan: VideoPlan, seed: int, number: int) -> list[dict]:
    """
    Return sentences that are true nowhere in a video: `number`, and at most as many as it has sentences. Half of them,
    if there are enough, are `recombined`: the video shows their words in another combination.
    """
    recombined = absent_queries(plan, seed, recombined=True)[: (number + seed % 2) // 2]
    others = absent_queries(plan, seed, recombined=False)[len(recombined) : number]
    rows = annotation_rows(replace(plan, queries=recombined + others))
    return [{**row, "qid": f"{plan.vid}_absent_{i}", "recombined": i < len(recombined)} for i, row in enumerate(rows)]


def retrieve_all(
    retrieve: VideoMomentRetrievalPipeline, videos: Sequence[tuple[VideoPlan, list[dict]]], folder: Path
) -> list[dict]:
    """Return the rows of all videos with their `pred_relevant_windows`. The videos are `folder/<vid>.mp4`."""
    predictions = []
    for plan, rows in tqdm(videos, desc="retrieving", mininterval=5):
        for row, moments in zip(rows, retrieve(str(folder / f"{plan.vid}.mp4"), [row["query"] for row in rows])):
            windows = [[moment["start"], moment["end"], moment["score"]] for moment in moments]
            predictions.append({**row, "pred_relevant_windows": windows})
    return predictions


def open_pipeline(model: Path) -> VideoMomentRetrievalPipeline:
    """Load a checkpoint as a pipeline that returns every proposal."""
    retrieve = pipeline(TASK, model=str(model))
    retrieve.processor = every_proposal(retrieve.processor)
    return retrieve


# Choice of the defaults


def make_proposals(model: Path, folder: Path) -> None:
    """Save every proposal of a checkpoint for the sentences of the validation videos."""
    videos, rendered = draw_videos(*VALIDATION_SEEDS), folder / "rendered"
    rendered.mkdir()
    list(in_two_processes(render, [plan for plan, _ in videos], "rendering validation videos", rendered))
    save_jsonl(retrieve_all(open_pipeline(model), videos, rendered), folder / "proposals.jsonl")
    shutil.rmtree(rendered)


def choose_defaults(proposals: Path, model: Path) -> None:
    """Choose which moments a checkpoint returns by default, from what `make_proposals` saved, and write it there."""
    rows = load_jsonl(proposals / "proposals.jsonl")
    defaults = choose_post_processing(rows)
    path = model / "processor_config.json"
    save_json({**json.loads(path.read_text(encoding="utf-8")), **defaults}, path)
    print(f"\nchosen on the validation sentences of {2 * OTHER_VIDEOS} videos: {json.dumps(defaults)}")
    print(table(moment_figures(rows, defaults), "validation sentences"))


def moment_figures(rows: Sequence[dict], defaults: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Measure the moments that a person gets, for sentences that are in their video and for those that are not."""
    present = [row for row in rows if row["relevant_windows"]]
    return {
        "present": measure_moments(present, **defaults),
        **{name: measure_moments(absent, **defaults) for name, absent in absent_groups(rows).items()},
        "present and absent": measure_moments(rows, **defaults),
        "present, every proposal": measure_moments(present, **EVERY_PROPOSAL),
        "present and absent, every proposal": measure_moments(rows, **EVERY_PROPOSAL),
    }


def rejection_figures(rows: Sequence[dict]) -> dict[str, dict[str, Any]]:
    """Measure how well the score of a sentence's best moment tells present from absent sentences."""

    def best_scores(of_rows: Iterable[dict]) -> np.ndarray:
        return np.array([max(score for *_, score in row["pred_relevant_windows"]) for row in of_rows])

    present = best_scores(row for row in rows if row["relevant_windows"])
    return {
        name: {"n": len(absent), "AUROC": f"{auroc(present, best_scores(absent)):.4f}"}
        for name, absent in absent_groups(rows).items()
    }


def absent_groups(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Return the two halves of the absent sentences, and all of them, with their names."""
    absent = [row for row in rows if not row["relevant_windows"]]
    return {
        "absent, an object that the video never shows": [row for row in absent if not row["recombined"]],
        "absent, the video's words in another combination": [row for row in absent if row["recombined"]],
        "absent": absent,
    }


# Evaluation


def evaluate(model: Path, folder: Path) -> None:
    """Print the results of a checkpoint on held-out videos, which are rendered to mp4 files in `folder`."""
    retrieve, videos = open_pipeline(model), draw_videos(*HELD_OUT_SEEDS)
    plans = [plan for plan, _ in videos]
    list(in_two_processes(render, plans, "rendering held-out videos", folder))

    clip = retrieve.backbones.models[0]
    print("\nbackbone alone: how well the cosine similarity of sentence and frame shows where the sentence is true")
    measure_clip(clip.model, clip.tokenizer, clip.image_processor, plans, folder)

    predictions = retrieve_all(retrieve, videos, folder)
    rows = [row for row in predictions if row["relevant_windows"]]
    figures = {
        "all": figures_of(rows),
        "one window": figures_of(rows, lambda row: len(row["relevant_windows"]) == 1),
        "several windows": figures_of(rows, lambda row: len(row["relevant_windows"]) > 1),
        "single": figures_of(rows, lambda row: row["kind"] == "single"),
        "count": figures_of(rows, lambda row: row["kind"] == "count"),
        "relation": figures_of(rows, lambda row: row["kind"] == "relation"),
        "swapped distractor": figures_of(rows, lambda row: row["swapped"]),
        "seen pairs": figures_of(rows, lambda row: not row["unseen"]),
        "unseen pairs": figures_of(rows, lambda row: row["unseen"]),
        "all, guessing the whole video": figures_of(guesses(rows, lambda rng: (0.0, 1.0))),
        "all, guessing a random span": figures_of(guesses(rows, lambda rng: np.sort(rng.random(2)))),
    }
    print(f"\nheld-out sentences of {len(plans)} videos, every proposal")
    print(table(figures, "sentences"))

    print("\nbest moment's score, present against absent sentences, every proposal")
    print(table(rejection_figures(predictions), "sentences"))

    processor = DiffusionVMRProcessor.from_pretrained(model)
    defaults = {name: getattr(processor, name) for name in EVERY_PROPOSAL}
    print(f"\nmoments by default: {json.dumps(defaults)}")
    print(table(moment_figures(predictions, defaults), "sentences"))


def guesses(rows: Sequence[dict], draw: Callable) -> list[dict]:
    """Return predictions with one window per row. `draw(rng)` returns its start and end as shares of the video."""
    rng = np.random.default_rng(0)
    windows = [[*(share * row["duration"] for share in draw(rng)), 1.0] for row in rows]
    return [{**row, "pred_relevant_windows": [window]} for row, window in zip(rows, windows)]


def figures_of(rows: Sequence[dict], where: Callable = lambda row: True) -> dict[str, Any]:
    """Return the number of rows for which `where(row)` is true, and official metrics of their predictions."""
    chosen = [row for row in rows if where(row)]
    brief = evaluate_predictions(chosen, chosen)["brief"]
    return {
        "n": len(chosen),
        "R1@0.5": brief["MR-full-R1@0.5"],
        "R1@0.7": brief["MR-full-R1@0.7"],
        "mAP": brief["MR-full-mAP"],
    }


def table(figures: dict[str, dict[str, Any]], title: str) -> str:
    """Format a Markdown table with one row per entry."""
    columns = list(next(iter(figures.values())))
    lines = [[title, *columns], ["---"] + ["---:"] * len(columns)]
    lines += [[name, *(_text(row[column]) for column in columns)] for name, row in figures.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def sizes(folder: Path) -> Iterable[str]:
    """Yield one line per file with its size, and one with the total."""
    files = {path: path.stat().st_size / 2**20 for path in sorted(folder.rglob("*")) if path.is_file()}
    for path, mib in files.items():
        yield f"{path.relative_to(folder)}: {mib:.2f} MiB"
    yield f"total: {sum(files.values()):.2f} MiB"


def main(arguments: argparse.Namespace) -> None:
    """Make the checkpoint or, with `--choose_defaults`, only its defaults, then evaluate it."""
    if arguments.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {arguments.seed}")
    if not (arguments.evaluate_only or arguments.choose_defaults):
        check_destination(arguments.model)
    elif not is_checkpoint(arguments.model):
        raise ValueError(f"--model: {arguments.model} is not a checkpoint folder (it has no config.json)")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.choose_defaults:
            choose_defaults(stage(Path(temporary) / "proposals", make_proposals, arguments.model), arguments.model)
        elif not arguments.evaluate_only:
            work = arguments.work_dir or Path(temporary)
            work = work / f"seed-{arguments.seed}"
            backbones = open_backbones(stage(work / "clip", make_backbones, arguments.seed))
            features = stage(work / "features", make_features, arguments.seed, backbones)
            made = stage(work / "model", make_model, arguments.seed, backbones, features)
            choose_defaults(stage(work / "proposals", make_proposals, made), made)
            publish(made, arguments.model)
            print(f"wrote {arguments.model}: {(time.perf_counter() - began) / 60:.1f} min in total", flush=True)
        rendered = Path(temporary) / "held-out"
        rendered.mkdir()
        evaluate(arguments.model, rendered)
        print("\n".join(sizes(arguments.model)))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="python scripts/make_default_model.py", description=__doc__)
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument("--evaluate_only", action="store_true", help="only evaluate --model")
    parts.add_argument(
        "--choose_defaults",
        action="store_true",
        help="only choose threshold, nms_threshold and top_k of --model on validation videos, and evaluate",
    )
    parser.add_argument(
        "--model", type=Path, default=Path(DEFAULT_MODEL), help="folder to write or to evaluate (default: embedded)"
    )
    parser.add_argument("--work_dir", type=Path, help="folder for finished stages; rerun with it to resume")
    parser.add_argument("--seed", type=int, default=0, help="seed of the videos and of all training (default: 0)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
