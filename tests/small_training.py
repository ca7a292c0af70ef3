"""
A training that takes seconds, shared by several test files, and functions that run it in other processes.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from transformers import TrainerCallback, modeling_utils, set_seed

from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    DiffusionVMRTrainer,
    MomentRetrievalDataset,
)
from modeling_diffusionvmr.training.arguments import DiffusionVMRTrainingArguments

LENGTHS = (10, 15, 20, 34)  # clips of the videos
TERMS = ("class", "l1", "iou", "hinge", "contrastive")


class Recording(MomentRetrievalDataset):
    """Records the epochs that it was told."""

    def set_epoch(self, epoch):
        super().set_epoch(epoch)
        self.epochs = [*getattr(self, "epochs", []), epoch]


def make_dataset(
    config: DiffusionVMRConfig | None,
    num_rows: int = 8,
    truth: bool = True,
    lengths: tuple[int, ...] = LENGTHS,
    num_tokens: int | None = None,
) -> Recording:
    """Make a dataset of random features; with `config`, one to train on."""
    rng = np.random.default_rng(0)
    video = {f"v{index}": rng.normal(size=(length, 12)).astype("f4") for index, length in enumerate(lengths)}
    rows, text = [], {}
    for qid in range(num_rows):
        rows.append({"qid": qid, "query": f"query {qid}", "vid": f"v{qid % 4}", "duration": 2.0 * lengths[qid % 4]})
        if truth:
            rows[-1]["relevant_windows"] = [[2.0, 8.0], [10.0, 18.0]][: 1 + qid % 2]
        text[qid] = rng.normal(size=(num_tokens or 2 + qid % 8, 8)).astype("f4")
    processor = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=10)
    return Recording(rows, video, text, processor, config, clip_seconds=2.0)


def make_trainer(
    folder: str | Path,
    config: DiffusionVMRConfig,
    proposal_schedule: str = "progress",
    proposal_growth: float = 1.0,
    processor: DiffusionVMRProcessor | None = None,
    num_rows: int = 8,
    train_dataset=None,
    eval_dataset=None,
    callbacks: list | None = None,
    model: DiffusionVMRForMomentRetrieval | None = None,
    **arguments,
) -> DiffusionVMRTrainer:
    """
    Make a trainer, by default with a new model, the same each time. `arguments` are those of
    `DiffusionVMRTrainingArguments`.
    """
    set_seed(0)
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 12,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "proposal_schedule": proposal_schedule,
        "proposal_growth": proposal_growth,
    }
    return DiffusionVMRTrainer(
        model=DiffusionVMRForMomentRetrieval(config) if model is None else model,
        args=DiffusionVMRTrainingArguments(str(folder), **{**options, **arguments}),
        train_dataset=make_dataset(config, num_rows) if train_dataset is None else train_dataset,
        eval_dataset=make_dataset(None) if eval_dataset is None else eval_dataset,
        processing_class=processor,
        callbacks=callbacks,
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy all parameters."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


# In other processes


@functools.cache
def process_context() -> multiprocessing.context.BaseContext:
    """Return a context whose processes are forked from one that has imported everything, and that see no GPU."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_training"])
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    multiprocessing.forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    return context


def in_process(function: Callable, *positional, **arguments):
    """Call a function of this file in another process and wait for it."""
    process = process_context().Process(target=function, args=positional, kwargs=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def launch(specification: Path, num_processes: int):
    """Call `run_specification` in several processes, with the environment that torchrun and `accelerate launch` set."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    processes = []
    for rank in range(num_processes):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_processes)}
        processes.append(process_context().Process(target=run_launched, args=(specification, environment)))
        processes[-1].start()
    try:
        for process in processes:
            process.join(300)
        assert [process.exitcode for process in processes] == [0] * num_processes
    finally:
        for process in processes:
            process.kill()


def run_launched(specification: Path, environment: dict[str, str]):
    """One of the processes of `launch`."""
    os.environ.update(environment)
    run_specification(specification)


def train(folder: str, fields: dict, resume: str | bool | None = None, **arguments):
    """Train in a folder and write `weights` and `logs` there."""
    os.chdir(folder)
    trainer = make_trainer("run", DiffusionVMRConfig(**fields), use_cpu=True, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    safetensors.torch.save_file(weights_of(trainer.model), "weights")
    Path("logs").write_text(json.dumps(trainer.state.log_history))


def train_until_killed(folder: str, fields: dict, ready):
    """Train with workers, and set the event `ready` in the first step, which does not end."""

    class Wait(TrainerCallback):
        def on_step_begin(self, *arguments, **options):
            ready.set()
            signal.pause()

    workers = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}
    make_trainer(folder, DiffusionVMRConfig(**fields), use_cpu=True, callbacks=[Wait()], **workers).train()


def resume_everywhere(folders: list[str], fields: dict, **arguments):
    """Resume training in one folder after the other."""
    for folder in folders:
        train(folder, fields, True, **arguments)


def save_and_die(folder: str, fields: dict, step: int, **arguments):
    """
    Train in a folder until the checkpoint of `step` is saved.

    Copies of the process save it, each in a copy of the folder, `0`, `1` and so on. Each is killed at a later moment
    than the one before, until one survives.
    """
    os.chdir(folder)
    trainer = make_trainer("run", DiffusionVMRConfig(**fields), use_cpu=True, **arguments)
    save_checkpoint = trainer._save_checkpoint

    def save(*save_arguments):
        if trainer.state.global_step < step:
            return save_checkpoint(*save_arguments)
        for moment in itertools.count():
            process = os.fork()
            if not process:
                shutil.copytree("run", f"{moment}/run")
                os.chdir(f"{moment}")
                try:
                    with die_at(moment):
                        save_checkpoint(*save_arguments)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            _, status = os.waitpid(process, 0)
            if not os.WIFSIGNALED(status):
                os._exit(status)

    trainer._save_checkpoint = save
    trainer.train()


@contextlib.contextmanager
def die_at(moment: int):
    """
    Kill this process at one of the moments at which it changes files here, and describe it in the file `moment`.

    There is a moment before Python opens a file for writing, moves or removes one; and before, halfway through and
    after `torch.save` and safetensors write one. The model's code does not count: it is more files than all others,
    and a checkpoint is not worse off without it.
    """
    moments = iter(range(moment, -1, -1))
    here = os.getcwd()

    def at(what: str, path):
        is_watched = os.path.abspath(path).startswith(here) and not str(path).endswith(".py")
        if not is_watched or next(moments, None) != 0:
            return
        Path("moment").write_text(f"{what} {os.path.relpath(path)}")
        os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple):
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            if (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
                at(event, arguments[0])
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            at(event, arguments[0])  # in a tree that is removed, a file is named without its folder

    def watched(save: Callable) -> Callable:
        def wrapper(content, path, *arguments, **options):
            at("before", path)
            save(content, path, *arguments, **options)
            whole = Path(path).read_bytes()
            os.truncate(path, len(whole) // 2)
            at("half of", path)
            save(content, path, *arguments, **options)
            at("after", path)

        return wrapper

    sys.addaudithook(audit)
    torch.save = watched(torch.save)
    modeling_utils.safe_save_file = watched(modeling_utils.safe_save_file)
    yield


def run_specification(path: str | Path):
    """
    Run the trainings of a specification one after the other: `{"config": fields, "runs": {name: options}}`.

    The options are those of `make_trainer`, and `global_batch` and `num_eval_rows`. The first process writes
    `NAME.json`, the logs and the predictions, and `NAME.safetensors`.
    """
    path = Path(path)
    specification = json.loads(path.read_text())
    config = DiffusionVMRConfig(**specification["config"])
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    for name, options in specification["runs"].items():
        eval_dataset = make_dataset(None, options.pop("num_eval_rows"))
        batch = options.pop("global_batch") // options.get("gradient_accumulation_steps", 1)
        if "split_batches" not in options.get("accelerator_config", {}):
            batch //= world_size
        options["per_device_train_batch_size"] = batch
        trainer = make_trainer(path.parent / name, config, eval_dataset=eval_dataset, use_cpu=True, **options)
        trainer.train()
        predictions = trainer.predict(eval_dataset).predictions
        if trainer.is_world_process_zero():
            safetensors.torch.save_file(weights_of(trainer.model), path.parent / f"{name}.safetensors")
            results = {
                "logs": trainer.state.log_history,
                "predictions": predictions,
                "processes": trainer.args.world_size,
            }
            (path.parent / f"{name}.json").write_text(json.dumps(results))
