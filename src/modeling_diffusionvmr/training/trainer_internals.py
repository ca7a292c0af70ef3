"""The part of the trainer that relies on private methods of `transformers.Trainer`."""

import shutil
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, rotate_checkpoints
from transformers.utils import PushInProgress

from ..data.files import move_into_place
from ..hub import upload
from .checkpoints import STAGING_FOLDER, check_optimizer, check_scheduler, resuming, write_manifest


class OneDraw(Sampler):
    """A sampler that draws one number from PyTorch's global generator per pass, and is otherwise the one it wraps."""

    def __init__(self, sampler: Sampler):
        self.sampler = sampler

    def __iter__(self):
        torch.empty((), dtype=torch.int64).random_()
        yield from self.sampler

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]

    def __getattr__(self, name: str):
        if name == "sampler":  # not yet set, while unpickling
            raise AttributeError(name)
        return getattr(self.sampler, name)


class TrainerInternals(Trainer):
    """
    A `Trainer` that weights samples equally, saves checkpoints atomically and resumes to the same weights.

    All overrides of private methods are in this class. The comment above each says what it relies on in `Trainer` and
    why no public hook is sufficient. Check these when the tested range of transformers grows.
    """

    _uploader = cached_property(lambda self: HfApi())  # runs uploads in order
    _staging: Path | None = None  # the folder in which a checkpoint is being written

    # `Trainer` calls this once per optimizer step with the step's micro-batches, and passes the result to
    # `compute_loss` as `num_items_in_batch`. Its own version counts tokens in `labels`; here the items are samples. No
    # public hook gets all micro-batches of a step.
    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device) -> int | None:
        """
        Return the number of samples in a step, over its micro-batches and all processes.

        Also set `num_samples` in each batch, the number of its samples that count: in the last round of an epoch,
        accelerate pads batches with samples that were already seen.
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

    # A data loader draws a seed for its workers from the global generator, which dropout uses too: once per pass, but
    # only once in all with persistent workers. A resumed training would draw it once more, and end with other weights.
    # Here that seed comes from a generator of its own, and every pass draws one number, as without persistent workers.
    # The public `get_*_dataloader` do not say whether they return a new loader or one that they returned before.
    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.seed)
        batches = getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)  # inside that of a process
        batches.sampler = OneDraw(batches.sampler)
        return loader

    # `Trainer` writes into the final folder, pushes it and removes old checkpoints, all in this one method, and its
    # callbacks only run afterwards. Here it writes into a staging folder without pushing. The complete folder is then
    # moved to its place, and only after that are checkpoints pushed and removed.
    def _save_checkpoint(self, model, trial):
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
            shutil.rmtree(run_folder / name, ignore_errors=True)  # from an earlier run that this one repeats
            move_into_place(staging / name, run_folder / name)
            staging.rmdir()
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(run_folder / name))
        pushing = getattr(self, "push_in_progress", None)
        if self.args.should_save and (pushing is None or pushing.is_done()):  # keep a folder that is being uploaded
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    # `Trainer._save_checkpoint` asks this method where to write. Changing `args.output_dir` temporarily would redirect
    # more than the checkpoint, since it is read in other places too.
    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    # `Trainer` does not compare these states with the model. They would fail, if at all, in the first step.
    def _load_optimizer_and_scheduler(self, checkpoint):
        saved = Path(checkpoint or "", "scheduler.pt")
        if checkpoint is not None and saved.is_file():
            with resuming(checkpoint, saved.name):
                check_scheduler(torch.load(saved, map_location="cpu", weights_only=True), self.lr_scheduler)
        with resuming(checkpoint, "optimizer.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and not self.is_deepspeed_enabled:
                check_optimizer(self.optimizer)

    def _load_rng_state(self, checkpoint):
        with resuming(checkpoint, "rng_state*.pth"):
            super()._load_rng_state(checkpoint)

    # `Trainer` uploads its output folder with copies of the weights, but without the processor and the model's code,
    # and pickles its arguments. Here the checkpoint's own folder is uploaded. `PushInProgress` is what
    # `Trainer.push_to_hub` waits for.
    def _push_from_checkpoint(self, checkpoint_folder: str):
        """
        Push the checkpoint as a model. Depending on `hub_strategy`, also push all of its files to a subfolder, from
        which a training can resume and which nothing else reads.
        """
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        pushing: Any = self.push_in_progress
        busy = pushing is not None and not pushing.is_done()
        if busy and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        copies = {}
        if strategy == HubStrategy.CHECKPOINT:
            copies = {"last-checkpoint": checkpoint_folder}
        elif strategy == HubStrategy.ALL_CHECKPOINTS:
            copies = {Path(checkpoint_folder).name: checkpoint_folder}
        message = f"Training in progress, step {self.state.global_step}"
        job = self._upload(checkpoint_folder, message, self.args.hub_token, self.args.hub_revision, copies)
        if busy:
            pushing.jobs.append(job)
        else:  # `Trainer` declares the attribute as None
            self.push_in_progress = PushInProgress([job])  # type: ignore[assignment, arg-type]

    # `Trainer` uploads all of its output folder, logs included, with a model card of its own. `_finish_current_push`
    # waits for pushes of checkpoints.
    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ):
        """
        As in `Trainer`, but only the files of the model are pushed, in one commit and with a card by this library.

        Args:
            kwargs: arguments of `create_model_card`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        revision = self.args.hub_revision if revision is None else revision
        job = self._upload(str(self.args.output_dir), commit_message or "End of training", token, revision, {})
        return job.result() if blocking else job

    def _upload(
        self, folder: str, message: str, token: str | None, revision: str | None, copies: dict[str, str]
    ) -> Future:
        """Start to upload a checkpoint after those before it, see `hub.upload`."""
        options = {"commit_message": message, "token": token, "revision": revision, "copies": copies}
        return self._uploader.run_as_future(upload, folder, self.hub_model_id, **options)
