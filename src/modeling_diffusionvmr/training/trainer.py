"""Training on `transformers.Trainer`, which gains only what the task needs."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import slice_tensors
from huggingface_hub import HfApi
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from .checkpoints import MANIFEST, STAGING_FOLDER, find_fault, last_whole_checkpoint, write_manifest
from .collator import DiffusionVMRDataCollator
from .metrics import evaluate_predictions
from .prediction import RowOutputs, official_predictions, row_outputs

PROPOSAL_SCHEDULES = ("progress", "stable")
# It starts from pure noise, as inference does, and not near the truth; the last two are not for the model
NOT_IN_EVALUATION = ("noisy_spans", "timesteps", "rows", "covered_durations")


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
    A `Trainer` that lets the number of proposals grow (section 3.2 and Table 6), logs every term of the loss, evaluates
    with the official metrics, and saves the training data's processor with each checkpoint, whole or not at all.

    Every number of `evaluate_predictions`' `"brief"` and `"extra"` is logged, as `eval_MR-full-mAP` and so on, so that
    `TrainingArguments(metric_for_best_model="MR-full-mAP", load_best_model_at_end=True)` keeps the best; `predict`
    gives the predictions in the official format.

    Args:
        proposal_schedule: "progress", from 1 to `config.max_training_proposals` in equal parts of the growth; or
            "stable", all of them from the start.
        proposal_growth: the share of the training that the growth takes, above 0 and at most 1.
        processing_class: the processor that is saved with the model, by default that of the training data.
        model, args, data_collator, other_args, kwargs: `Trainer`'s.

    Raises:
        ValueError: for an unknown schedule, a growth out of range, `compute_metrics`, and arguments with which there
            are no official metrics.
    """

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        *other_args,
        proposal_schedule: str = "progress",
        proposal_growth: float = 1.0,
        processing_class=None,
        compute_metrics=None,
        **kwargs,
    ):
        if proposal_schedule not in PROPOSAL_SCHEDULES:
            raise ValueError(f"`proposal_schedule` must be one of {PROPOSAL_SCHEDULES}, got {proposal_schedule!r}")
        if not (isinstance(proposal_growth, (int, float)) and 0 < proposal_growth <= 1):
            raise ValueError(f"`proposal_growth` must be a number above 0 and at most 1, got {proposal_growth!r}")
        if compute_metrics is not None:
            raise ValueError("`compute_metrics` is not called: the official metrics are computed, as `eval_...`")
        for field, needed in (("eval_do_concat_batches", True), ("batch_eval_metrics", False)):
            if args is not None and getattr(args, field) is not needed:
                raise ValueError(f"the official metrics need all predictions at once: `{field}` must be {needed}")
        # The processor is not handed on: `Trainer` takes every one for one that holds a tokenizer
        super().__init__(model, args, data_collator or DiffusionVMRDataCollator(), *other_args, **kwargs)
        self.processor = processing_class
        if processing_class is None:
            self.processor = getattr(self.train_dataset, "processor", None)
        self.add_callback(SetEpochCallback())
        self.proposal_schedule = proposal_schedule
        self.proposal_growth = proposal_growth
        self._staging: Path | None = None  # where a checkpoint is written now
        self.model_accepts_loss_kwargs = True  # `compute_loss` weighs micro-batches itself
        self.args.remove_unused_columns = False  # the samples hold what the collator needs, under names of its own
        self._loss_terms: dict[str, torch.Tensor] = {}
        self._num_steps = 0.0  # that they are sums of: this process' share
        self._num_proposals = 0  # of the last step

    def training_proposals(self) -> int:
        """N of this step."""
        most = self.accelerator.unwrap_model(self.model).config.max_training_proposals
        if self.proposal_schedule == "stable":
            return most
        progress = self.state.global_step / max(self.state.max_steps * self.proposal_growth, 1)
        return min(1 + int(progress * most), most)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device) -> int | None:
        """
        The samples of a step, over its micro-batches and all processes. Each batch learns how many of its samples are
        to count: in the last round of an epoch accelerate fills up with some that were seen already.
        """
        state, size = self.accelerator.gradient_state, self._train_batch_size
        total = 0
        for index, batch in enumerate(batch_samples):
            batch["num_samples"] = in_batch = len(batch["video_features"])
            in_round = in_batch * self.args.world_size
            is_last = state.end_of_dataloader and index == len(batch_samples) - 1
            if is_last and self.args.world_size > 1 and state.remainder > 0:
                in_round = state.remainder
                batch["num_samples"] = min(max(in_round - self.args.process_index * size, 0), in_batch)
            total += in_round
        return total or None

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """
        Calls `forward` with this step's number of proposals, and keeps the terms of the loss for the next log.

        In training the loss of a batch is weighted by its share of the step's samples, so that a step is the same
        however they are spread over processes and micro-batches.
        """
        if not model.training:
            dtype = self.accelerator.unwrap_model(model).dtype  # not float32 in a `bf16_full_eval`
            outputs = model(
                **{
                    name: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
                    for name, value in inputs.items()
                    if name not in NOT_IN_EVALUATION
                }
            )
            return (outputs.loss, outputs) if return_outputs else outputs.loss
        self._num_proposals = self.training_proposals()
        inputs = {**inputs, "num_proposals": self._num_proposals}
        count = inputs.pop("num_samples", len(inputs["video_features"]))
        if count < len(inputs["video_features"]):  # at least one, for other processes wait for this one's gradients
            inputs = slice_tensors(inputs, slice(max(count, 1)))
        outputs = model(**inputs)
        # Of the sum over processes; DistributedDataParallel takes the mean
        share = 1.0 if num_items_in_batch is None else count / num_items_in_batch
        # Added up on the device: reading them would wait for it
        for name, term in outputs.loss_dict.items():
            self._loss_terms[name] = self._loss_terms.get(name, 0) + share * term.detach()
        self._num_steps += share
        loss = outputs.loss if num_items_in_batch is None else outputs.loss * (share * self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        """As `Trainer`'s; batches know their rows."""
        return self._with_rows(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As `Trainer`'s; batches know their rows."""
        return self._with_rows(super().get_test_dataloader, test_dataset)

    def _with_rows(self, get_dataloader, dataset):
        collator, self.data_collator = self.data_collator, DiffusionVMRDataCollator(with_rows=True)
        try:
            return get_dataloader(dataset)
        finally:
            self.data_collator = collator

    def prediction_step(self, model, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        """Gives the loss, where there are labels, and `RowOutputs`, whose shapes `Trainer` can gather."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        max_clips = self.accelerator.unwrap_model(model).config.max_clips
        return None if loss is None else loss.detach(), tuple(row_outputs(outputs, inputs, max_clips)), None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """
        As `Trainer`'s, for `evaluate` and `predict`; the metrics are the official ones, where there is a truth. With
        several processes and rows that do not divide by them, `eval_loss` counts some rows twice; the metrics do not.
        """
        dataset = dataloader.dataset
        epoch = dataset.epoch
        output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        dataset.set_epoch(epoch)  # accelerate sets another one, and the training may use the same data set
        # Where the rows do not divide by the processes, some were seen twice
        _, first = np.unique(output.predictions[0], return_index=True)
        outputs = RowOutputs(*(torch.from_numpy(array[first]) for array in output.predictions))
        predictions = official_predictions(dataset, outputs)
        if all(row.get("relevant_windows") for row in dataset.rows):
            scores = evaluate_predictions(predictions, dataset.rows)
            output.metrics.update(
                {
                    f"{metric_key_prefix}_{name}": value
                    for name, value in (scores["brief"] | scores["extra"]).items()
                    if value is not None
                }
            )
        return output._replace(predictions=predictions)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As `Trainer`'s; with `resume_from_checkpoint=True` from the last checkpoint that is whole.

        Raises:
            ValueError: for a checkpoint that is not whole, or where there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir}: there is no whole checkpoint to resume from")
        elif resume_from_checkpoint:
            fault = find_fault(resume_from_checkpoint)
            if fault is not None:
                raise ValueError(f"{resume_from_checkpoint}: cannot be resumed from, {fault}")
        if self.args.should_save:  # what a training left that was killed while it saved
            shutil.rmtree(Path(self.args.output_dir, STAGING_FOLDER), ignore_errors=True)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        # `Trainer` writes into the final folder. Here it is given another one, from where the checkpoint is moved as a
        # whole; what comes after writing, pushing and the removal of old ones, waits for that.
        run_folder = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staging, best = run_folder / STAGING_FOLDER, self.state.best_model_checkpoint
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

        self._staging, push = staging, self.args.push_to_hub
        self.args.push_to_hub = False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging, self.args.push_to_hub = None, push
        self.accelerator.wait_for_everyone()

        is_best = self.state.best_global_step == self.state.global_step
        self.state.best_model_checkpoint = str(run_folder / name) if is_best else best
        if self.args.should_save:
            self.state.save_to_json(staging / name / "trainer_state.json")
            write_manifest(staging / name)
            shutil.rmtree(run_folder / name, ignore_errors=True)  # of an earlier run, which this one repeats
            os.replace(staging / name, run_folder / name)
            staging.rmdir()
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(run_folder / name))
        pushing = getattr(self, "push_in_progress", None)
        if self.args.should_save and (pushing is None or pushing.is_done()):  # a folder that is sent must not go
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save(self, output_dir: str | None = None, state_dict=None):
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.processor is not None:  # without it a checkpoint is of little use
            self.processor.save_pretrained(folder)
        # It can be read by unpickling alone, and nobody does
        (folder / "training_args.bin").unlink(missing_ok=True)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Pushes the checkpoint as a model, and by `hub_strategy` also as what a training resumes from."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        upload = partial(
            HfApi(token=self.args.hub_token).upload_folder,
            repo_id=self.hub_model_id,
            folder_path=checkpoint_folder,
            revision=self.args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
            run_as_future=True,
        )
        jobs = [upload(ignore_patterns=["*.pt", "*.pth", "trainer_state.json", MANIFEST])]
        if strategy == HubStrategy.CHECKPOINT:
            jobs.append(upload(path_in_repo="last-checkpoint"))
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            jobs.append(upload(path_in_repo=Path(checkpoint_folder).name))
        if busy:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every term of the loss since the last log, and the last N."""
        if "loss" in logs and self._loss_terms:
            totals = torch.stack(list(self._loss_terms.values()))
            totals = torch.cat((totals, totals.new_tensor([self._num_steps])))
            *totals, num_steps = self.accelerator.reduce(totals, "sum").tolist()
            for name, total in zip(self._loss_terms, totals):
                logs[f"loss_{name}"] = round(total / num_steps, 4)
            logs["num_proposals"] = self._num_proposals
            self._loss_terms, self._num_steps = {}, 0.0
        super().log(logs, start_time)
