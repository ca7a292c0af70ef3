import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from modeling_diffusionvmr import DiffusionVMRDataCollator, DiffusionVMRProcessor, MomentRetrievalDataset
from modeling_diffusionvmr.diffusion import signal_to_spans

LENGTHS = {"v1": 10, "v2": 15, "v3": 34}
ROWS = [
    {"qid": 1, "query": "a", "vid": "v1", "duration": 20.0, "relevant_windows": [[4.0, 10.0]]},
    {"qid": "b_2", "query": "b", "vid": "v2", "duration": 30.0, "relevant_windows": [[0.0, 3.4], [20.0, 30.0]]},
    {"qid": 3, "query": "c", "vid": "v1", "duration": 20.0, "relevant_windows": [[0.0, 20.0]]},
    {"qid": 4, "query": "d", "vid": "v3", "duration": 68.0, "relevant_windows": []},
    {"qid": 5, "query": "e", "vid": "v1", "duration": 20.0, "relevant_windows": [[9.2, 9.4]]},
    {
        "qid": 6,
        "query": "f",
        "vid": "v3",
        "duration": 68.0,
        "relevant_windows": [[8.0 * i, 8.0 * i + 2] for i in range(8)],
    },
]
QIDS = [row["qid"] for row in ROWS]
DRAWS = ("noisy_spans", "timesteps", "negative_text_features")


@pytest.fixture(scope="module")
def features() -> tuple[dict, dict]:
    """Of videos, and of sentences, each of which begins with a token that tells its row."""
    random = np.random.default_rng(0)
    video = {vid: random.normal(size=(length, 12)).astype(np.float32) for vid, length in LENGTHS.items()}
    text = {
        qid: np.concatenate((np.eye(8, dtype=np.float32)[[index]], random.normal(size=(index + 1, 8)))).astype("f4")
        for index, qid in enumerate(QIDS)
    }
    return video, text


@pytest.fixture
def make_dataset(features, tiny_config):
    def make(rows=ROWS, train=True, seed=0, clip_seconds=None, **changes) -> MomentRetrievalDataset:
        processor = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=10)
        config = tiny_config(**changes) if train else None
        return MomentRetrievalDataset(rows, *features, processor, config, clip_seconds, seed)

    return make


def row_of_sentence(tokens) -> int:
    return tokens[0].argmax().item()


def assert_same(sample, other):
    assert sample["row"] == other["row"]
    for name in ("video_features", "text_features", *DRAWS):
        torch.testing.assert_close(sample[name], other[name], atol=0, rtol=0)
    for name, value in sample["labels"].items():
        torch.testing.assert_close(value, other["labels"][name], atol=0, rtol=0)


# Samples


def test_sample(make_dataset, features):
    dataset = make_dataset(train=False)
    assert len(dataset) == 6
    sample = dataset[1]
    assert set(sample) == {"row", "covered_duration", "video_features", "text_features", "labels"}
    assert sample["row"] == 1 and sample["covered_duration"] == 30
    wanted = dataset.processor.prepare_video([features[0]["v2"]])
    torch.testing.assert_close(sample["video_features"], wanted, atol=0, rtol=0)
    wanted = dataset.processor.prepare_text(features[1]["b_2"])
    torch.testing.assert_close(sample["text_features"], wanted, atol=0, rtol=0)
    torch.testing.assert_close(sample["labels"]["spans"], torch.tensor([[1.7, 3.4], [25, 10]]) / 30)
    assert dataset[3]["labels"]["spans"].shape == (0, 2)


def test_several_backbones(features, tiny_config):
    video, text = features
    shorter = {vid: array[:-2, :3] for vid, array in video.items()}
    processor = DiffusionVMRProcessor([12, 3], 8)
    sample = MomentRetrievalDataset(ROWS, [video, shorter], text, processor, clip_seconds=2.0)[0]
    assert sample["video_features"].shape == (8, 15)
    assert sample["covered_duration"] == 16  # of the shorter one
    torch.testing.assert_close(sample["labels"]["spans"], torch.tensor([[7 / 16, 6 / 16]]))


def test_windows_beyond_the_features(make_dataset):
    windows = [[2.0, 4.0], [18.0, 30.0], [20.0, 25.0], [22.0, 30.0]]
    rows = [{**ROWS[0], "duration": 30.0, "relevant_windows": windows}, ROWS[1]]
    sample = make_dataset(rows, clip_seconds=2.0)[0]  # 10 clips of 2 s cover 20 s
    assert sample["covered_duration"] == 20
    torch.testing.assert_close(sample["labels"]["spans"], torch.tensor([[0.15, 0.1], [0.95, 0.1]]))
    assert (sample["labels"]["spans"][:, 1] > 0).all()
    # Without the length of a clip the features cover the whole duration
    spans = make_dataset(rows)[0]["labels"]["spans"]
    torch.testing.assert_close(spans, torch.tensor([[3, 2], [24, 12], [22.5, 5], [26, 8]]) / 30)


def test_rows_to_predict(make_dataset):
    rows = [{name: row[name] for name in ("qid", "query", "vid", "duration")} for row in ROWS]
    dataset = make_dataset(rows, train=False)
    assert "labels" not in dataset[0]
    batch = DiffusionVMRDataCollator()([dataset[0], dataset[1]])
    assert set(batch) == {"video_features", "video_mask", "text_features", "text_mask"}
    with pytest.raises((ValueError, KeyError), match=r"qid 1: .*relevant_windows"):
        make_dataset(rows)[0]


@pytest.mark.parametrize(
    "windows",
    [
        [[5.0, 5.0]],
        [[1.0, 2.0], [6.0, 3.0]],
        [[-1.0, 3.0]],
        [[float("nan"), 3.0]],
        [[1.0, 2.0], [3.0, ROWS[1]["duration"] + 1]],
        [[ROWS[1]["duration"], ROWS[1]["duration"] + 1]],
    ],
)
def test_windows_that_are_none(make_dataset, windows):
    with pytest.raises(ValueError, match="^qid b_2: .*(window|ends after the video)"):
        make_dataset([ROWS[0], {**ROWS[1], "relevant_windows": windows}])


def test_features_that_are_missing_or_broken(features, tiny_config):
    video, text = features
    processor = DiffusionVMRProcessor([12], 8)

    def first(video, text):
        return MomentRetrievalDataset(ROWS, video, text, processor, tiny_config())[0]

    with pytest.raises(ValueError, match="qid 1: no features of video v1"):
        first({vid: array for vid, array in video.items() if vid != "v1"}, text)
    with pytest.raises(ValueError, match="qid 1: no features of its sentence"):
        first(video, {qid: array for qid, array in text.items() if qid != 1})
    with pytest.raises(ValueError, match="^video v1, backbone 0: .*NaN or infinity in row 0"):
        first({**video, "v1": video["v1"] * np.nan}, text)
    with pytest.raises(ValueError, match=r"^qid 1: features must be \(length, 8\), got \(4, 9\)"):
        first(video, {**text, 1: np.zeros((4, 9))})


def test_two_videos_are_needed_to_train(make_dataset):
    with pytest.raises(ValueError, match="at least two videos"):
        make_dataset([ROWS[0], ROWS[2]])
    assert len(make_dataset([ROWS[0], ROWS[2]], train=False)) == 2


# Draws


def test_same_draws_in_any_order(make_dataset):
    dataset = make_dataset()
    dataset.set_epoch(3)
    samples = [dataset[index] for index in range(6)]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    other = make_dataset()
    other.set_epoch(3)
    for index in (4, 1, 5, 0, 2, 3, 4):
        assert_same(other[index], samples[index])
    assert (torch.get_rng_state() == state).all()  # nothing is taken from the global state


def test_other_draws_in_another_epoch_seed_or_row(make_dataset):
    dataset, other_seed = make_dataset(), make_dataset(seed=1)
    same_again = make_dataset([ROWS[0], ROWS[1], ROWS[0]])  # two rows that differ in nothing but their place
    one = dataset[0]["noisy_spans"]
    dataset.set_epoch(1)
    for other in (dataset[0], other_seed[0], same_again[2]):
        assert (other["noisy_spans"] != one).all()
    torch.testing.assert_close(same_again[0]["noisy_spans"], one, atol=0, rtol=0)
    dataset.set_epoch(0)
    torch.testing.assert_close(dataset[0]["noisy_spans"], one, atol=0, rtol=0)


# Both kinds of workers: those that start with each epoch, and those that live on
@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_same_draws_in_workers(make_dataset, workers, persistent):
    dataset, alone = make_dataset(), make_dataset()
    loader = DataLoader(
        dataset, batch_size=2, shuffle=True, num_workers=workers, persistent_workers=persistent, collate_fn=list
    )
    for epoch in range(2):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        samples = [sample for batch in loader for sample in batch]
        assert sorted(sample["row"] for sample in samples) == list(range(6))
        for sample in samples:
            assert_same(sample, alone[sample["row"]])


def test_windows_come_first_in_the_noisy_spans(make_dataset):
    """Seen where there is little noise. Of more windows than proposals, some."""
    dataset = make_dataset(num_diffusion_steps=1000)
    assert dataset[0]["noisy_spans"].shape == (6, 2)
    first, seen = set(), {0: 0, 1: 0, 5: 0}
    steps = []
    for epoch in range(600):
        dataset.set_epoch(epoch)
        for index in seen:
            sample = dataset[index]
            steps.append(sample["timesteps"].item())
            if sample["timesteps"] > 20:
                continue
            seen[index] += 1
            windows = sample["labels"]["spans"]
            spans = signal_to_spans(sample["noisy_spans"], 2.0)
            count = min(len(windows), 6)
            distance = (spans[:count, None] - windows).abs().amax(-1)
            assert (distance.amin(1) < 0.05).all(), (spans, windows)
            assert len(set(distance.argmin(1).tolist())) == count  # each once
            if index == 1:
                first.add(distance.argmin(1)[0].item())
    assert all(seen.values())
    assert first == {0, 1}  # in random order, so that the first N are right for any N
    assert min(steps) < 10 and max(steps) > 990 and max(steps) < 1000 and abs(np.mean(steps) - 500) < 40


def test_negative_sentence_is_of_another_video(make_dataset):
    dataset = make_dataset()
    chosen = {index: set() for index in range(6)}
    for epoch in range(40):
        dataset.set_epoch(epoch)
        for index in range(6):
            chosen[index].add(row_of_sentence(dataset[index]["negative_text_features"]))
    for index, row in enumerate(ROWS):
        assert chosen[index] == {other for other in range(6) if ROWS[other]["vid"] != row["vid"]}


def test_saliency_pairs_are_inside_and_outside(make_dataset):
    dataset = make_dataset()
    # Of 10, 15 and 10 clips of 2 s, by their centres; a window of 0.2 s that holds none is seen by the clip around it
    relevant = {0: {2, 3, 4}, 1: {0, 1, 10, 11, 12, 13, 14}, 4: {4}}
    seen = {index: (set(), set()) for index in relevant}
    for epoch in range(60):
        dataset.set_epoch(epoch)
        for index in relevant:
            labels = dataset[index]["labels"]
            assert labels["saliency_pos"].shape == labels["saliency_neg"].shape == (2,)
            assert labels["saliency_pos"].dtype == torch.long
            seen[index][0].update(labels["saliency_pos"].tolist())
            seen[index][1].update(labels["saliency_neg"].tolist())
    for index, clips in relevant.items():
        assert seen[index] == (clips, set(range(LENGTHS[ROWS[index]["vid"]])) - clips)


def test_no_pairs_where_all_or_nothing_is_relevant(make_dataset):
    dataset = make_dataset()
    for index in (2, 3):
        labels = dataset[index]["labels"]
        assert labels["saliency_pos"].shape == labels["saliency_neg"].shape == (0,)
        assert labels["saliency_pos"].dtype == labels["saliency_neg"].dtype == torch.long


def test_pairs_of_a_video_that_was_averaged_down(make_dataset):
    rows = [{**ROWS[5], "relevant_windows": [[34.0, 68.0]]}, ROWS[0]]
    dataset = make_dataset(rows)
    for epoch in range(20):
        dataset.set_epoch(epoch)
        sample = dataset[0]
        assert sample["video_features"].shape == (20, 12)  # of 34
        assert ((sample["labels"]["saliency_pos"] >= 10) & (sample["labels"]["saliency_pos"] < 20)).all()
        assert (sample["labels"]["saliency_neg"] < 10).all()


# Batches


def test_collator(make_dataset):
    dataset = make_dataset()
    samples = [dataset[index] for index in (0, 1, 5)]
    batch = DiffusionVMRDataCollator()(samples)
    shapes = {name: tuple(value.shape) for name, value in batch.items() if name != "labels"}
    negatives = [len(sample["negative_text_features"]) for sample in samples]
    assert shapes == {
        "video_features": (3, 20, 12),
        "video_mask": (3, 20),
        "text_features": (3, 7, 8),
        "text_mask": (3, 7),
        "negative_text_features": (3, max(negatives), 8),
        "negative_text_mask": (3, max(negatives)),
        "noisy_spans": (3, 6, 2),
        "timesteps": (3,),
    }
    assert batch["video_mask"].sum(1).tolist() == [10, 15, 20]
    assert batch["text_mask"].sum(1).tolist() == [2, 3, 7]
    assert batch["negative_text_mask"].sum(1).tolist() == negatives
    assert [len(label["spans"]) for label in batch["labels"]] == [1, 2, 8]
    for row, sample in enumerate(samples):
        torch.testing.assert_close(batch["noisy_spans"][row], sample["noisy_spans"], atol=0, rtol=0)
        length = len(sample["video_features"])
        torch.testing.assert_close(batch["video_features"][row, :length], sample["video_features"], atol=0, rtol=0)
        assert (batch["video_features"][row, length:] == 0).all()
