import re
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, pipeline

from modeling_diffusionvmr import (
    DEFAULT_MODEL,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    MomentRetrievalDataset,
    model_card,
    open_features,
)
from modeling_diffusionvmr.data.features import write_features
from modeling_diffusionvmr.data.files import save_json
from modeling_diffusionvmr.training.card_facts import facts_of_data
from modeling_diffusionvmr.training.presets import PRESETS, load_preset
from small_training import make_dataset, make_trainer
from test_video import write_video

DATA = {"name": "holidays", "split": "val", "queries": 3, "videos": 2, "simulated": False}
FACTS = {
    "started_from": "random weights",
    "base_model": "somebody/model",
    "train_data": {**DATA, "split": "train"},
    "settings": {"learning_rate": 1e-4, "a|b": "c|d"},
    "versions": {"torch": "2.0"},
    "hardware": "CPU",
    "seconds": 3725.0,
    "step": 7,
    "results": [{"data": DATA, "metrics": {"MR-full-mAP": 12.5, "MR-full-R1@0.5": 50.0}}],
    "evaluation": "Scored -> officially.",
}


@pytest.fixture
def model(tiny_config) -> DiffusionVMRForMomentRetrieval:
    torch.manual_seed(0)
    return DiffusionVMRForMomentRetrieval(tiny_config())


@pytest.fixture
def saved(model, tmp_path) -> Path:
    """A folder with a model that was trained."""
    model.card_facts = FACTS
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def section(card: ModelCard, title: str) -> str:
    return card.text.partition(f"## {title}\n")[2].partition("\n## ")[0].strip()


def edit(folder: Path, *changes: tuple[str, str]) -> None:
    path = folder / "README.md"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)


def test_template_is_the_one_that_people_read():
    path = Path(__file__).parents[1] / "model_card.md"
    assert model_card.TEMPLATE == path.read_text()


def test_metadata(saved):
    data = card(saved).data.to_dict()
    (index,) = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "video-text-to-text",
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "somebody/model",
        "tags": ["video-moment-retrieval", "temporal-grounding", "diffusion"],
    }
    (result,) = index["results"]
    assert result["task"]["type"] == "video-moment-retrieval"
    assert result["dataset"] == {"type": "holidays", "name": "holidays", "split": "val"}
    assert [(metric["type"], metric["value"]) for metric in result["metrics"]] == [
        ("MR-full-mAP", 12.5),
        ("MR-full-R1@0.5", 50.0),
    ]


def test_sections(saved):
    training = section(card(saved), "Training")
    assert training.startswith(
        "Training started from [somebody/model](https://huggingface.co/somebody/model). Training data: holidays "
        "(train), 3 queries on 2 videos. It took 1:02:05 (h:mm:ss) on CPU. The weights are those after step 7."
    )
    for row in ("| learning_rate | 0.0001 |", "| a\\|b | c\\|d |", "| torch | 2.0 |"):
        assert row in training
    results = section(card(saved), "Results")
    assert results.startswith("Scored -> officially.\n\nOn holidays (val), 3 queries on 2 videos:")
    assert "| MR-full-mAP | 12.5 |" in results
    assert "2308.15109" in section(card(saved), "Citation")


def test_untrained(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert section(card(tmp_path), "Training").startswith("This model was not saved by a training")
    assert section(card(tmp_path), "Results") == "These weights were not evaluated."
    assert "model-index" not in card(tmp_path).data.to_dict()


# Saving again


def test_a_loaded_model_keeps_its_card(saved, tmp_path):
    edit(saved, ("<!-- begin", "Above.\n\n<!-- begin"), ("end generated text -->", "end generated text -->\nBelow."))
    again = AutoModel.from_pretrained(saved)
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text().split() == (saved / "README.md").read_text().split()


def test_text_and_metadata_of_the_user_are_kept(model, saved):
    edit(
        saved,
        ("license: apache-2.0", "license: mit\nthumbnail: picture.png"),
        ("base_model: somebody/model\n", ""),
        ("<!-- begin", "Above.\n\n<!-- begin"),
    )
    model.card_facts = {**FACTS, "step": 8, "results": []}
    model.save_pretrained(saved)
    data = card(saved).data.to_dict()
    assert (data["license"], data["thumbnail"]) == ("mit", "picture.png")
    assert not {"base_model", "model-index"} & data.keys()  # removed by the user, and by the library
    assert card(saved).text.startswith("Above.\n<!-- begin")
    assert "after step 8" in card(saved).text and "after step 7" not in card(saved).text
    for _ in range(2):  # saving again changes nothing
        text = (saved / "README.md").read_text()
        model.save_pretrained(saved)
        assert (saved / "README.md").read_text() == text


def test_a_card_that_was_saved_on_windows(model, saved):
    text = (saved / "README.md").read_text()
    (saved / "README.md").write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    model.save_pretrained(saved)
    assert (saved / "README.md").read_text() == text


def test_name_that_looks_like_a_mark(model, tmp_path):
    model.card_facts = {**FACTS, "train_data": {"name": "<!-- end generated text -->"}}
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_a_card_without_marks_is_all_of_the_user(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My model\n\nIt is mine.\n")
    model.save_pretrained(tmp_path)
    assert card(tmp_path).text.strip().startswith("# My model\n\nIt is mine.\n<!-- begin generated text")
    assert card(tmp_path).data.license == "mit"
    assert card(tmp_path).data.pipeline_tag == "video-text-to-text"


@pytest.mark.parametrize("text", ["---\n[1, 2]\n---\n", "---\na: b: c\n---\nText", b"\xff\xfe\x00"])
def test_a_card_that_cannot_be_read_is_left_alone(model, tmp_path, text):
    content = text if isinstance(text, bytes) else text.encode()
    (tmp_path / "README.md").write_bytes(content)
    with pytest.warns(UserWarning, match="README.md: not written"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "change",
    [('<!-- facts: {"facts"', '<!-- facts: {"fa'), ('"results": [{', '"results": [7, {'), ('"hardware": "CPU", ', "")],
)
def test_facts_that_were_changed(saved, tmp_path, change):
    """They are the library's own record. Without them, the card has no facts."""
    edit(saved, change)
    AutoModel.from_pretrained(saved).save_pretrained(tmp_path / "again")
    assert section(card(tmp_path / "again"), "Results") == "These weights were not evaluated."


# Limits and the usage example


@pytest.mark.parametrize("preset", PRESETS)
def test_features_that_cannot_be_computed(tiny_config, tmp_path, preset):
    config = load_preset(preset)["config"]
    sizes = {name: config[name] for name in ("video_feature_size", "text_feature_size", "backbones") if name in config}
    DiffusionVMRForMomentRetrieval(tiny_config(**sizes)).save_pretrained(tmp_path)
    names = [entry["name"] for entry in sizes.get("backbones", []) if not (entry.get("id") or entry.get("folder"))]
    limits = section(card(tmp_path), "Limits")
    if names:
        assert f"- Takes features only: the backbones {', '.join(names)} cannot be run by this library." in limits
    runs_on_videos = "backbones" in sizes and not names
    assert runs_on_videos == (preset == "qvhighlights_clip")
    assert ("pipeline(" in section(card(tmp_path), "Usage")) == runs_on_videos


def test_simulated_data_is_called_simulated(model, tmp_path):
    simulated = {**DATA, "simulated": True}
    model.card_facts = {**FACTS, "train_data": simulated, "results": [{**FACTS["results"][0], "data": simulated}]}
    model.save_pretrained(tmp_path)
    assert "simulated features" in section(card(tmp_path), "Training")
    assert "say nothing about a benchmark" in section(card(tmp_path), "Limits")
    (index,) = card(tmp_path).data.to_dict()["model-index"]
    assert index["results"][0]["dataset"]["name"] == "holidays (simulated features)"


@pytest.mark.parametrize("simulated", [True, False])
def test_simulated_features_are_known(tmp_path, simulated):
    for vid in ("v0", "v1"):
        write_features(tmp_path, vid, np.ones((5, 12)))
    save_json({"clip_seconds": 2.0, "simulated": simulated}, tmp_path / "features.json")
    rows = [{"qid": 7, "query": "a dog", "vid": "v1", "duration": 10.0}]
    text = {7: np.ones((3, 8))}
    dataset = MomentRetrievalDataset(rows, open_features(tmp_path), text, DiffusionVMRProcessor([12], 8))
    assert facts_of_data(dataset) == {"name": "unnamed data", "queries": 1, "videos": 1, "simulated": simulated}


def run_usage(folder: Path, **names) -> dict:
    """Execute the usage example of a card and return its variables."""
    (code,) = re.findall(r"```python\n(.*?)```", section(card(folder), "Usage"), re.DOTALL)
    assert "FOLDER_OR_ID" in code
    code = code.replace("FOLDER_OR_ID", str(folder)).replace(", trust_remote_code=True", "")
    variables = dict(names)
    *_, last = code.strip().splitlines()
    exec(code + f"\nresult = {last}", variables)
    return variables


def test_usage_on_features(saved):
    (moments,) = run_usage(saved)["result"]
    assert len(moments) == 5
    assert all(0 <= moment["start"] <= moment["end"] <= 40 for moment in moments)


def test_usage_on_a_video(tmp_path, monkeypatch):
    retrieve = pipeline("video-moment-retrieval", model=DEFAULT_MODEL)
    retrieve.save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "video.mp4", [index / 10 for index in range(40)])
    used = run_usage(tmp_path)
    assert used["result"] == retrieve("video.mp4", "a dog jumps into the water")


# The facts of a training


@pytest.fixture
def trained(tiny_config, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "metric_for_best_model": "MR-full-mAP"}
    trainer = make_trainer(tmp_path, tiny_config(), max_steps=4, load_best_model_at_end=True, **options)
    trainer.train_dataset.name, trainer.eval_dataset.name = "somebody/holidays", "more holidays"
    trainer.train()
    trainer.save_model()
    return trainer


def test_facts_of_a_training(trained, tmp_path):
    state, data = trained.state, card(tmp_path).data.to_dict()
    assert data["datasets"] == ["somebody/holidays"]
    assert "base_model" not in data
    (best,) = [log for log in state.log_history if log["step"] == state.best_global_step and "eval_loss" in log]
    (result,) = data["model-index"][0]["results"]
    assert {f"eval_{metric['type']}": metric["value"] for metric in result["metrics"]}.items() <= best.items()
    assert result["dataset"] == {"type": "more-holidays", "name": "more holidays"}
    training = section(card(tmp_path), "Training")
    assert f"The weights are those after step {state.best_global_step} of {state.max_steps}." in training
    assert "| learning_rate | 0.001 |" in training and "| proposal_schedule | progress |" in training
    assert "The checkpoint was chosen by its `MR-full-mAP` on the same sentences" in section(card(tmp_path), "Results")
    checkpoint = tmp_path / "checkpoint-2"
    assert "The weights are those after step 2 of 4." in section(card(checkpoint), "Training")
    assert "The checkpoint was chosen" not in section(card(checkpoint), "Results")


def test_time_of_a_resumed_training(trained, tiny_config, tmp_path):
    """It includes the time before the interruption, which the card of the checkpoint states."""
    path = tmp_path / "checkpoint-2" / "README.md"
    path.write_text(re.sub(r'"seconds": [0-9.]+', '"seconds": 7200.0', path.read_text()))
    trainer = make_trainer(tmp_path, trained.model.config, max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    trainer.save_model()
    assert "It took 2:00:0" in section(card(tmp_path), "Training")
    assert "from step" not in section(card(tmp_path), "Training")


def test_every_way_of_saving_after_a_training(trained, tmp_path):
    trained.model.save_pretrained(tmp_path / "model")
    assert card(tmp_path / "model").content == card(tmp_path).content


def test_the_trainer_writes_no_card_of_its_own(trained, tmp_path):
    trained.create_model_card(language="de", license="mit", tags="holidays", finetuned_from="a/b", dataset_tags="c/d")
    data = card(tmp_path).data.to_dict()
    assert (data["language"], data["license"], data["base_model"], data["datasets"]) == (["de"], "mit", "a/b", ["c/d"])
    assert data["tags"][-1] == "holidays"
    assert card(tmp_path).text.count("<!-- begin generated text") == 1


def test_fine_tuning_from_a_folder(saved, tiny_config, tmp_path):
    """The card names the model on the Hub that the folder's model came from, and never the folder."""
    edit(saved, ("license: apache-2.0", "license: mit"), ("<!-- begin", "Above.\n\n<!-- begin"))
    model = AutoModel.from_pretrained(saved)
    trainer = make_trainer(tmp_path / "run", model.config, max_steps=1, model=model)
    trainer.train()
    trainer.save_model()
    tuned = card(tmp_path / "run")
    assert (tuned.data.base_model, tuned.data.license) == ("somebody/model", "mit")
    assert "Above." not in tuned.text  # about another model
    assert str(tmp_path) not in tuned.content


def test_evaluating_alone_keeps_the_rest_of_the_card(saved, tiny_config, tmp_path):
    edit(saved, ("<!-- begin", "Above.\n\n<!-- begin"))
    model = AutoModel.from_pretrained(saved)
    trainer = make_trainer(tmp_path / "run", model.config, model=model, eval_dataset=make_dataset(None))
    trainer.evaluate()
    trainer.save_model()
    assert "Above." in card(tmp_path / "run").text
    assert "after step 7" in section(card(tmp_path / "run"), "Training")
    assert "8 queries on 4 videos" in section(card(tmp_path / "run"), "Results")
