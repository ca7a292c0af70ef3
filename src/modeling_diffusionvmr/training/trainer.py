"""Training with `transformers.Trainer`: a growing number of proposals, official metrics, atomic checkpoints."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import slice_tensors
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from ..data.backbone_record import describe_backbones
from ..model_card import write_model_card
from .arguments import DiffusionVMRTrainingArguments
from .card_facts import CardFacts
from .checkpoints import STAGING_FOLDER, check_shapes, find_fault, last_complete_checkpoint, lock_training
from .collator import DiffusionVMRDataCollator
from .dataset import MomentRetrievalDataset
from .metrics import evaluate_predictions, scorable
from .prediction import SampleOutputs, official_predictions, sample_outputs
from .trainer_internals import TrainerInternals

# Evaluation starts from pure noise, like inference, not near the truth. The last two are no arguments of the model
NOT_IN_EVALUATION = ("noisy_spans", "timesteps", "indices", "covered_durations")


class SetEpochCallback(TrainerCallback):
    """
    Set the epoch of the training dataset.

    `Trainer` leaves this to accelerate, which only sets the sampler's epoch when it wraps the data loader: after
    resuming in the middle of an epoch, and with several processes.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        if hasattr(train_dataloader.dataset, "set_epoch"):
            train_dataloader.dataset.set_epoch(int(round(state.epoch, 6)))


def _moment_datasets(dataset: Dataset | None) -> Iterator[MomentRetrievalDataset]:
    """Yield the dataset itself, or those that a `Subset` or a `ConcatDataset` consists of."""
    if isinstance(dataset, MomentRetrievalDataset):
        yield dataset
    elif isinstance(dataset, Subset):
        yield from _moment_datasets(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _moment_datasets(part)


class DiffusionVMRTrainer(TrainerInternals):
    """
    A `Trainer` with a growing number of proposals (section 3.2 and Table 6), official metrics and atomic checkpoints.

    How the number of proposals grows is set in `args`, a `DiffusionVMRTrainingArguments`; with plain
    `TrainingArguments`, its defaults apply. Every term of the loss is logged, and so is every number in `"brief"` and
    `"extra"` of `evaluate_predictions`, as `eval_MR-full-mAP` and so on. To keep the best model, set
    `metric_for_best_model="MR-full-mAP"` and `load_best_model_at_end=True`. `predict` returns predictions in the
    official format.

    Args:
        processing_class: the processor to save with the model. Default: that of the training dataset.
        model, args, data_collator, other_args, kwargs: as for `Trainer`.

    Raises:
        ValueError: if `compute_metrics` is given, if the arguments rule out the official metrics, or if one process
            sees several GPUs.
    """

    def __init__(
        self,
        model=None,
        args=None,
        data_collator=None,
        *other_args,
        processing_class=None,
        compute_metrics=None,
        **kwargs,
    ):
        if compute_metrics is not None:
            raise ValueError("`compute_metrics` is not supported: evaluation computes the official metrics")
        for field, needed in (("eval_do_concat_batches", True), ("batch_eval_metrics", False)):
            if args is not None and getattr(args, field) is not needed:
                raise ValueError(f"the official metrics need all predictions at once: `{field}` must be {needed}")
        # The processor is not passed on: `Trainer` assumes that every processor has a tokenizer
        super().__init__(model, args, data_collator or DiffusionVMRDataCollator(), *other_args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs need one process each: start the training with `accelerate launch "
                f"--num_processes {self.args.n_gpu} -m modeling_diffusionvmr train ...`, or set CUDA_VISIBLE_DEVICES=0 "
                "to use one GPU"
            )
        self.processor = processing_class
        if processing_class is None:
            self.processor = getattr(self.train_dataset, "processor", None)
        self._describe_backbones()
        self.add_callback(SetEpochCallback())
        self.card = CardFacts(self)
        self.add_callback(self.card)
        defaults = DiffusionVMRTrainingArguments
        self.proposal_schedule: str = getattr(self.args, "proposal_schedule", defaults.proposal_schedule)
        self.proposal_growth: float = getattr(self.args, "proposal_growth", defaults.proposal_growth)
        self.model_accepts_loss_kwargs = True  # `compute_loss` weights micro-batches itself
        self.args.remove_unused_columns = False  # the fields of samples are for the collator, not for `forward`
        self._loss_terms: dict[str, torch.Tensor] = {}
        self._num_steps = 0.0  # number of steps summed in `_loss_terms`: this process's share
        self._num_proposals = 0  # in the last step
        self._all_labeled = False  # whether every row of the evaluation has a label
        self._warned: set[str] = set()  # messages about rows that are not scored

    def _describe_backbones(self) -> None:
        """Set `backbones` of a model that has none to those that computed the features, so that it runs on videos."""
        model: Any = self.accelerator.unwrap_model(self.model)
        dataset: Any = self.train_dataset
        video, text = getattr(dataset, "video_features", ()), getattr(dataset, "text_features", {})
        if model.config.backbones is None and any(getattr(store, "backbone", None) for store in (*video, text)):
            processor = self.processor
            model.config.backbones, model.backbone_sources = describe_backbones(
                video, text, processor.video_feature_sizes, processor.text_feature_size, dataset.clip_seconds
            )

    def training_proposals(self) -> int:
        """Return the number of proposals at this step."""
        maximum = self.accelerator.unwrap_model(self.model).config.max_training_proposals
        if self.proposal_schedule == "stable":
            return maximum
        progress = self.state.global_step / max(self.state.max_steps * self.proposal_growth, 1)
        return min(1 + int(progress * maximum), maximum)

    def compute_loss(self, model, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch=None):
        """
        Call `forward` with this step's number of proposals, and keep the terms of the loss for the next log.

        In training, the loss of a batch is weighted by its share of the step's samples, so that a step does not depend
        on how its samples are distributed over processes and micro-batches.
        """
        if not model.training:
            dtype = self.accelerator.unwrap_model(model).dtype  # not float32 with `bf16_full_eval`
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
        if count < len(inputs["video_features"]):  # keep at least one: other processes wait for this one's gradients
            inputs = slice_tensors(inputs, slice(max(count, 1)))
        outputs = model(**inputs)
        # The terms are summed over processes, so each counts with its share. DistributedDataParallel averages the
        # gradients instead, hence the factor `world_size` below.
        share = 1.0 if num_items_in_batch is None else count / num_items_in_batch
        # Sum on the device, since reading the values would wait for it
        for name, term in outputs.loss_dict.items():
            self._loss_terms[name] = self._loss_terms.get(name, 0) + share * term.detach()
        self._num_steps += share
        loss = outputs.loss if num_items_in_batch is None else outputs.loss * (share * self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of every term of the loss since the last log, and the last number of proposals."""
        if "loss" in logs and self._loss_terms:
            totals = torch.stack(list(self._loss_terms.values()))
            totals = torch.cat((totals, totals.new_tensor([self._num_steps])))
            *totals, num_steps = self.accelerator.reduce(totals, "sum").tolist()
            for name, total in zip(self._loss_terms, totals):
                logs[f"loss_{name}"] = round(total / num_steps, 4)
            logs["num_proposals"] = self._num_proposals
            self._loss_terms, self._num_steps = {}, 0.0
        super().log(logs, start_time)

    def get_train_dataloader(self):
        """
        As in `Trainer`.

        Raises:
            ValueError: if the weights to train are not float32, if the dataset was built without the model's
                configuration, or if there is no batch.
        """
        model = self.accelerator.unwrap_model(self.model)
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                raise ValueError(
                    f"the model's weights are {parameter.dtype}, in which training loses small updates: load the model "
                    "with dtype=torch.float32; `bf16=True` (--bf16) then computes in bfloat16"
                )
        for dataset in _moment_datasets(self.train_dataset):
            dataset.check_config(model.config)
        loader = super().get_train_dataloader()
        if not len(loader):
            raise ValueError(
                "nothing to train on: the dataset has fewer samples than a batch, and `dataloader_drop_last` drops it"
            )
        return loader

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None):
        """As in `Trainer`, but batches contain the indices of their samples."""
        return self._with_indices(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """As in `Trainer`, but batches contain the indices of their samples."""
        return self._with_indices(super().get_test_dataloader, test_dataset)

    def _with_indices(self, get_dataloader, dataset):
        collator, self.data_collator = self.data_collator, DiffusionVMRDataCollator(with_indices=True)
        try:
            return get_dataloader(dataset)
        finally:
            self.data_collator = collator

    def prediction_step(self, model, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys=None):
        """Return the loss, if all rows are labeled, and `SampleOutputs`, whose shapes `Trainer` can gather."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        max_clips = self.accelerator.unwrap_model(model).config.max_clips
        return loss.detach() if self._all_labeled else None, tuple(sample_outputs(outputs, inputs, max_clips)), None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """
        As in `Trainer`, for `evaluate` and `predict`, with the official metrics of the rows that have windows.

        If the number of samples is not divisible by the number of processes, `eval_loss` counts some of them twice. The
        metrics do not.
        """
        dataset = dataloader.dataset
        epoch = dataset.epoch
        self.card.evaluated[metric_key_prefix] = dataset
        # Processes gather their losses batch by batch, so either every batch has one or none has
        self._all_labeled = all("relevant_windows" in row for row in dataset.rows)
        with self._keeping_weights():
            output = super().evaluation_loop(dataloader, description, False, ignore_keys, metric_key_prefix)
        dataset.set_epoch(epoch)  # accelerate changes it, and training may use the same dataset
        # If the samples cannot be divided evenly among the processes, some occur twice
        _, first = np.unique(output.predictions[0], return_index=True)
        outputs = SampleOutputs(*(torch.from_numpy(array[first]) for array in output.predictions))
        predictions = official_predictions(dataset, outputs)
        scored, references, message = scorable(predictions, dataset.rows)
        if message is not None and message not in self._warned and self.is_world_process_zero():
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)
        metrics = dict(output.metrics or {})
        if references:
            scores = evaluate_predictions(scored, references)
            for name, value in (scores["brief"] | scores["extra"]).items():
                if value is not None:
                    metrics[f"{metric_key_prefix}_{name}"] = value
        # `Trainer` passes these through unchanged, although its annotation only allows arrays
        return output._replace(predictions=predictions, metrics=metrics)  # type: ignore[arg-type]

    @contextmanager
    def _keeping_weights(self) -> Iterator[None]:
        """Undo the rounding of the weights by `fp16_full_eval` and `bf16_full_eval`: they may be saved afterwards."""
        if self.is_in_train or not (self.args.fp16_full_eval or self.args.bf16_full_eval):
            yield
            return
        model = self.accelerator.unwrap_model(self.model)
        dtype, weights = model.dtype, {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
        yield
        model.to(dtype).load_state_dict(weights)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As in `Trainer`, but `resume_from_checkpoint=True` resumes from the last complete checkpoint.

        Raises:
            ValueError: if the checkpoint is incomplete or damaged, if there is none, or if it does not fit the model.
            BlockingIOError: if another training is writing to the output folder.
        """
        folder = Path(str(self.args.output_dir))
        with self._lock(folder):
            output = super().train(self._checked(resume_from_checkpoint), *args, **kwargs)
        self.accelerator.unwrap_model(self.model).missing_weights = []  # they have been trained
        return output

    @contextmanager
    def _lock(self, folder: Path) -> Iterator[None]:
        """Keep other trainings from writing to the output folder, and remove what a killed one left there."""
        if not self.args.should_save:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        with lock_training(folder):
            shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)  # of a training that was killed while saving
            yield

    def _checked(self, resume_from_checkpoint: str | bool | None) -> str | bool | None:
        """Return the checkpoint to resume from, if any. Raise `ValueError` if that is impossible."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir}: no complete checkpoint to resume from")
        elif resume_from_checkpoint:
            fault = find_fault(resume_from_checkpoint)
            if fault is not None:
                raise ValueError(f"{resume_from_checkpoint}: cannot resume from it: {fault}")
        if resume_from_checkpoint:
            check_shapes(resume_from_checkpoint, self.accelerator.unwrap_model(self.model))
        return resume_from_checkpoint

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, but with the processor, and without `training_args.bin`, which is a pickle."""
        self.card.update()
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or str(self.args.output_dir))
            if self.processor is not None:
                self.processor.save_pretrained(folder)
            (folder / "training_args.bin").unlink(missing_ok=True)

    def create_model_card(
        self,
        language=None,
        license=None,
        tags=None,
        model_name=None,
        finetuned_from=None,
        tasks=None,
        dataset_tags=None,
        dataset=None,
        dataset_args=None,
    ) -> None:
        """
        Write the model card to `output_dir`. Saving writes it too; here you can add what the trainer does not know.

        Args:
            language: languages of the queries. Default: English.
            license: license of the model. Default: that of the model that was fine-tuned, or Apache-2.0.
            tags: tags to add.
            finetuned_from: Hub id of the model that was fine-tuned. Default: the model's own, if it is from the Hub.
            dataset_tags: Hub ids of the training data.
            dataset: name of the training data.
            model_name, tasks, dataset_args: ignored; the library writes its own.
        """
        given = {"language": language, "license": license, "tags": tags, "base_model": finetuned_from}
        given["datasets"] = dataset_tags
        for name, value in given.items():
            if value is not None:
                is_list = name in ("language", "tags", "datasets")
                self.card.given[name] = [value] if is_list and isinstance(value, str) else value
        train_dataset: Any = self.train_dataset
        if dataset is not None and train_dataset is not None:
            train_dataset.name = dataset if isinstance(dataset, str) else ", ".join(dataset)
        self.card.update()
        if self.is_world_process_zero():
            write_model_card(self.accelerator.unwrap_model(self.model), str(self.args.output_dir))
