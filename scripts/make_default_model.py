"""
Makes the embedded checkpoint from one seed: renders a small world, trains a tiny CLIP on its frames, extracts that
CLIP's features from rendered mp4 files, and trains a tiny DiffusionVMR on them. Prints the held-out figures.
"""

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
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
)
from modeling_diffusionvmr.backbones import Backbones, ClipBackbone
from modeling_diffusionvmr.rendered_backbone import measure_clip, train_rendered_clip
from modeling_diffusionvmr.rendered_world import annotation_rows, plan_video, write_video
from modeling_diffusionvmr.video import open_video

CLIP_SECONDS = 2.0
TRAINING_VIDEOS = 1200
TRAINING_STEPS = 3000
HELD_OUT_VIDEOS = 100  # of seen pairs, and as many of pairs that training never shows
HELD_OUT_SEED, UNSEEN_SEED = 10_000_000, 20_000_000  # training counts up from `--seed`


# ------------------------------------------------------------------------------------------------ features


def in_two_processes(function: Callable, items: Sequence, description: str, *state: Any) -> Iterator:
    """Maps `function(item, *state)` over items with a progress bar; each process takes one core."""
    with multiprocessing.get_context("spawn").Pool(2, _start_process, (state,)) as pool:
        yield from tqdm(pool.imap(_Call(function), items, chunksize=4), total=len(items), desc=description)


class _Call:
    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, item):
        return self.function(item, *_state)


def _start_process(state: tuple):
    global _state
    _state = state
    torch.set_num_threads(1)


def render_and_encode(seed: int, folder: Path, backbones: Backbones):
    """One training video through an mp4 file, as a user's would go: its rows, and features by vid and by qid."""
    plan = plan_video(seed)
    rows = annotation_rows(plan)
    path = folder / f"{plan.vid}.mp4"
    write_video(plan, path)
    (clips,) = backbones.encode_video(open_video(path, CLIP_SECONDS))
    path.unlink()
    texts = backbones.encode_text([row["query"] for row in rows])
    return rows, {plan.vid: clips}, {row["qid"]: text for row, text in zip(rows, texts)}


def render(plan, folder: Path) -> Path:
    path = folder / f"{plan.vid}.mp4"
    write_video(plan, path)
    return path


# ------------------------------------------------------------------------------------------------ training


def train_backbones(seed: int) -> Backbones:
    """The tiny CLIP, as the only backbone."""
    with tqdm(desc="training the CLIP", unit="step") as bar:

        def progress(step: int, steps: int, losses: dict[str, float]):
            bar.total = steps
            bar.set_postfix({name: f"{value:.3f}" for name, value in losses.items()}, refresh=False)
            bar.update()

        clip, tokenizer, image_processor = train_rendered_clip(seed, progress=progress)
    description = {
        "name": "clip",
        "id": "clip",
        "feature_size": clip.config.projection_dim,
        "text_feature_size": clip.config.text_config.hidden_size,
        "clip_seconds": CLIP_SECONDS,
    }
    return Backbones([description], [ClipBackbone(clip, image_processor, tokenizer)])


def train_model(seed: int, backbones: Backbones, folder: Path) -> VideoMomentRetrievalPipeline:
    """The tiny DiffusionVMR on features of rendered videos."""
    seeds = range(seed, seed + TRAINING_VIDEOS)
    rows, video_features, text_features = [], {}, {}
    for parts in in_two_processes(render_and_encode, seeds, "rendering and encoding", folder, backbones):
        rows += parts[0]
        video_features |= parts[1]
        text_features |= parts[2]

    set_seed(seed)
    description = backbones.descriptions[0]
    config = DiffusionVMRConfig(
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        input_dropout=0.1,
        roi_bins=8,
        dynamic_size=8,
        max_training_proposals=10,
        video_feature_size=description["feature_size"],
        text_feature_size=description["text_feature_size"],
        backbones=backbones.descriptions,
    )
    processor = DiffusionVMRProcessor([config.video_feature_size], config.text_feature_size)
    model = DiffusionVMRForMomentRetrieval(config)
    dataset = MomentRetrievalDataset(
        rows, video_features, text_features, processor, config=config, clip_seconds=CLIP_SECONDS, seed=seed
    )
    print(f"{len(rows)} training sentences, {model.num_parameters():,} parameters", flush=True)
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=TRAINING_STEPS,
        per_device_train_batch_size=32,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=1e-4,
        max_grad_norm=0.5,
        logging_steps=100,
        save_strategy="no",
        report_to=[],
        seed=seed,
    )
    DiffusionVMRTrainer(model=model, args=arguments, train_dataset=dataset).train()
    model.eval()
    return VideoMomentRetrievalPipeline(
        model=model, processor=processor, backbones=backbones, task="video-moment-retrieval"
    )


def save(retrieve: VideoMomentRetrievalPipeline, output_dir: Path) -> None:
    """
    Writes the checkpoint whole: to a temporary name, which is then renamed. Weights are stored as float16 and load as
    float32, which the configurations say. The code that a checkpoint carries is left out, since this one lies in it.
    """
    temporary = output_dir.with_name(f"{output_dir.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    retrieve.model.config.backbones = retrieve.backbones.save_pretrained(temporary)
    for part in (retrieve.model, retrieve.processor):
        automatic, type(part)._auto_class = type(part)._auto_class, None
        part.save_pretrained(temporary)
        type(part)._auto_class = automatic
    for path in temporary.rglob("*.safetensors"):
        halve(path)
    shutil.rmtree(output_dir, ignore_errors=True)
    temporary.rename(output_dir)


def halve(path: Path) -> None:
    """Stores the float32 tensors of a safetensors file as float16."""
    from safetensors.torch import load_file, save_file

    tensors = {name: t.half() if t.dtype == torch.float32 else t for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------ evaluation


def evaluate(model: str, folder: Path) -> None:
    """Prints the held-out figures of a checkpoint, through the pipeline, on mp4 files."""
    plans = [plan_video(HELD_OUT_SEED + i) for i in range(HELD_OUT_VIDEOS)]
    plans += [plan_video(UNSEEN_SEED + i, unseen_pairs=True) for i in range(HELD_OUT_VIDEOS)]
    paths = list(in_two_processes(render, plans, "rendering held-out videos", folder))
    retrieve = pipeline("video-moment-retrieval", model=model)

    clip = retrieve.backbones.models[0]
    print("\nthe backbone alone: cosine similarity of sentence and frame, against whether the sentence is true there")
    print(table(measure_clip(clip.model, clip.tokenizer, clip.image_processor, plans, folder), "kind"))

    rows, predictions = [], []
    for plan, path in zip(tqdm(plans, desc="retrieving"), paths):
        of_video = annotation_rows(plan)
        for row, moments in zip(of_video, retrieve(str(path), [row["query"] for row in of_video])):
            windows = [[moment["start"], moment["end"], moment["score"]] for moment in moments]
            predictions.append({**row, "pred_relevant_windows": windows})
        rows += of_video
    figures = {
        "all": figures_of(predictions, rows),
        "one window": figures_of(predictions, rows, lambda row: len(row["relevant_windows"]) == 1),
        "several windows": figures_of(predictions, rows, lambda row: len(row["relevant_windows"]) > 1),
        "single": figures_of(predictions, rows, lambda row: row["kind"] == "single"),
        "count": figures_of(predictions, rows, lambda row: row["kind"] == "count"),
        "relation": figures_of(predictions, rows, lambda row: row["kind"] == "relation"),
        "swapped distractor": figures_of(predictions, rows, lambda row: row["swapped"]),
        "seen pairs": figures_of(predictions, rows, lambda row: not row["unseen"]),
        "unseen pairs": figures_of(predictions, rows, lambda row: row["unseen"]),
        "(all: the whole video)": figures_of(guesses(rows, lambda random: (0.0, 1.0)), rows),
        "(all: a random span)": figures_of(guesses(rows, lambda random: np.sort(random.random(2))), rows),
    }
    print(f"\nheld-out sentences over {len(plans)} videos")
    print(table(figures, "sentences"))


def guesses(rows: Sequence[dict], draw: Callable) -> list[dict]:
    """Predictions of one window a row, drawn as a share of the video."""
    random = np.random.default_rng(0)
    windows = [[*(share * row["duration"] for share in draw(random)), 1.0] for row in rows]
    return [{**row, "pred_relevant_windows": [window]} for row, window in zip(rows, windows)]


def figures_of(predictions: Sequence[dict], rows: Sequence[dict], where: Callable = lambda row: True) -> dict[str, Any]:
    chosen = [(prediction, row) for prediction, row in zip(predictions, rows) if where(row)]
    predicted, true = ([{key: v for key, v in row.items()} for row in part] for part in zip(*chosen))
    brief = evaluate_predictions(predicted, true)["brief"]
    return {
        "n": len(chosen),
        "R1@0.5": brief["MR-full-R1@0.5"],
        "R1@0.7": brief["MR-full-R1@0.7"],
        "mAP": brief["MR-full-mAP"],
    }


def table(figures: dict[str, dict[str, Any]], title: str) -> str:
    """A Markdown table, a row an entry."""
    columns = list(next(iter(figures.values())))
    lines = [[title, *columns], ["---"] + ["---:"] * len(columns)]
    lines += [[name, *(_text(row[column]) for column in columns)] for name, row in figures.items()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) and abs(value) <= 1 else f"{value:.4g}"


def sizes(folder: Path) -> Iterable[str]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield f"{path.relative_to(folder)}: {path.stat().st_size / 2**20:.2f} MiB"
    yield f"together {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 2**20:.2f} MiB"


def main(arguments: argparse.Namespace) -> None:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if not arguments.evaluate_only:
            backbones = train_backbones(arguments.seed)
            print(f"the CLIP is trained: {(time.perf_counter() - began) / 60:.1f} min", flush=True)
            save(train_model(arguments.seed, backbones, Path(folder)), Path(arguments.model))
            print(f"{arguments.model} is made: {(time.perf_counter() - began) / 60:.1f} min", flush=True)
        evaluate(arguments.model, Path(folder))
        print("\n".join(sizes(Path(arguments.model))))
    print(f"{(time.perf_counter() - began) / 60:.1f} min in all")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--evaluate_only", action="store_true", help="print the held-out figures of --model")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="the folder to write, or to evaluate (default: embedded)")
    parser.add_argument("--seed", type=int, default=0)
    try:
        main(parser.parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
