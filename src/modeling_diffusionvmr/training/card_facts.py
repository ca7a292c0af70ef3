"""The facts of a training for the card of its model, see `model_card.py`."""

import importlib.metadata
import os
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainerState, TrainingArguments

from .. import DEFAULT_MODEL
from ..model_card import CARD_NAME, EMBEDDED, card_beside, parse_card
from .arguments import DiffusionVMRTrainingArguments
from .dataset import MomentRetrievalDataset

PACKAGES = ("modeling_diffusionvmr", "transformers", "torch", "accelerate", "numpy")
ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("weight_decay", "max_grad_norm", "seed", "bf16", "fp16", "proposal_schedule", "proposal_growth"),
)


class CardFacts(TrainerCallback):
    """
    Keeps `card_facts` of the model that is trained up to date.

    Args:
        trainer: a `DiffusionVMRTrainer` with a model.

    Attributes:
        given: facts that the user states, which override the others.
        evaluated: the dataset of the last evaluation, by the prefix of its metrics.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.given: dict[str, Any] = {}
        self.evaluated: dict[str, Any] = {}
        self.in_training = False
        self._first_step = 0
        self._started: float | None = None  # `None` before training
        self._seconds = self._seconds_before = 0.0
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._base_model = model.hub_id
        self._is_new = not model.config.name_or_path
        self._started_from = "random weights" if self._is_new else "a local checkpoint"
        if model.config.name_or_path == DEFAULT_MODEL:
            self._started_from = EMBEDDED
        try:
            self._base_card = parse_card("" if self._is_new else card_beside(model))
        except ValueError as error:
            warnings.warn(f"card of {model.config.name_or_path}: {error}", stacklevel=4)
            self._base_card = parse_card("")

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_training = True
        self._started, self._first_step = time.monotonic(), state.global_step
        # A resumed training continues the time that the card of its checkpoint states
        card = Path(str(args.output_dir), f"checkpoint-{self._first_step}", CARD_NAME)
        before = parse_card(card.read_text(encoding="utf-8")).facts if self._first_step and card.is_file() else {}
        self._seconds_before = before.get("seconds", 0.0)
        if before:
            self._first_step = 0

    def on_train_end(self, args, state, control, **kwargs):
        self.update()  # the duration
        self.in_training = False
        self.update()  # `Trainer` may have loaded the weights of the best checkpoint, which are of an earlier step

    def on_evaluate(self, args, state, control, **kwargs):
        self.update()

    def update(self) -> None:
        """Set `card_facts` of the model."""
        if self.in_training and self._started is not None:
            self._seconds = time.monotonic() - self._started
        facts = {} if self._started is None else self._facts_of_training()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model.card_facts = facts | self._facts_of_evaluation(model.config) | self.given

    def _facts_of_training(self) -> dict[str, Any]:
        trainer, base = self.trainer, self._base_card
        known = base.facts | base.metadata  # a person may have changed the metadata
        data = facts_of_data(trainer.train_dataset)
        facts = {
            "started_from": self._started_from,
            "base_model": self._base_model or known.get("base_model"),
            "license": known.get("license"),
            "train_data": data,
            "datasets": [data["name"]] if "/" in data["name"] else None,
            "settings": _settings(trainer.args),
            "versions": {"python": platform.python_version(), **_versions()},
            "hardware": _hardware(trainer.args),
            "seconds": round(self._seconds_before + self._seconds, 1),
            "first_step": self._first_step,
            "step": self._step_of_weights(),
            "steps": trainer.state.max_steps,
        }
        return {name: value for name, value in facts.items() if value is not None}

    def _facts_of_evaluation(self, config: PreTrainedConfig) -> dict[str, Any]:
        args, step, given = self.trainer.args, self._step_of_weights(), self.trainer.eval_dataset
        datasets = {f"eval_{name}": dataset for name, dataset in given.items()} if isinstance(given, dict) else {}
        results = []
        for prefix, dataset in ({"eval": given} | datasets | self.evaluated).items():
            metrics = _metrics(self.trainer.state, step, prefix)
            if metrics:
                results.append({"data": facts_of_data(dataset, scored=True), "metrics": metrics})
        if not results:
            return {}
        text = (
            f"Scored by the official evaluation of QVHighlights, in percent, with {config.num_proposals} proposals and "
            f"{config.num_sampling_steps} sampling step{'s' if config.num_sampling_steps > 1 else ''}."
        )
        if args.load_best_model_at_end and self._started is not None and not self.in_training:
            text += (
                f" The checkpoint was chosen by its `{args.metric_for_best_model}` on the same sentences, which makes "
                "the figures a little too good."
            )
        return {"evaluation": text, "results": results}

    def _step_of_weights(self) -> int:
        """Return the step whose weights the model has: after training, it may be that of the best checkpoint."""
        state = self.trainer.state
        if self.trainer.args.load_best_model_at_end and not self.in_training and state.best_global_step:
            return state.best_global_step
        return state.global_step


def facts_of_data(dataset, scored: bool = False) -> dict[str, Any]:
    """Return the facts of a `MomentRetrievalDataset`; with `scored`, of its rows that can be scored."""
    facts: dict[str, Any] = {"name": getattr(dataset, "name", MomentRetrievalDataset.name)}
    if isinstance(dataset, MomentRetrievalDataset):
        rows = [row for row in dataset.rows if row.get("relevant_windows") or not scored]
        stores = [*dataset.video_features, dataset.text_features]
        facts |= {
            **({} if dataset.split is None else {"split": dataset.split}),
            "queries": len(rows),
            "videos": len({row["vid"] for row in rows}),
            "simulated": any(getattr(store, "metadata", {}).get("simulated", False) for store in stores),
        }
    return facts


def _metrics(state: TrainerState, step: int, prefix: str) -> dict[str, float]:
    """Return the official metrics of the last evaluation at a step, by their names without the prefix."""
    for entry in reversed(state.log_history):
        metrics = {name.removeprefix(f"{prefix}_"): value for name, value in entry.items()}
        metrics = {name: value for name, value in metrics.items() if name.startswith(("MR-", "HL-"))}
        if metrics and entry["step"] == step:
            return metrics
    return {}


def _settings(args: TrainingArguments) -> dict[str, Any]:
    defaults = DiffusionVMRTrainingArguments
    values = {name: getattr(args, name, getattr(defaults, name, None)) for name in ARGUMENTS}
    length = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    values[length] = getattr(args, length)
    values["samples per step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {name: getattr(value, "value", value) for name, value in values.items()}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _hardware(args: TrainingArguments) -> str:
    count = args.world_size
    if args.device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(args.device)}"
    if args.device.type != "cpu":
        return f"{count} x {args.device.type}"
    processes = f"{count} processes with " if count > 1 else ""
    return f"CPU ({platform.machine()}, {processes}{torch.get_num_threads()} of {os.cpu_count()} cores)"
