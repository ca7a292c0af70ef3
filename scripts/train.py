"""
Trains DiffusionVMR by a preset, from nothing or from a checkpoint.

Every field of the configuration, of the processor and of transformers' TrainingArguments is a flag, too, which
overrides the preset: --learning_rate 5e-4 --encoder_layers 2 --max_steps 5000 --bf16 --proposal_schedule stable ...
The same command with --resume goes on from the last whole checkpoint.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments, set_seed

from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    DiffusionVMRTrainer,
    MomentRetrievalDataset,
    load_annotations,
)
from modeling_diffusionvmr.cli.options import add_data_arguments, clip_seconds_of, resolve_model, run_safely
from modeling_diffusionvmr.data.annotations import hold_out
from modeling_diffusionvmr.data.features import feature_size, name_of, open_text_features, open_video_features
from modeling_diffusionvmr.training.checkpoints import last_whole_checkpoint
from modeling_diffusionvmr.training.presets import PRESETS, load_preset, override


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--preset", default="qvhighlights", help=f"{', '.join(PRESETS)}, or a file (default: the first)"
    )
    parser.add_argument("--model", help="a checkpoint to start from, a folder or Hub id; its configuration is kept")
    parser.add_argument("--output_dir", type=Path, required=True, help="checkpoints, and in the end the best model")
    parser.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint, if there is one")
    add_data_arguments(parser)
    parser.add_argument("--eval_annotations", metavar="PATH", help="to evaluate on, and choose the best checkpoint by")
    parser.add_argument("--eval_split", help="of a converted folder (default: val)")
    parser.add_argument("--eval_video_features", nargs="+", metavar="PATH", help="(default: as for training)")
    parser.add_argument("--eval_text_features", metavar="PATH", help="(default: as for training)")
    known, flags = parser.parse_known_args(arguments)
    known.flags = flags
    return known


def load_rows(arguments: argparse.Namespace, share: float | None) -> tuple[list, list]:
    """The rows to train on, and those to evaluate on, which may be none."""
    skip = arguments.skip_invalid
    is_folder = Path(arguments.annotations).is_dir()
    train = load_annotations(arguments.annotations, arguments.split or ("train" if is_folder else None), skip)
    if arguments.eval_annotations or is_folder:
        path = arguments.eval_annotations or arguments.annotations
        split = arguments.eval_split or ("val" if Path(path).is_dir() else None)
        return train, load_annotations(path, split, skip)
    if share:
        train, held_out = hold_out(train, share)
        print(f"{share:.0%} of the training videos are held out to choose checkpoints: {len(held_out)} queries")
        return train, held_out
    print("no --eval_annotations: nothing is evaluated, and the last checkpoint is kept")
    return train, []


def feature_sizes(rows: Sequence[Mapping[str, Any]], video: Sequence[Mapping], text: Mapping) -> tuple[list[int], int]:
    """What the features have: the numbers a clip of each backbone, and a token."""
    vids = dict.fromkeys(row["vid"] for row in rows)
    sizes = [feature_size(store, (vid for vid in vids if vid in store)) for store in video]
    text_size = feature_size(text, (row["qid"] for row in rows if row["qid"] in text))
    for store, size in zip([*video, text], [*sizes, text_size]):
        if size is None:
            raise ValueError(f"{name_of(store)}: has usable features for none of the rows")
    return sizes, text_size


def fit_to_features(config: DiffusionVMRConfig, video_sizes: list[int], text_size: int) -> None:
    """Makes the configuration read what the data have, and says so where that is new."""
    if (config.video_feature_size, config.text_feature_size) == (sum(video_sizes), text_size):
        return
    print(
        f"features of {' + '.join(map(str, video_sizes))} and {text_size} numbers instead of "
        f"{config.video_feature_size} and {config.text_feature_size}: the first layers are new"
        + (", and the backbones are forgotten" if config.backbones else "")
    )
    config.backbones = None
    config.video_feature_size, config.text_feature_size = sum(video_sizes), text_size


def make_model(arguments: argparse.Namespace, preset: dict, flags: dict, sizes: tuple[list[int], int]):
    if arguments.model is None:
        config = DiffusionVMRConfig(**preset["config"])
        fit_to_features(config, *sizes)
        return DiffusionVMRForMomentRetrieval(config)
    resolve_model(arguments.model)
    config = DiffusionVMRConfig.from_pretrained(arguments.model, **flags["config"])
    fit_to_features(config, *sizes)
    model, info = DiffusionVMRForMomentRetrieval.from_pretrained(
        arguments.model, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    new = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if new:
        print(f"new, and not from {arguments.model}: {', '.join(new)}")
    return model


def main(arguments: argparse.Namespace) -> None:
    flags = override(
        {section: {} for section in ("config", "processor", "training", "trainer", "data")}, arguments.flags
    )
    preset = override(load_preset(arguments.preset), arguments.flags)
    checkpoint = last_whole_checkpoint(arguments.output_dir) if arguments.resume else None
    if not arguments.resume and arguments.output_dir.exists() and any(arguments.output_dir.iterdir()):
        raise ValueError(f"{arguments.output_dir}: is not empty; --resume goes on with what is there")

    train_rows, eval_rows = load_rows(arguments, preset["data"].get("hold_out"))
    video = open_video_features(arguments.video_features)
    text = open_text_features(arguments.text_features, [*train_rows, *eval_rows])
    eval_video = open_video_features(arguments.eval_video_features) if arguments.eval_video_features else video
    eval_text = open_text_features(arguments.eval_text_features, eval_rows) if arguments.eval_text_features else text
    sizes = feature_sizes(train_rows, video, text)

    training = dict(preset["training"])
    if not eval_rows:
        training |= {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}
    training_arguments = TrainingArguments(str(arguments.output_dir), **training)
    set_seed(training_arguments.seed)
    model = make_model(arguments, preset, flags, sizes)
    fields = {"max_clips": model.config.max_clips, "max_tokens": model.config.max_tokens}
    fields |= preset["processor"] | {"video_feature_sizes": sizes[0], "text_feature_size": sizes[1]}
    processor = DiffusionVMRProcessor(**fields)

    options = {
        "clip_seconds": clip_seconds_of(arguments, video, model.config),
        "skip_invalid": arguments.skip_invalid,
    }
    trainer = DiffusionVMRTrainer(
        model=model,
        args=training_arguments,
        train_dataset=MomentRetrievalDataset(
            train_rows, video, text, processor, model.config, seed=training_arguments.seed, **options
        ),
        eval_dataset=MomentRetrievalDataset(eval_rows, eval_video, eval_text, processor, **options)
        if eval_rows
        else None,
        **preset["trainer"],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if eval_rows:
        print(json.dumps(trainer.evaluate(), indent=2))
    print(f"saved {arguments.output_dir}", file=sys.stderr)


if __name__ == "__main__":
    run_safely(main, parse_arguments())
