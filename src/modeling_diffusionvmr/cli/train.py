"""
Train a model with the settings of a preset, or fine-tune a checkpoint.

The preset "default" is for your own data; name another one for a benchmark. Every setting is also a flag, which takes
precedence over the preset. Run the same command with --resume to continue an interrupted training from its last
complete checkpoint.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import is_number
from ..configuration_diffusionvmr import DiffusionVMRConfig
from ..data.backbone_record import describe_backbones
from ..processing_diffusionvmr import DiffusionVMRProcessor
from ..training.arguments import DiffusionVMRTrainingArguments
from ..training.presets import SECTIONS
from ..weights import check_weight_files, check_weights
from .errors import loading
from .options import add_data_arguments, check_model_type, check_output, clip_seconds_of, resolve_model
from .settings import SettingsParser

USAGE = """diffusionvmr train [--preset NAME] --output_dir DIR --annotations PATH --video_features PATH [PATH ...]
                          --text_features PATH [--eval_annotations PATH] [--FIELD VALUE ...]"""

# Until a choice is made on validation data: no near-identical moments. Evaluation sees every proposal.
DISTINCT = {"nms_threshold": 0.5, "top_k": 5}


class FeatureSizes(NamedTuple):
    """The size of a clip's vector for each video backbone, and of a token's vector."""

    video: list[int]
    text: int

    def __str__(self) -> str:
        return f"{' + '.join(map(str, self.video))} (video) and {self.text} (text)"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `diffusionvmr train`. See `SettingsParser.parse_settings` for the result."""
    parser = SettingsParser("train", argv, description=__doc__, usage=USAGE)
    parser.add_argument(
        "--model",
        help="checkpoint to fine-tune: folder or Hub id; flags override single settings of its configuration and its "
        "processor",
    )
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint, if any")
    add_data_arguments(parser)
    parser.add_argument(
        "--eval_annotations", metavar="PATH", help="annotations to evaluate on, which choose the best checkpoint"
    )
    parser.add_argument("--eval_split", help="split of a converted folder to evaluate on (default: val)")
    parser.add_argument(
        "--eval_video_features", nargs="+", metavar="PATH", help="features to evaluate on (default: as for training)"
    )
    parser.add_argument(
        "--eval_text_features", metavar="PATH", help="features to evaluate on (default: as for training)"
    )
    arguments = parser.parse_settings()
    if not arguments.output_dir:
        parser.error("the following arguments are required: --output_dir")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """
    Train, choose which moments people get, save the model and the processor in `output_dir`, and print the final
    evaluation as JSON.
    """
    from transformers import set_seed

    from .. import DiffusionVMRTrainer, MomentRetrievalDataset
    from ..data.features import open_text_features, open_video_features
    from ..training.checkpoints import check_shapes
    from ..training.moment_quality import choose_on_dataset

    training_arguments = make_training_arguments(arguments)
    checkpoint = find_checkpoint(arguments, training_arguments)
    if arguments.model is not None:
        arguments.model = resolve_model(arguments.model)
        check_model_type(arguments.model)
        check_weight_files(arguments.model)

    train_rows, eval_rows = load_rows(arguments)
    if eval_rows:
        check_best_metric(training_arguments.metric_for_best_model, eval_rows)
    video = open_video_features(arguments.video_features)
    text = open_text_features(arguments.text_features, [*train_rows, *eval_rows])
    eval_video = open_video_features(arguments.eval_video_features) if arguments.eval_video_features else video
    eval_text = open_text_features(arguments.eval_text_features, eval_rows) if arguments.eval_text_features else text
    sizes = feature_sizes(train_rows, video, text)
    if eval_rows and sizes != (eval_sizes := feature_sizes(eval_rows, eval_video, eval_text)):
        raise ValueError(f"feature sizes differ: {sizes} for training, {eval_sizes} for evaluation")

    set_seed(training_arguments.seed)
    # Loading keeps the type in which a checkpoint is stored, but training in a smaller one loses small updates
    model = make_model(arguments, sizes, video, text).float()
    if checkpoint is not None:
        with loading(checkpoint):
            check_shapes(checkpoint, model)
    processor = make_processor(arguments, model.config, sizes)

    options = {
        "clip_seconds": clip_seconds_of(arguments, video, model.config),
        "skip_invalid": arguments.skip_invalid,
        "windows": arguments.windows,
    }
    train_dataset = MomentRetrievalDataset(
        train_rows, video, text, processor, model.config, seed=training_arguments.seed, **options
    )
    eval_dataset = MomentRetrievalDataset(eval_rows, eval_video, eval_text, processor, **options) if eval_rows else None
    name_data(arguments, train_dataset, eval_dataset)
    trainer = DiffusionVMRTrainer(
        model=model, args=training_arguments, train_dataset=train_dataset, eval_dataset=eval_dataset
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except KeyError as error:  # `Trainer` only looks for the metric after the first evaluation
        if "metric_for_best_model" not in str(error):
            raise
        raise ValueError(error.args[0]) from None
    metrics = trainer.evaluate() if eval_rows else None  # before saving, so that the card has the metrics
    if trainer.is_world_process_zero():
        chosen = choose_on_dataset(model, processor, eval_dataset)
        for name, value in chosen.items():
            if name not in arguments.given:
                setattr(processor, name, value)
    trainer.save_model()
    if trainer.is_world_process_zero():
        if metrics is not None:
            print(json.dumps(metrics, indent=2))
        how = "chosen on the validation data" if chosen else "not chosen: too little validation data"
        values = ", ".join(f"{name} {getattr(processor, name)}" for name in ("threshold", "nms_threshold", "top_k"))
        print(f"defaults of the processor: {values} ({how})", file=sys.stderr)
        print(f"saved {arguments.output_dir}, with the weights of step {model.card_facts['step']}", file=sys.stderr)


def evaluates(arguments: argparse.Namespace) -> bool:
    """Return whether there are rows to evaluate on."""
    from ..data.hub import has_splits

    return bool(arguments.eval_annotations or has_splits(arguments.annotations) or arguments.hold_out)


def make_training_arguments(arguments: argparse.Namespace) -> DiffusionVMRTrainingArguments:
    """
    Return the training arguments, with evaluation turned off if there are no rows to evaluate on. Raise `ValueError` if
    they are invalid.
    """
    import torch

    fields = {"output_dir": arguments.output_dir, **arguments.training}
    if not torch.accelerator.is_available():  # PyTorch would warn at the start of every pass
        fields.setdefault("dataloader_pin_memory", False)
    if not evaluates(arguments):
        fields |= {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}
    try:
        for name, value in fields.items():
            if isinstance(value, float) and not is_number(value):
                raise ValueError(f"`{name}` must be a finite number, got {value}")
        training_arguments = DiffusionVMRTrainingArguments(**fields)
        check_reports(training_arguments)
        try_settings(training_arguments)
        return training_arguments
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"training arguments: {error}") from error


def check_reports(training: DiffusionVMRTrainingArguments) -> None:
    """Raise `ValueError` if `Trainer` cannot report to a tool, because it is unknown or not installed."""
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in training.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise ValueError(f"`report_to` must be none, all or some of {known}, got {name!r}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"`report_to`: {name} is not installed")


def try_settings(training: DiffusionVMRTrainingArguments) -> None:
    """Raise `ValueError` for invalid settings that PyTorch and `transformers` only check when training begins."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    scheduler_options: Any = training.lr_scheduler_kwargs or None
    backend: Any = training.torch_compile_backend
    try:
        get_scheduler(training.lr_scheduler_type, optimizer, 1, 10, scheduler_options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`lr_scheduler_type` and `lr_scheduler_kwargs` do not fit ({error})") from error
    if training.torch_compile:
        try:
            torch.compile(torch.nn.Identity(), backend=backend, mode=training.torch_compile_mode)
        except RuntimeError as error:
            raise ValueError(f"`torch_compile_backend` or `torch_compile_mode`: {error}") from error


def find_checkpoint(arguments: argparse.Namespace, training: DiffusionVMRTrainingArguments) -> str | None:
    """
    Return the checkpoint to continue from, if any. With `--resume`, it is the last complete one in the output folder.

    Raises:
        ValueError: if a new training would write to a folder that is not empty, or if nothing can be written.
        BlockingIOError: if another training is writing to the output folder.
    """
    from ..training.checkpoints import LOCK, last_complete_checkpoint, lock_training

    output_dir = Path(str(training.output_dir))
    check_output(output_dir, "--output_dir")
    if output_dir.is_dir() and training.should_save:
        with lock_training(output_dir):  # `DiffusionVMRTrainer.train` takes it again, once the data are loaded
            pass
    if arguments.resume:
        return last_complete_checkpoint(output_dir)
    if training.resume_from_checkpoint:
        return training.resume_from_checkpoint
    if output_dir.exists() and any(path.name != LOCK for path in output_dir.iterdir()):
        raise ValueError(f"{output_dir}: not empty; use --resume to continue the training in it")
    return None


def load_rows(arguments: argparse.Namespace) -> tuple[list, list]:
    """Load the rows to train on and the rows to evaluate on. The latter may be empty."""
    from ..data.annotations import hold_out, load_annotations
    from ..data.hub import has_splits

    skip = arguments.skip_invalid
    is_folder = has_splits(arguments.annotations)
    train_rows = load_annotations(arguments.annotations, arguments.split or ("train" if is_folder else None), skip)
    if arguments.eval_annotations or is_folder:
        path = arguments.eval_annotations or arguments.annotations
        split = arguments.eval_split or ("val" if has_splits(path) else None)
        return train_rows, load_annotations(path, split, skip)
    if arguments.hold_out:
        train_rows, eval_rows = hold_out(train_rows, arguments.hold_out)
        share = f"{arguments.hold_out:.0%} of the training videos"
        print(f"{share} are held out to choose the best checkpoint: {len(eval_rows)} queries")
        return train_rows, eval_rows
    print("no --eval_annotations: nothing is evaluated, and the last checkpoint is kept")
    return train_rows, []


def check_best_metric(name: str | None, eval_rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ValueError` if the best checkpoint is chosen by a metric, but no row to evaluate on can be scored."""
    if name in (None, "loss", "eval_loss") or any(row.get("relevant_windows") for row in eval_rows):
        return
    raise ValueError(
        f"none of the {len(eval_rows)} rows to evaluate on has windows in `relevant_windows`, which "
        f"`metric_for_best_model` ({name}) needs"
    )


def name_data(arguments: argparse.Namespace, train_dataset, eval_dataset) -> None:
    """Name the datasets for the model's card: by their Hub id, or else without the path."""
    from ..data.hub import has_splits, is_hub_id

    for dataset, path, split, default in (
        (train_dataset, arguments.annotations, arguments.split, "train"),
        (eval_dataset, arguments.eval_annotations or arguments.annotations, arguments.eval_split, "val"),
    ):
        if dataset is not None:
            dataset.name = path if is_hub_id(path) else Path(path).absolute().stem
            dataset.split = split or (default if has_splits(path) else None)
    if eval_dataset is not None and not (arguments.eval_annotations or has_splits(arguments.annotations)):
        eval_dataset.split = "held out"


def feature_sizes(rows: Sequence[Mapping[str, Any]], video: Sequence[Mapping], text: Mapping) -> FeatureSizes:
    """Return the feature sizes for some rows. Raise `ValueError` if a store has usable features for none of them."""
    from ..data.features import feature_size

    return FeatureSizes([feature_size(store, rows, "vid") for store in video], feature_size(text, rows, "qid"))


def make_model(arguments: argparse.Namespace, sizes: FeatureSizes, video: Sequence[Mapping], text: Mapping):
    """Return a new model, or that of `--model`, that fits the features and knows the backbones that computed them."""
    make = new_model if arguments.model is None else model_to_fine_tune
    return make(arguments, sizes, video, text)


def new_model(arguments: argparse.Namespace, sizes: FeatureSizes, video: Sequence[Mapping], text: Mapping):
    """Return a model with random weights, see `make_model`."""
    from .. import DiffusionVMRForMomentRetrieval

    fields = dict(arguments.config)
    fields["backbones"], sources = describe_backbones(
        video, text, *sizes, arguments.clip_seconds, fields.get("backbones")
    )
    fields |= {"video_feature_size": sum(sizes.video), "text_feature_size": sizes.text}
    model = DiffusionVMRForMomentRetrieval(DiffusionVMRConfig(**fields))
    model.backbone_sources = sources
    return model


def model_to_fine_tune(arguments: argparse.Namespace, sizes: FeatureSizes, video: Sequence[Mapping], text: Mapping):
    """Return the model of `--model`, see `make_model`. Print which weights are new."""
    from .. import DiffusionVMRForMomentRetrieval

    given = {name: value for name, value in arguments.config.items() if name in arguments.given}
    with loading(arguments.model):
        config = DiffusionVMRConfig.from_pretrained(arguments.model, **given)
        sources = fit_to_features(config, sizes, video, text, arguments.clip_seconds)
        loaded: Any = DiffusionVMRForMomentRetrieval.from_pretrained(
            arguments.model, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
    model, info = loaded
    model.backbone_sources = sources
    # With flags that change the architecture, some weights are new
    check_weights(model, () if given else info["missing_keys"], arguments.model)
    new = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if new:
        print(f"newly initialized (not in {arguments.model}): {', '.join(new)}")
    return model


def fit_to_features(
    config: DiffusionVMRConfig, sizes: FeatureSizes, video: Sequence[Mapping], text: Mapping, clip_seconds: float | None
) -> dict[str, str]:
    """Set the feature sizes and backbones of a checkpoint's configuration. Return the model's `backbone_sources`."""
    if (config.video_feature_size, config.text_feature_size) != (sum(sizes.video), sizes.text):
        print(
            f"feature sizes {sizes} instead of {config.video_feature_size} and {config.text_feature_size}: "
            "the input layers are newly initialized"
        )
    config.backbones, sources = describe_backbones(video, text, *sizes, clip_seconds, config.backbones)
    config.video_feature_size, config.text_feature_size = sum(sizes.video), sizes.text
    return sources


def make_processor(
    arguments: argparse.Namespace, config: DiffusionVMRConfig, sizes: FeatureSizes
) -> DiffusionVMRProcessor:
    """Return a processor with the settings of the flags and the preset, else those of `--model`, else the defaults."""
    fields: dict[str, Any] = {"max_clips": config.max_clips, "max_tokens": config.max_tokens, **DISTINCT}
    if arguments.model is not None:
        with loading(arguments.model):
            saved, _ = DiffusionVMRProcessor.get_processor_dict(arguments.model)  # empty if there is no processor
            fields |= {name: saved[name] for name in SECTIONS["processor"] if name in saved}
            if (saved.get("video_feature_sizes"), saved.get("text_feature_size")) != (sizes.video, sizes.text):
                fields["threshold"] = 0.0  # it was chosen for scores of other weights
            DiffusionVMRProcessor(**fields)  # an error here names the checkpoint
    fields |= {**arguments.processor, "video_feature_sizes": sizes.video, "text_feature_size": sizes.text}
    return DiffusionVMRProcessor(**fields)
