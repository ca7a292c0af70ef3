"""Batches, and what moves them: workers, accelerate, `Trainer`, pinned memory and `nn.DataParallel`."""

import pickle

import pytest
import torch
from accelerate.utils import send_to_device
from torch.nn.parallel import scatter_gather
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import Trainer

import small_training
from modeling_diffusionvmr import DiffusionVMRDataCollator, DiffusionVMRForMomentRetrieval
from modeling_diffusionvmr.loss_diffusionvmr import Targets


@pytest.fixture
def samples(tiny_config):
    """Of videos of 10, 15, 20 (of 34) clips, with 1, 2 and 1 windows; sentences of 2, 3 and 5 tokens."""
    dataset = small_training.make_dataset(tiny_config())
    return dataset.__getitems__([0, 1, 3])


def test_collator(samples):
    samples[2] = {**samples[2], "labels": {"spans": torch.rand(0, 2)}}
    batch = DiffusionVMRDataCollator()(samples)
    shapes = {name: tuple(value.shape) for name, value in batch.items() if name != "labels"}
    negatives = [len(sample["negative_text_features"]) for sample in samples]
    assert shapes == {
        "video_features": (3, 20, 12),
        "video_mask": (3, 20),
        "text_features": (3, 5, 8),
        "text_mask": (3, 5),
        "negative_text_features": (3, max(negatives), 8),
        "negative_text_mask": (3, max(negatives)),
        "noisy_spans": (3, 6, 2),
        "timesteps": (3,),
    }
    assert batch["video_mask"].sum(1).tolist() == [10, 15, 20]
    assert batch["text_mask"].sum(1).tolist() == [2, 3, 5]
    assert batch["negative_text_mask"].sum(1).tolist() == negatives
    assert type(batch["labels"]) is Targets and batch["labels"].spans.shape == (3, 2, 2)
    assert batch["labels"].window_mask.sum(1).tolist() == [1, 2, 0]
    for row, sample in enumerate(samples):
        torch.testing.assert_close(batch["noisy_spans"][row], sample["noisy_spans"], atol=0, rtol=0)
        torch.testing.assert_close(batch["labels"][row]["spans"], sample["labels"]["spans"], atol=0, rtol=0)
        length = len(sample["video_features"])
        torch.testing.assert_close(batch["video_features"][row, :length], sample["video_features"], atol=0, rtol=0)
        assert (batch["video_features"][row, length:] == 0).all()


def test_labels_only_where_all_samples_have_them(samples):
    del samples[1]["labels"]
    assert "labels" not in DiffusionVMRDataCollator()(samples)


def prepared_by_trainer(batch):
    trainer = object.__new__(Trainer)
    trainer.args = type("Arguments", (), {"device": torch.device("cpu")})
    trainer.is_deepspeed_enabled = False
    return trainer._prepare_input(batch)


MOVES = {
    "worker": lambda batch: pickle.loads(pickle.dumps(batch)),
    "accelerate": lambda batch: send_to_device(batch, torch.device("cpu"), non_blocking=True),
    "Trainer": prepared_by_trainer,
    "pinned": pin_memory,
}


@pytest.mark.parametrize("move", MOVES)
def test_labels_survive_a_move(samples, monkeypatch, move):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # pinning needs a GPU
    batch = DiffusionVMRDataCollator()(samples)
    moved = MOVES[move](batch)["labels"]
    assert type(moved) is Targets and moved is not batch["labels"]
    assert moved.keys() == batch["labels"].keys()
    for name, value in moved.items():
        assert torch.equal(value, batch["labels"][name])


class ChunkingScatter:
    """What `Scatter` does with a tensor, but without devices."""

    @staticmethod
    def apply(devices, sizes, dim, tensor):
        return tuple(tensor.chunk(len(devices), dim))


def test_data_parallel_gives_each_replica_its_labels(tiny_config, monkeypatch):
    monkeypatch.setattr(scatter_gather, "Scatter", ChunkingScatter)
    config = tiny_config(dropout=0.0, input_dropout=0.0)
    dataset = small_training.make_dataset(config)
    model = DiffusionVMRForMomentRetrieval(config).train()
    collator = DiffusionVMRDataCollator()
    _, replicas = scatter_gather.scatter_kwargs((), collator(dataset.__getitems__(range(8))), [0, 1])
    for inputs, rows in zip(replicas, (range(4), range(4, 8)), strict=True):
        own = collator(dataset.__getitems__(rows))
        assert len(inputs["labels"]) == 4
        for index in range(4):
            for name, value in own["labels"][index].items():
                assert torch.equal(inputs["labels"][index][name], value)
        torch.testing.assert_close(model(**inputs).loss, model(**own).loss)


def test_durations_keep_their_digits():
    features = {"video_features": torch.ones(3, 2), "text_features": torch.ones(2, 2)}
    sample = {"index": 0, "covered_duration": 30.1, **features}
    assert DiffusionVMRDataCollator(with_indices=True)([sample])["covered_durations"].tolist() == [30.1]
