"""Training on `transformers.Trainer`, which gains only what the task needs."""

from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from .dataset import DiffusionVMRDataCollator

PROPOSAL_SCHEDULES = ("progress", "stable")


class SetEpochCallback(TrainerCallback):
    """
    Tells the data set its epoch. `Trainer` leaves that to accelerate, which tells the sampler alone wherever it wraps
    it: after a resume in the middle of an epoch, and with several processes.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(round(state.epoch, 6)))


class DiffusionVMRTrainer(Trainer):
    """
    A `Trainer` that lets the number of proposals grow (section 3.2 and Table 6), logs every term of the loss, and saves
    the training data's processor with each checkpoint.

    Args:
        proposal_schedule: "progress", from 1 to `config.max_training_proposals` in equal parts of the training; or
            "stable", all of them from the start.
        processing_class: the processor that is saved with the model, by default that of the training data.
        args, kwargs: `Trainer`'s.

    Raises:
        ValueError: for an unknown schedule.
    """

    def __init__(self, *args, proposal_schedule: str = "progress", **kwargs):
        if proposal_schedule not in PROPOSAL_SCHEDULES:
            raise ValueError(f"`proposal_schedule` must be one of {PROPOSAL_SCHEDULES}, got {proposal_schedule!r}")
        kwargs.setdefault("data_collator", DiffusionVMRDataCollator())
        # Not handed on: `Trainer` takes every processor for one that holds a tokenizer
        processor = kwargs.pop("processing_class", None)
        super().__init__(*args, **kwargs)
        self.processor = getattr(self.train_dataset, "processor", None) if processor is None else processor
        self.add_callback(SetEpochCallback())
        self.proposal_schedule = proposal_schedule
        self.args.remove_unused_columns = False  # the samples hold what the collator needs, under names of its own
        self._loss_terms: dict[str, torch.Tensor] = {}
        self._num_loss_terms = 0
        self._num_proposals = 0  # of the last step

    def training_proposals(self) -> int:
        """N of this step."""
        most = self.accelerator.unwrap_model(self.model).config.max_training_proposals
        if self.proposal_schedule == "stable":
            return most
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return min(1 + int(progress * most), most)

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """Calls `forward` with this step's number of proposals, and keeps the terms of the loss for the next log."""
        if model.training:
            self._num_proposals = self.training_proposals()
            inputs = {**inputs, "num_proposals": self._num_proposals}
        else:  # starts from pure noise, as inference does, and not near the truth
            inputs = {name: value for name, value in inputs.items() if name not in ("noisy_spans", "timesteps")}
        outputs = model(**inputs)
        if model.training:
            # Added up on the device: reading them would wait for it
            for name, term in outputs.loss_dict.items():
                self._loss_terms[name] = self._loss_terms.get(name, 0) + term.detach()
            self._num_loss_terms += 1
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.processor is not None:  # without it a checkpoint is of little use
            self.processor.save_pretrained(output_dir or self.args.output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every term of the loss since the last log, and the last N."""
        if "loss" in logs and self._num_loss_terms:
            for name, total in self._loss_terms.items():
                logs[f"loss_{name}"] = round((total / self._num_loss_terms).item(), 4)
            logs["num_proposals"] = self._num_proposals
            self._loss_terms, self._num_loss_terms = {}, 0
        super().log(logs, start_time)
