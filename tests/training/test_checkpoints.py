"""A training killed at any moment resumes from the last complete checkpoint and ends with the same weights."""

import json
import os
import re
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from transformers import AutoModel, AutoProcessor, TrainerCallback

import small_training
from modeling_diffusionvmr.training import trainer as trainer_module
from modeling_diffusionvmr.training.checkpoints import (
    LOCK,
    STAGING_FOLDER,
    find_fault,
    last_complete_checkpoint,
    write_manifest,
)
from small_training import make_trainer, weights_of

# An epoch has 5 micro-batches and 3 steps, so that most checkpoints are in the middle of one. Dropout is on.
TRAINING = {
    "num_rows": 10,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 6,
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
}
FILES = (
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "processor_config.json",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
)


@pytest.fixture(scope="module")
def in_process(tiny_config):
    """Call a function of `small_training` in another process, with the arguments above."""

    def run(function, where, *positional, **arguments):
        fields = tiny_config().to_diff_dict()
        small_training.in_process(function, where, fields, *positional, **{**TRAINING, **arguments})

    return run


@pytest.fixture(scope="module")
def uninterrupted(in_process, tmp_path_factory) -> Path:
    """The folder of a training that was not interrupted; all its checkpoints are in `run`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    in_process(small_training.train, str(folder))
    return folder


@pytest.fixture
def copied(uninterrupted, tmp_path) -> Path:
    """A folder with copies of the checkpoints of steps 3 and 4 in `run`."""
    for step in (3, 4):
        shutil.copytree(uninterrupted / f"run/checkpoint-{step}", tmp_path / f"run/checkpoint-{step}")
    return tmp_path


def assert_same_end(folder: Path, uninterrupted: Path):
    """Compare weights, bit by bit."""
    ours, theirs = (safetensors.torch.load_file(path / "weights") for path in (folder, uninterrupted))
    assert ours.keys() == theirs.keys()
    different = [name for name, weights in ours.items() if not torch.equal(weights, theirs[name])]
    assert not different


def contents(checkpoint: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in checkpoint.iterdir()}


# Killed


@pytest.fixture(scope="module")
def killed(in_process, tmp_path_factory) -> list[Path]:
    """Folders of trainings that were killed while they saved the checkpoint of step 2 and removed that of step 1."""
    folder = tmp_path_factory.mktemp("killed")
    in_process(small_training.save_and_die, str(folder), 2, save_total_limit=1)
    return sorted((path.parent for path in folder.glob("*/moment")), key=lambda path: int(path.name))


def test_training_is_killed_at_every_file(killed):
    """The moments that the next test relies on exist."""
    moments = [(folder / "moment").read_text() for folder in killed]
    staged = f"run/{STAGING_FOLDER}/checkpoint-2"
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert {f"before {staged}/{name}", f"half of {staged}/{name}", f"after {staged}/{name}"} <= set(moments)
    for name in ("config.json", "processor_config.json", "trainer_state.json"):
        assert f"open {staged}/{name}" in moments
    assert f"os.rename {staged}" in moments
    removal = moments.index("shutil.rmtree run/checkpoint-1")
    assert removal > moments.index(f"os.rename {staged}")
    assert len(moments[removal:]) > len(FILES)


def test_a_checkpoint_is_complete_or_not_there(killed, uninterrupted):
    steps = []
    for folder in killed:
        moment = (folder / "moment").read_text()
        for checkpoint in (folder / "run").glob("checkpoint-*"):
            complete = contents(checkpoint).keys() == contents(uninterrupted / "run" / checkpoint.name).keys()
            assert complete == (find_fault(checkpoint) is None), f"{checkpoint.name} after {moment}"
            assert complete or checkpoint.name == "checkpoint-1"  # which is being removed
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the last one is complete: nothing is skipped
            last = last_complete_checkpoint(folder / "run")
        assert last is not None, moment
        steps.append(int(last.split("-")[-1]))
    assert steps == sorted(steps) and set(steps) == {1, 2}


def test_a_killed_training_resumes_to_the_same_weights(killed, uninterrupted, in_process):
    """Killed halfway through a file, between writing and moving, after moving, and while removing the old one."""
    moments = [(folder / "moment").read_text() for folder in killed]
    staged = f"run/{STAGING_FOLDER}/checkpoint-2"
    moved = moments.index(f"os.rename {staged}")
    removed = moments.index("shutil.rmtree run/checkpoint-1")
    chosen = (moments.index(f"half of {staged}/optimizer.pt"), moved, moved + 1, (removed + len(moments)) // 2)
    folders = [killed[index] for index in chosen]
    in_process(small_training.resume_everywhere, [str(folder) for folder in folders], save_total_limit=1)
    for folder in folders:
        assert_same_end(folder, uninterrupted)
        assert [path.name for path in (folder / "run").iterdir()] == ["checkpoint-6"]  # and nothing half-written


# Resumed


def test_resumes_from_any_step_to_the_same_weights(uninterrupted, in_process, tmp_path):
    """At the end and in the middle of an epoch, with dropout, with and without workers, which may be persistent."""
    logs = json.loads((uninterrupted / "logs").read_text())
    workers = {"dataloader_num_workers": 2, "dataloader_multiprocessing_context": "fork"}
    persistent = {**workers, "dataloader_persistent_workers": True}
    for step, options in ((0, persistent), (1, persistent), (2, workers), (3, persistent), (4, {}), (5, {})):
        folder = tmp_path / str(step)
        folder.mkdir()
        checkpoint = str(uninterrupted / f"run/checkpoint-{step}") if step else None
        in_process(small_training.train, str(folder), checkpoint, save_strategy="no", **options)
        assert_same_end(folder, uninterrupted)
        ours, theirs = (
            [{name: log[name] for name in log if name.startswith(("loss", "num", "grad"))} for log in history]
            for history in (json.loads((folder / "logs").read_text()), logs)
        )
        assert ours == theirs  # all terms, and the number of proposals
    assert [log["num_proposals"] for log in logs if "loss" in log] == [1, 2, 3, 4, 5, 6]


def test_starts_over_without_a_checkpoint_only_if_asked_to(tiny_config, tmp_path):
    trainer = make_trainer(tmp_path, tiny_config(), max_steps=1)
    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        trainer.train(resume_from_checkpoint=True)
    (tmp_path / STAGING_FOLDER / "checkpoint-1").mkdir(parents=True)
    trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


# Two at once


def test_a_second_training_in_a_folder_is_refused(tiny_config, tmp_path):
    """While the first one trains, with workers, but not after it was killed."""
    folder = tmp_path / "run"
    trainer = make_trainer(folder, tiny_config(), max_steps=1)
    context = small_training.process_context()
    ready = context.Event()
    arguments = (str(folder), tiny_config().to_diff_dict(), ready)
    process = context.Process(target=small_training.train_until_killed, args=arguments)
    process.start()
    try:
        assert ready.wait(60)
        (folder / STAGING_FOLDER).mkdir()
        with pytest.raises(BlockingIOError, match=f"^{re.escape(str(folder))}: another training is writing to this"):
            trainer.train()
        assert (folder / STAGING_FOLDER).exists()  # it belongs to the other one
    finally:
        process.kill()
        process.join()
    assert (folder / LOCK).exists()
    trainer.train()
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]


# Damaged


def truncate(path: Path):
    os.truncate(path, path.stat().st_size // 2)


def cut_off_the_end(path: Path):
    os.truncate(path, path.stat().st_size - 2)


def empty(path: Path):
    path.write_bytes(b"")


def replace(path: Path):
    path.write_bytes(b"?" * path.stat().st_size)


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def zero_the_tail(path: Path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


FAULTS = {"model.safetensors": "weights|model.safetensors"}
DAMAGES = (truncate, cut_off_the_end, empty, replace, flip_a_bit, zero_the_tail, Path.unlink)


def test_files_of_a_checkpoint(uninterrupted):
    """Those that are damaged below, and the code, but nothing that only unpickling could read."""
    found = {name for name in contents(uninterrupted / "run/checkpoint-4") if not name.endswith(".py")}
    assert found == {*FILES, "manifest.json", "README.md"}
    assert not list(uninterrupted.rglob("training_args.bin"))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_skipped(copied, name, damage):
    damage(copied / "run/checkpoint-4" / name)
    with pytest.warns(UserWarning, match=f"checkpoint-4: skipped, cannot resume from it: .*{FAULTS.get(name, name)}"):
        assert last_complete_checkpoint(copied / "run") == str(copied / "run/checkpoint-3")


def test_digests_cover_folders_but_not_the_model_card(copied):
    checkpoint = copied / "run/checkpoint-4"
    (checkpoint / "clip").mkdir()
    (checkpoint / "clip/model.safetensors").write_bytes(b"weights")
    (checkpoint / "README.md").write_text("generated")
    write_manifest(checkpoint)
    (checkpoint / "README.md").write_text("edited by hand")
    assert find_fault(checkpoint) is None
    flip_a_bit(checkpoint / "clip/model.safetensors")
    assert find_fault(checkpoint) == "clip/model.safetensors is damaged: its digest is not that in manifest.json"


def test_a_manifest_without_digests_checks_sizes_and_says_so(copied):
    checkpoint = copied / "run/checkpoint-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sizes = {name: entry["size"] for name, entry in manifest.items()}
    (checkpoint / "manifest.json").write_text(json.dumps(sizes))
    with pytest.warns(UserWarning, match="checkpoint-4: manifest.json has no digests, so only the sizes"):
        assert find_fault(checkpoint) is None
    (checkpoint / "manifest.json").write_text(json.dumps({**sizes, "config.json": 1}))
    assert find_fault(checkpoint) == f"config.json has {sizes['config.json']} bytes instead of 1"
    (checkpoint / "manifest.json").write_text(json.dumps({**manifest, "config.json": 1}))
    assert find_fault(checkpoint) == "manifest.json: `config.json` must have a `size` and a `sha256`, got 1"


def test_an_empty_folder_is_skipped(copied):
    shutil.rmtree(copied / "run/checkpoint-4")
    (copied / "run/checkpoint-4").mkdir()
    (copied / "run/checkpoint-best").mkdir()  # a folder of the user
    (copied / "run/checkpoint-9").write_text("no folder")
    with pytest.warns(UserWarning, match="checkpoint-4") as warned:
        assert last_complete_checkpoint(copied / "run") == str(copied / "run/checkpoint-3")
    assert len(warned) == 1


def test_training_resumes_from_before_the_damage(copied, uninterrupted, in_process):
    truncate(copied / "run/checkpoint-4/optimizer.pt")
    in_process(small_training.train, str(copied), True)
    assert_same_end(copied, uninterrupted)
    assert find_fault(copied / "run/checkpoint-4") is None  # it was saved again
    assert contents(copied / "run/checkpoint-4").keys() == contents(uninterrupted / "run/checkpoint-4").keys()


def test_a_damaged_checkpoint_is_rejected_by_name(copied, tiny_config):
    trainer = make_trainer(copied / "run", tiny_config(), **TRAINING)
    for name in ("optimizer.pt", "trainer_state.json"):
        truncate(copied / "run/checkpoint-4" / name)
        with pytest.raises(ValueError, match=f"checkpoint-4.*cannot resume from it.*{name}"):
            trainer.train(resume_from_checkpoint=str(copied / "run/checkpoint-4"))
    with pytest.raises(ValueError, match="checkpoint-7"):
        trainer.train(resume_from_checkpoint=str(copied / "run/checkpoint-7"))
    assert trainer.state.global_step == 0


STATES = {
    "{}": (lambda state: {}, "`global_step` must be a whole number, 0 or more, got None"),
    "other fields": (lambda state: {**state, "steps": 4}, "unknown field `steps`"),
    "no batch size": (
        lambda state: {**state, "train_batch_size": None},
        "`train_batch_size` must be a number, got None",
    ),
    "half a step": (
        lambda state: {**state, "global_step": 1.5},
        "`global_step` must be a whole number, 0 or more, got 1.5",
    ),
    "text for an interval": (lambda state: {**state, "save_steps": "a"}, "`save_steps` must be a number, got 'a'"),
    "text for the best": (
        lambda state: {**state, "best_metric": "a"},
        "`best_metric` must be a number or null, got 'a'",
    ),
    "no control": (
        lambda state: {**state, "stateful_callbacks": {}},
        "`stateful_callbacks` must have an object `TrainerControl`",
    ),
    "text for a number": (lambda state: {**state, "epoch": "2"}, "`epoch` must be a number, got '2'"),
    "no list": (lambda state: {**state, "log_history": "x"}, "`log_history` must be a list, got 'x'"),
    "no object": (
        lambda state: {**state, "stateful_callbacks": "x"},
        "`stateful_callbacks` must be an object, got 'x'",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_other_fields_is_rejected_by_name(copied, tiny_config, name):
    """Also in a checkpoint of plain `Trainer`, which has no manifest."""
    change, fault = STATES[name]
    checkpoint = copied / "run/checkpoint-4"
    assert find_fault(checkpoint) is None
    (checkpoint / "manifest.json").unlink()
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    trainer = make_trainer(copied / "run", tiny_config(), **TRAINING)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert str(error.value) == f"{checkpoint}: cannot resume from it: trainer_state.json: {fault}"


def other_optimizer(state):
    state["state"][3]["exp_avg"] = torch.zeros(7)


def other_kind_of_optimizer(state):
    for group in state["param_groups"]:
        del group["betas"]


def fewer_parameters(state):
    state["param_groups"][0]["params"].pop()


def no_learning_rates(state):
    state["base_lrs"].append(1.0)


def no_scheduler(state):
    state.pop("last_epoch")


def no_generator(state):
    state["cpu"] = torch.zeros(3)


def no_random_state(state):
    state.clear()


UNFIT = {
    "shapes": ("optimizer.pt", other_optimizer, r"`exp_avg` has shape \[7\] instead of \["),
    "kind of optimizer": ("optimizer.pt", other_kind_of_optimizer, "no `betas` in its groups"),
    "number of parameters": ("optimizer.pt", fewer_parameters, "size of optimizer's group"),
    "number of groups": ("scheduler.pt", no_learning_rates, "`base_lrs` has 3 entries instead of 2"),
    "scheduler": ("scheduler.pt", no_scheduler, "not the state of a scheduler"),
    "generator": ("rng_state.pth", no_generator, "RNG state"),
    "random state": ("rng_state.pth", no_random_state, "'python'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_state_of_another_training_is_rejected_by_name(copied, tiny_config, name):
    file, change, fault = UNFIT[name]
    checkpoint = copied / "run/checkpoint-4"
    state = torch.load(checkpoint / file, weights_only=False)
    change(state)
    torch.save(state, checkpoint / file)
    write_manifest(checkpoint)
    trainer = make_trainer(copied / "run", tiny_config(), use_cpu=True, **TRAINING)
    with pytest.raises(ValueError) as error:
        trainer.train(resume_from_checkpoint=True)
    start = f"{checkpoint}: cannot resume from it: {file.replace('.pth', '*.pth')} does not fit this training ("
    assert str(error.value).startswith(start) and "\n" not in str(error.value)
    assert re.search(fault, str(error.value))
    assert trainer.state.global_step in (0, 4)  # nothing was trained


def test_weights_of_another_model_are_rejected_by_name(copied, tiny_config):
    checkpoint = copied / "run/checkpoint-4"
    trainer = make_trainer(copied / "run", tiny_config(encoder_ffn_dim=64), use_cpu=True, **TRAINING)
    with pytest.raises(ValueError, match=r"checkpoint-4: `.*` has shape \[48.*\], but this training needs \[64.*\]; "):
        trainer.train(resume_from_checkpoint=True)
    weights = weights_in(checkpoint)
    missing = sorted(weights)[5]
    del weights[missing]
    safetensors.torch.save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    write_manifest(checkpoint)
    trainer = make_trainer(copied / "run", tiny_config(), use_cpu=True, **TRAINING)
    with pytest.raises(ValueError, match=f"checkpoint-4: no `{re.escape(missing)}`, but this training needs"):
        trainer.train(resume_from_checkpoint=True)


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_checkpoint_runs_nothing(copied, tiny_config, name):
    path = copied / "run/checkpoint-4" / name
    torch.save(Hostile(copied / "run it"), path)
    trainer = make_trainer(copied / "run", tiny_config(), use_cpu=True, **TRAINING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=str(path.parent))
    except Exception as error:
        assert "weights_only" in str(error).lower() or name in str(error)
    assert not (copied / "run it").exists()
    torch.load(path, weights_only=False)
    assert (copied / "run it").exists()  # it would have


def test_hostile_training_arguments_are_not_read(copied, tiny_config):
    torch.save(Hostile(copied / "run it"), copied / "run/checkpoint-4/training_args.bin")
    trainer = make_trainer(copied / "run", tiny_config(), use_cpu=True, **TRAINING)
    trainer.train(resume_from_checkpoint=str(copied / "run/checkpoint-4"))
    assert trainer.state.global_step == 6
    assert not (copied / "run it").exists()


# The best one


@pytest.fixture
def scripted(monkeypatch):
    """Make evaluations return these scores, one after the other."""

    def script(scores):
        scores = iter(scores)
        monkeypatch.setattr(
            trainer_module,
            "evaluate_predictions",
            lambda *arguments: {"brief": {"MR-full-mAP": next(scores), "MR-full-R1@0.5": 1.0}, "extra": {}},
        )

    return script


BEST = {
    **TRAINING,
    "eval_steps": 1,
    "metric_for_best_model": "MR-full-mAP",
    "greater_is_better": True,
    "load_best_model_at_end": True,
    "save_total_limit": 2,
}


def weights_in(checkpoint: str | Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(Path(checkpoint) / "model.safetensors")


def test_the_best_checkpoint_stays_and_is_loaded(scripted, tiny_config, tmp_path):
    """Whatever is rotated, before and after resuming."""
    scripted([10, 40, 30, 20])
    trainer = make_trainer(tmp_path, tiny_config(), **{**BEST, "max_steps": 4})
    trainer.train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    assert (state["best_metric"], state["best_global_step"]) == (40, 2)
    # The state of the best checkpoint names itself as the best
    state = json.loads((tmp_path / "checkpoint-2/trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")
    best, last = weights_in(tmp_path / "checkpoint-2"), weights_in(tmp_path / "checkpoint-4")
    loaded = {name: weights.cpu() for name, weights in trainer.model.state_dict().items() if name in best}
    assert all(torch.equal(loaded[name], best[name]) for name in best)
    assert any(not torch.equal(loaded[name], last[name]) for name in best)

    scripted([35, 39])
    again = make_trainer(tmp_path, tiny_config(), **BEST)
    again.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-6"}
    state = json.loads((tmp_path / "checkpoint-6/trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == tmp_path / "checkpoint-2"
    assert all(torch.equal(again.model.get_parameter(name).cpu(), best[name]) for name in weights_of(again.model))


def test_only_the_best_is_saved_if_asked_for(scripted, tiny_config, tmp_path):
    scripted([10, 40, 30, 50, 20, 20])
    make_trainer(tmp_path, tiny_config(), **{**BEST, "save_strategy": "best", "save_total_limit": None}).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-2", "checkpoint-4"}


def test_the_latest_are_kept(tiny_config, tmp_path):
    make_trainer(tmp_path, tiny_config(), max_steps=5, save_steps=1, save_total_limit=2).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-5"}


def test_weights_alone_are_a_checkpoint(tiny_config, tmp_path):
    trainer = make_trainer(tmp_path, tiny_config(), max_steps=2, save_steps=1, save_only_model=True)
    trainer.train()
    assert not [*tmp_path.rglob("*.pt"), *tmp_path.rglob("*.pth"), *tmp_path.rglob("*.bin")]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_saved_model(tiny_config, tmp_path):
    """`save_model` writes what loading needs, and nothing of the training."""
    trainer = make_trainer(tmp_path / "run", tiny_config(), max_steps=1, save_strategy="no")
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(tmp_path / "other"))
    for folder in (tmp_path / "run", tmp_path / "other"):
        names = {path.name for path in folder.iterdir() if path.suffix != ".py"}
        assert names == {"config.json", "model.safetensors", "processor_config.json", "README.md"}
        AutoProcessor.from_pretrained(folder)
        saved = AutoModel.from_pretrained(folder)
        assert all(torch.equal(saved.get_parameter(name), w) for name, w in weights_of(trainer.model).items())


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """Replace the Hub; return the commits as `(paths of the files, commit message)`."""
    commits = []

    def commit(self, repo_id, operations, *, commit_message, **options):
        assert repo_id == "somebody/model"
        commits.append(({operation.path_in_repo for operation in operations}, commit_message))

    replace_hub(monkeypatch, commit)
    return commits


def replace_hub(monkeypatch, create_commit):
    """Replace the Hub by an empty repository and a function for commits."""
    monkeypatch.setattr(HfApi, "create_repo", lambda *arguments, **options: FakeUrl())
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *arguments, **options: [])
    monkeypatch.setattr(HfApi, "hf_hub_download", raise_not_found)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)


def raise_not_found(*arguments, **options):
    raise EntryNotFoundError("no such file")


class FakeUrl(str):
    repo_id = "somebody/model"


PUSHED = {"push_to_hub": True, "hub_model_id": "somebody/model", "max_steps": 2, "save_steps": 1}
MODEL_FILES = {"config.json", "model.safetensors", "processor_config.json"}
TRAINING_FILES = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}


@pytest.mark.parametrize(
    "strategy, folders",
    [
        ("end", []),
        ("every_save", []),
        ("checkpoint", ["last-checkpoint", "last-checkpoint"]),
        ("all_checkpoints", ["checkpoint-1", "checkpoint-2"]),
    ],
)
def test_what_is_pushed(hub, tiny_config, tmp_path, strategy, folders):
    trainer = make_trainer(tmp_path, tiny_config(), **PUSHED, hub_strategy=strategy, save_total_limit=1)
    trainer.train()
    code = {f"{part}_diffusionvmr.py" for part in ("configuration", "modeling", "processing", "pipeline")}
    assert len(hub) == (0 if strategy == "end" else 2)  # each checkpoint in one commit
    for (files, _), folder in zip(hub, folders or [None] * len(hub), strict=True):
        model = {name for name in files if folder is None or not name.startswith(f"{folder}/")}
        assert model >= MODEL_FILES | code | {"README.md"}
        assert not model & TRAINING_FILES
        assert not any("/" in name or name.startswith("_") for name in model)
        if folder is not None:
            assert files >= {f"{folder}/{name}" for name in MODEL_FILES | TRAINING_FILES}
        assert not any(name.endswith("training_args.bin") for name in files)
    hub.clear()
    for name in ("events.out.tfevents.1", ".hidden", "training_args.bin", "notes.json"):
        (tmp_path / name).touch()
    trainer.push_to_hub(commit_message="done")
    ((files, message),) = hub
    assert message == "done"
    assert {name for name in files if not name.endswith(".py")} == MODEL_FILES | {"README.md"}


def test_a_checkpoint_is_not_removed_while_it_is_pushed(monkeypatch, tiny_config, tmp_path):
    """Even if uploading takes longer than until the next save."""
    goes_on = threading.Event()
    pushes = []

    def commit(self, repo_id, operations, **options):
        goes_on.wait(60)
        pushes.append({Path(operation.path_or_fileobj).name for operation in operations if is_file(operation)})

    def is_file(operation):
        return isinstance(operation.path_or_fileobj, str) and Path(operation.path_or_fileobj).is_file()

    class GoOn(TrainerCallback):
        def on_train_end(self, *arguments, **options):
            goes_on.set()

    replace_hub(monkeypatch, commit)
    in_time = threading.Timer(2, goes_on.set)  # a trainer may wait for the push, too
    in_time.start()
    options = {**PUSHED, "max_steps": 3, "hub_strategy": "every_save", "save_total_limit": 1}
    make_trainer(tmp_path, tiny_config(), callbacks=[GoOn()], **options).train()
    in_time.cancel()
    assert pushes
    for push in pushes:
        assert push >= MODEL_FILES
    assert (tmp_path / "checkpoint-3").is_dir()
