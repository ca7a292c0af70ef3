"""
Push to the Hub and load from it, with the client of `huggingface_hub` and the stand-in of `hub_server`.

The client reads the Hub's address when it is imported, so it runs in other processes: one pushes in every way, one is
killed while it pushes, and one loads what was pushed, without the package.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from hub_server import TOKENS, running_hub
from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor
from small_checkpoint import description, save_checkpoint
from test_pipeline import QUERIES, TASK, WITHOUT_PACKAGE
from test_video import write_video

TOKEN = next(token for token, user in TOKENS.items() if user == "user")
PUSHED = ["user/model", "user/saved", "user/pipeline", "user/command", "user/private"]
HAND_WRITTEN = {"local": "Trained for my own holiday videos.", "remote": "Ask me before you use it."}


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_config) -> Path:
    """A folder with a checkpoint and a video."""
    folder = tmp_path_factory.mktemp("work")
    save_checkpoint(folder / "checkpoint", tiny_config, threshold=0.1, top_k=2)
    write_video(folder / "video.mp4", np.arange(60) / 10)
    return folder


@pytest.fixture(scope="module")
def hub():
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def pushed(hub, work) -> dict:
    """What the process that pushes returns."""
    return run(hub, work, "import test_hub; found = test_hub.push_everything()", HF_TOKEN=TOKEN)


@pytest.fixture(scope="module")
def loaded(hub, work, pushed) -> dict:
    """What the process without the package returns."""
    return run(
        hub,
        work,
        WITHOUT_PACKAGE + LOAD.format(task=TASK, token=TOKEN, queries=QUERIES, pushed=[*PUSHED, "user/apart"]),
    )


def start(hub, work: Path, code: str, **environment) -> subprocess.Popen:
    """Start Python in `work`, with caches of its own and with `hub` as the Hub."""
    code = f"import json, sys\n{code}\nprint(json.dumps(found))"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(work / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": path,
        **environment,
    }
    for name in ("HF_MODULES_CACHE", "HF_HUB_CACHE"):
        environment.pop(name, None)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=work, **pipes)


def run(hub, work: Path, code: str, **environment):
    """Run code as `start` does, and return the value that it names `found`."""
    process = start(hub, work, code, **environment)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return json.loads(stdout.splitlines()[-1])


# In the other processes


def push_everything() -> dict:
    """Push in each way. Return what the local models find, and what data sets on the Hub contain."""
    from transformers import pipeline

    from modeling_diffusionvmr.cli import main
    from small_data import make_qvhighlights

    pipe = pipeline(TASK, model="checkpoint")
    found = {"moments": pipe("video.mp4", QUERIES, return_saliency=True)}
    pipe.model.push_to_hub("user/model", commit_message="first")
    pipe.model.push_to_hub("user/model", revision="branch", tags=["tagged"])
    pipe.save_pretrained("saved", push_to_hub=True, repo_id="user/saved")
    pipe.push_to_hub("user/pipeline")
    pipe.push_to_hub("user/private", private=True)
    main(["push", "checkpoint", "user/command"])
    push_edited_card()
    push_backbone_apart()
    pipe.push_to_hub("user/pipeline_and_processor")
    pipe.processor.top_k = 1
    pipe.processor.push_to_hub("user/processor")
    pipe.processor.push_to_hub("user/pipeline_and_processor")
    pipe.model.config.push_to_hub("user/config")
    found["trained"] = push_a_training()

    os.mkdir("release")
    features = make_qvhighlights(Path("release"))
    features = [name if name.startswith("--") else f"release/{name}" for name in features]
    main(["convert", "qvhighlights", "data", "--annotations", "release", *features, "--push_to_hub", "user/data"])
    found["data"] = read_data()
    return found


def push_backbone_apart() -> None:
    """Push a model to a private repository, and its backbone to another one."""
    from huggingface_hub import HfApi

    HfApi().create_repo("user/clip", private=True)
    HfApi().upload_folder(repo_id="user/clip", folder_path="checkpoint/clip")
    model = DiffusionVMRForMomentRetrieval.from_pretrained("checkpoint")
    model.config.backbones = [description(id="user/clip")]
    model.push_to_hub("user/apart", private=True)


def push_edited_card() -> None:
    """Push a checkpoint twice to a repository whose card was edited, there and in the folder."""
    from huggingface_hub import HfApi

    from modeling_diffusionvmr.cli import main

    DiffusionVMRForMomentRetrieval.from_pretrained("checkpoint").save_pretrained("edited")
    card = Path("edited/README.md")
    card.write_text(card.read_text() + HAND_WRITTEN["local"])
    api = HfApi()
    main(["push", "edited", "user/edited", "--message", "first"])
    card = ModelCard.load("user/edited")
    card.data["license"] = "mit"
    card.text = f"{HAND_WRITTEN['remote']}\n{card.text}"
    api.upload_file(path_or_fileobj=str(card).encode(), path_in_repo="README.md", repo_id="user/edited")
    for name in ("model-00001-of-00002.safetensors", "assets/picture.png"):
        api.upload_file(path_or_fileobj=b"old", path_in_repo=name, repo_id="user/edited")
    main(["push", "edited", "user/edited", "--message", "second"])


def push_a_training() -> list:
    """Fine-tune a model from the Hub, which pushes its checkpoints, and push the result. Return what it finds."""
    from huggingface_hub import snapshot_download
    from transformers import pipeline

    from modeling_diffusionvmr import DiffusionVMRTrainer, DiffusionVMRTrainingArguments
    from modeling_diffusionvmr.training.checkpoints import find_fault
    from small_training import make_dataset

    model = DiffusionVMRForMomentRetrieval.from_pretrained("user/model")
    dataset = make_dataset(model.config)
    dataset.processor = DiffusionVMRProcessor.from_pretrained("checkpoint")
    options = {"max_steps": 2, "save_steps": 1, "report_to": "none", "use_cpu": True, "per_device_train_batch_size": 4}
    hub = {"push_to_hub": True, "hub_model_id": "user/trained", "hub_strategy": "checkpoint", "hub_token": TOKEN}
    arguments = DiffusionVMRTrainingArguments("output", **options, **hub, hub_always_push=True)
    trainer = DiffusionVMRTrainer(model=model, args=arguments, train_dataset=dataset, eval_dataset=make_dataset(None))
    trainer.train()
    trainer.evaluate()
    Path("output/notes.json").write_text("{}")
    trainer.push_to_hub(dataset="Holidays", language="de")
    snapshot = snapshot_download("user/trained", allow_patterns="last-checkpoint/*")
    assert find_fault(f"{snapshot}/last-checkpoint") is None
    return pipeline(TASK, model="output")("video.mp4", QUERIES, return_saliency=True)


def read_data() -> dict:
    """Read a data set on the Hub in every way. Return what was read."""
    from modeling_diffusionvmr import load_annotations, open_features
    from modeling_diffusionvmr.cli import main

    store = open_features("user/data", "clip")
    found = {
        "rows": load_annotations("user/data", split="val"),
        "rows of the folder": load_annotations("data", split="val"),
        "clips": {vid: store[vid].tolist() for vid in store},
        "clips of the folder": {vid: array.tolist() for vid, array in open_features("data", "clip").items()},
    }
    sizes = "--d_model 16 --encoder_layers 1 --decoder_layers 1 --encoder_ffn_dim 16 --decoder_ffn_dim 16 --roi_bins 4"
    sizes += " --encoder_attention_heads 2 --decoder_attention_heads 2 --dynamic_size 4 --max_steps 1 --use_cpu"
    data = "--annotations user/data --video_features user/data --text_features user/data"
    main(["train", *data.split(), *sizes.split(), "--output_dir", "on_hub_data", "--report_to", "none"])
    found["errors"] = []
    for path in ("user/nothing", "user/model"):
        try:
            load_annotations(path, split="val")
        except (OSError, ValueError) as error:
            found["errors"].append(str(error))
    return found


def push_changed_weights() -> None:
    """Push other weights and another configuration."""
    model = DiffusionVMRForMomentRetrieval.from_pretrained("checkpoint")
    model.config.num_proposals = 3
    torch.nn.init.ones_(model.saliency_head.weight)
    model.push_to_hub("user/saved")


LOAD = """
import os
assert "HF_TOKEN" not in os.environ
from transformers import pipeline
found = {{"moments": {{}}}}
for name in {pushed!r}:
    token = {token!r} if name in ("user/private", "user/apart") else None
    retrieve = pipeline({task!r}, model=name, trust_remote_code=True, token=token)
    found["moments"][name] = retrieve("video.mp4", {queries!r}, return_saliency=True)
retrieve.save_pretrained("again")  # a private one
found["trained"] = pipeline({task!r}, model="user/trained", trust_remote_code=True)(
    "video.mp4", {queries!r}, return_saliency=True
)
try:
    pipeline({task!r}, model="user/private", trust_remote_code=True, token=False)
except OSError as error:
    found["without token"] = str(error)
assert not any(name.split(".")[0] == "modeling_diffusionvmr" for name in sys.modules)
"""


# What was pushed


def visible(repository, branch="main") -> set[str]:
    return {name for name in repository.files(branch) if not name.endswith(".py")} - {".gitattributes"}


def card_of(repository, branch="main") -> ModelCard:
    return ModelCard(repository.files(branch)["README.md"].decode())


MODEL_FILES = {"config.json", "model.safetensors", "processor_config.json", "README.md"}
BACKBONE_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"}
BACKBONE_FILES = {f"clip/{name}" for name in (*BACKBONE_FILES, "tokenizer_config.json")}


@pytest.mark.parametrize("name", PUSHED)
def test_a_push_is_complete(hub, pushed, name):
    repository = hub.model(name)
    assert visible(repository) == MODEL_FILES | BACKBONE_FILES
    assert {"modeling_diffusionvmr.py", "pipeline_diffusionvmr.py", "model_card.py"} <= repository.files().keys()
    assert len(repository.log) == 2 + (name == "user/model")  # one commit each, and one on a branch
    assert repository.private is (name == "user/private")


@pytest.mark.parametrize("name", [*PUSHED, "user/apart", "user/trained"])
def test_the_same_moments_without_the_package(pushed, loaded, name):
    """To the last digit."""
    if name == "user/trained":
        assert loaded["trained"] == pushed["trained"] != pushed["moments"]
    else:
        assert loaded["moments"][name] == pushed["moments"]
    assert all(result["saliency"] for result in pushed["moments"])


@pytest.mark.parametrize("name", [*PUSHED, "user/trained"])
def test_every_card_is_ours(hub, pushed, name):
    card = card_of(hub.model(name))
    assert card.text.count("<!-- begin generated text") == 1
    assert f'model="{name}"' in card.text
    assert "automatically generated" not in card.text and "generated_from_trainer" not in card.content
    assert card.data.to_dict()["pipeline_tag"] == "video-text-to-text"


def test_text_and_metadata_of_the_user_are_kept(hub, pushed):
    repository = hub.model("user/edited")
    assert (repository.log[1], repository.log[-1]) == ("first", "second")
    card = card_of(repository)
    before, _, rest = card.text.partition("<!-- begin generated text")
    assert before.strip() == HAND_WRITTEN["remote"]
    assert rest.rpartition("-->")[2].strip() == HAND_WRITTEN["local"]
    assert card.data.license == "mit"
    assert card.content.count("<!-- begin generated text") == 1


def test_old_weights_are_removed_and_other_files_kept(hub, pushed):
    names = hub.model("user/edited").files().keys()
    assert "assets/picture.png" in names and "model-00001-of-00002.safetensors" not in names


def test_branch_and_tags(hub, pushed):
    repository = hub.model("user/model")
    assert repository.log[1:] == ["first", "Upload DiffusionVMRForMomentRetrieval"]
    assert "tagged" in card_of(repository, "branch").data.tags
    assert "tagged" not in card_of(repository).data.tags


def test_processor_and_config_alone(hub, pushed):
    assert visible(hub.model("user/processor")) == {"processor_config.json"}
    assert visible(hub.model("user/config")) == {"config.json"}
    repository = hub.model("user/pipeline_and_processor")
    *_, before, after = repository.commits.values()
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"processor_config.json"} and before.keys() == after.keys()
    assert json.loads(after["processor_config.json"])["top_k"] == 1
    assert "processing_diffusionvmr.py" in hub.model("user/processor").files()


def test_a_training(hub, pushed):
    repository = hub.model("user/trained")
    resume_files = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "manifest.json"}
    model = MODEL_FILES | BACKBONE_FILES
    assert visible(repository) == model | {f"last-checkpoint/{name}" for name in model | resume_files}
    assert repository.log[1:] == [*(f"Training in progress, step {step}" for step in (1, 2)), "End of training"]
    data = card_of(repository).data.to_dict()
    assert data["base_model"] == "user/model"
    assert data["language"] == ["de"]
    ((result,),) = [entry["results"] for entry in data["model-index"]]
    assert result["metrics"][0].keys() == {"type", "value", "name"}
    assert {"MR-full-mAP", "MR-full-R1@0.5"} <= {metric["type"] for metric in result["metrics"]}
    assert "Training data: Holidays, 8 queries on 4 videos." in card_of(repository).text


def test_no_token_in_any_file(hub, work, pushed, loaded):
    assert (work / "again" / "clip" / "config.json").is_file()
    paths = [path for path in work.rglob("*") if path.is_file()]
    assert any("user--private" in str(path) for path in paths)
    assert [path for path in paths if TOKEN.encode() in path.read_bytes()] == []
    for repository in hub.repositories.values():
        assert not any(TOKEN.encode() in content for content in repository.files().values())


def test_a_backbone_in_another_private_repository(hub, pushed, loaded):
    (backbone,) = json.loads(hub.model("user/apart").files()["config.json"])["backbones"]
    assert backbone["id"] == "user/clip" and "folder" not in backbone
    assert visible(hub.model("user/apart")) == MODEL_FILES
    assert loaded["moments"]["user/apart"] == pushed["moments"]


def test_a_private_repository_needs_the_token(loaded):
    assert "user/private" in loaded["without token"]


def test_paths_of_this_machine_are_not_pushed(hub, work, pushed):
    for repository in hub.repositories.values():
        assert not any(str(work).encode() in content for content in repository.files().values())


def test_an_upload_that_is_cut_off_changes_nothing(hub, work, pushed):
    before = hub.model("user/saved").files()
    hub.cut_off = 0
    process = start(hub, work, "import test_hub; found = test_hub.push_changed_weights()", HF_TOKEN=TOKEN)
    try:
        assert hub.is_cut_off.wait(120)
    finally:
        process.kill()
        process.wait()
        hub.cut_off = None
    assert hub.model("user/saved").files() == before


# Data sets


def test_data_from_the_hub(hub, pushed):
    data = pushed["data"]
    assert data["rows"] == data["rows of the folder"] and data["rows"][0]["query"] == "A dog"
    assert data["clips"] == data["clips of the folder"]
    assert data["clips"].keys() == {"a_60.0_210.0", "b_0.0_24.0", "c_0.0_30.0", "d_0.0_18.0"}


def test_training_on_data_from_the_hub(work, pushed):
    card = ModelCard.load(work / "on_hub_data" / "README.md")
    assert card.data.datasets == ["user/data"]
    assert "Training data: user/data (train), 3 queries on 2 videos." in card.text


def test_errors_of_data_on_the_hub(pushed):
    for name, error in zip(("user/nothing", "user/model"), pushed["data"]["errors"], strict=True):
        assert re.match(f"{name}: no such file or folder, and no data set that could be loaded from the Hub", error)
        assert "\n" not in error
