"""The facts of a training for the card of its model, see `model_card.py`."""

import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..model_card import card_beside, hub_id_of, parse_card
from .arguments import DiffusionVMRTrainingArguments

PACKAGES = ("modeling_diffusionvmr", "transformers", "torch", "accelerate", "numpy")
ARGUMENTS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("weight_decay", "max_grad_norm", "seed", "bf16", "fp16", "proposal_schedule", "proposal_growth"),
)
# `Trainer` logs these beside the metrics
NO_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


class CardFacts(TrainerCallback):
    """
    Keeps `card_facts` of the model that is trained up to date.

    Args:
        trainer: a `DiffusionVMRTrainer` with a model.

    Attributes:
        given: facts that the user states, which override the others.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.given: dict[str, Any] = {}
        self.in_training = False
        self._first_step = 0
        self._started: float | None = None  # `None` before training
        self._seconds = 0.0
        model = trainer.accelerator.unwrap_model(trainer.model)
        self._base_model = hub_id_of(model)
        self._is_new = not model.config.name_or_path
        try:
            self._base_card = parse_card("" if self._is_new else card_beside(model))
        except ValueError as error:
            warnings.warn(f"card of {model.config.name_or_path}: {error}", stacklevel=4)
            self._base_card = parse_card("")

    def on_train_begin(self, args, state, control, **kwargs):
        self.in_training = True
        self._started, self._first_step = time.monotonic(), state.global_step

    def on_train_end(self, args, state, control, **kwargs):
        self.update()
        self.in_training = False
        self.update()

    def on_evaluate(self, args, state, control, **kwargs):
        self.update()

    def update(self) -> None:
        """Set `card_facts` of the model."""
        if self.in_training and self._started is not None:
            self._seconds = time.monotonic() - self._started
        facts = dict(self._base_card.facts) if self._started is None else self._facts_of_training()
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        model.card_facts = facts | self._facts_of_evaluation(model.config) | self.given

    def _facts_of_training(self) -> dict[str, Any]:
        trainer, base = self.trainer, self._base_card
        known = base.facts | base.metadata  # a person may have changed the metadata
        data = facts_of_data(trainer.train_dataset, trainer.train_dataset.rows)
        facts = {
            "started_from": "random weights" if self._is_new else "a local checkpoint",
            "base_model": self._base_model or known.get("base_model"),
            "license": known.get("license"),
            "train_data": data,
            "datasets": [data["name"]] if "/" in data["name"] else None,
            "settings": _settings(trainer.args),
            "versions": {"python": platform.python_version(), **_versions()},
            "hardware": _hardware(trainer.args),
            "seconds": round(self._seconds, 1),
            "first_step": self._first_step,
            "step": self._step_of_weights(),
        }
        return {name: value for name, value in facts.items() if value is not None}

    def _facts_of_evaluation(self, config: PreTrainedConfig) -> dict[str, Any]:
        trainer = self.trainer
        metrics = _metrics(trainer.state, self._step_of_weights())
        if not metrics or trainer.eval_dataset is None:
            return {}
        text = (
            f"Scored by the official evaluation of QVHighlights, in percent, with {config.num_proposals} proposals and "
            f"{config.num_sampling_steps} sampling step{'s' if config.num_sampling_steps > 1 else ''}."
        )
        if trainer.args.load_best_model_at_end and self._started is not None and not self.in_training:
            text += f" The checkpoint was chosen by `{trainer.args.metric_for_best_model}` on the same queries."
        scored = [row for row in trainer.eval_dataset.rows if row.get("relevant_windows")]
        return {"eval_data": facts_of_data(trainer.eval_dataset, scored), "evaluation": text, "metrics": metrics}

    def _step_of_weights(self) -> int:
        """Return the step whose weights the model has: after training, it may be that of the best checkpoint."""
        state = self.trainer.state
        if self.trainer.args.load_best_model_at_end and not self.in_training and state.best_global_step:
            return state.best_global_step
        return state.global_step


def facts_of_data(dataset, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the facts of some rows of a `MomentRetrievalDataset`."""
    stores = [*dataset.video_features, dataset.text_features]
    return {
        "name": dataset.name,
        "queries": len(rows),
        "videos": len({row["vid"] for row in rows}),
        "simulated": any(getattr(store, "metadata", {}).get("simulated", False) for store in stores),
    }


def _metrics(state: TrainerState, step: int) -> dict[str, float]:
    """Return the metrics of the last evaluation at a step."""
    for entry in reversed(state.log_history):
        metrics = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        metrics = {name: value for name, value in metrics.items() if name not in NO_METRICS}
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
    processes = f"{count} processes with " if count > 1 else ""
    return f"CPU ({platform.machine()}, {processes}{torch.get_num_threads()} of {os.cpu_count()} cores)"
