import json
import math
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from modeling_diffusionvmr import (
    DiffusionVMRDataCollator,
    DiffusionVMRProcessor,
    MomentRetrievalDataset,
    open_features,
)
from modeling_diffusionvmr.data.features import write_features
from modeling_diffusionvmr.diffusion import signal_to_spans
from modeling_diffusionvmr.training import dataset as dataset_module

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
    """Features of videos and of sentences; the first token of a sentence encodes its row."""
    rng = np.random.default_rng(0)
    video = {vid: rng.normal(size=(length, 12)).astype(np.float32) for vid, length in LENGTHS.items()}
    text = {
        qid: np.concatenate((np.eye(8, dtype=np.float32)[[index]], rng.normal(size=(index + 1, 8)))).astype("f4")
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
    assert sample["index"] == other["index"]
    for name in ("video_features", "text_features", *DRAWS):
        torch.testing.assert_close(sample[name], other[name], atol=0, rtol=0)
    for name, value in sample["labels"].items():
        torch.testing.assert_close(value, other["labels"][name], atol=0, rtol=0)


# Samples


def test_sample(make_dataset, features):
    dataset = make_dataset(train=False)
    assert len(dataset) == 6
    sample = dataset[1]
    assert set(sample) == {"index", "covered_duration", "video_features", "text_features", "labels"}
    assert sample["index"] == 1 and sample["covered_duration"] == 30
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
    with pytest.warns(UserWarning, match="^qid 1: a window lies entirely beyond the 20 s") as caught:
        dataset = make_dataset(rows, clip_seconds=2.0)
        sample, _ = dataset[0], dataset[0]  # 10 clips of 2 s cover 20 s
    assert len(caught) == 1
    assert sample["covered_duration"] == 20
    torch.testing.assert_close(sample["labels"]["spans"], torch.tensor([[0.15, 0.1], [0.95, 0.1]]))
    assert (sample["labels"]["spans"][:, 1] > 0).all()
    # Without the length of a clip the features cover the whole duration
    spans = make_dataset(rows)[0]["labels"]["spans"]
    torch.testing.assert_close(spans, torch.tensor([[3, 2], [24, 12], [22.5, 5], [26, 8]]) / 30)


@pytest.mark.parametrize("duration, warns", [(20.0, False), (24.0, False), (15.0, False), (28.0, True), (13.0, True)])
def test_duration_that_does_not_fit_the_features(make_dataset, duration, warns):
    dataset = make_dataset(
        [{**ROWS[0], "duration": duration, "relevant_windows": [[2.0, 4.0]]}, ROWS[1]], clip_seconds=2.0
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _ = dataset[0], dataset[0]
    expected = [f"qid 1: its video lasts {duration:g} s, but the features cover 20 s."] if warns else []
    assert [str(warning.message)[: len(expected[0])] for warning in caught] == expected


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
def test_invalid_windows(make_dataset, windows):
    with pytest.raises(ValueError, match="^qid b_2: .*(window|ends after the video)"):
        make_dataset([ROWS[0], {**ROWS[1], "relevant_windows": windows}])


def test_windows_in_an_array(make_dataset):
    rows = [{**row, "relevant_windows": np.array(row["relevant_windows"]).reshape(-1, 2)} for row in ROWS]
    for sample, other in zip(make_dataset(rows, train=False), make_dataset(train=False), strict=True):
        torch.testing.assert_close(sample["labels"], other["labels"], atol=0, rtol=0)
    rows[0]["relevant_windows"] = np.array([[2.0, 25.0]])
    with pytest.raises(ValueError, match="ends after the video"):
        make_dataset(rows)


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


class Counting(dict):
    """A mapping that counts the reads of each array."""

    def __init__(self, *args):
        super().__init__(*args)
        self.reads = Counter()

    def __getitem__(self, identifier):
        self.reads[identifier] += 1
        return super().__getitem__(identifier)


def test_skip_invalid(features, tiny_config):
    video, text = Counting(features[0]), dict(features[1])
    video["v2"] = features[0]["v2"] * np.nan
    del text[6]
    text[3] = np.zeros((4, 9), dtype=np.float32)
    rows = [*ROWS, {**ROWS[0], "qid": 8, "vid": "v9"}, {**ROWS[1], "qid": 9}, {**ROWS[3], "qid": 10}]
    text.update({8: text[1], 9: text[1], 10: text[4]})
    processor = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=10)
    with pytest.warns(UserWarning) as caught:
        dataset = MomentRetrievalDataset(rows, video, text, processor, tiny_config(), skip_invalid=True)
    assert [row["qid"] for row in dataset.rows] == [1, 4, 5, 10] and len(dataset) == 4
    assert len(caught) == 1 and caught[0].filename == __file__
    first, *lines = str(caught[0].message).splitlines()
    assert "skipped 5 of 9 rows" in first
    reasons = {
        "b_2": "video v2.*NaN or infinity",
        "3": r"features must be \(length, 8\), got \(4, 9\)",
        "6": "no features of its sentence",
        "8": "no features of video v9",
        "9": "video v2.*NaN or infinity",
    }
    assert len(lines) == len(reasons)
    for line, (qid, reason) in zip(lines, reasons.items()):
        with pytest.raises(ValueError, match=rf"^  qid {qid}: (?!qid).*{reason}"):
            raise ValueError(line)
    assert max(video.reads.values()) == 1  # each video once, though it has several queries

    good = MomentRetrievalDataset([rows[index] for index in (0, 3, 4, 8)], video, text, processor, tiny_config())
    for index in range(4):
        assert_same(dataset[index], good[index])
    with pytest.raises(ValueError, match="no features of its sentence|no features of video v9"):
        MomentRetrievalDataset(rows, video, text, processor, tiny_config())


def test_skip_invalid_without_invalid_rows(make_dataset, features):
    video, text = features
    processor = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert MomentRetrievalDataset(ROWS, video, text, processor, skip_invalid=True).rows == ROWS


def test_skip_invalid_with_only_invalid_rows(features):
    """The error gives the first reason."""
    with (
        warnings.catch_warnings(record=True) as caught,
        pytest.raises(ValueError, match="none of 6 rows has usable features") as error,
    ):
        warnings.simplefilter("always")
        MomentRetrievalDataset(ROWS, *features, DiffusionVMRProcessor([13], 8), skip_invalid=True)
    assert "features must be (length, 13)" in f"{error.value} {[str(warning.message) for warning in caught]}"


def test_clip_seconds_of_the_stores(features, tmp_path):
    for backbone, seconds in (("silent", None), ("says_2", 2), ("says_1", 1)):
        for vid, array in features[0].items():
            write_features(tmp_path / backbone, vid, array)
        if seconds is not None:
            (tmp_path / backbone / "features.json").write_text(json.dumps({"clip_seconds": seconds}))
    stores = SimpleNamespace(**{path.name: open_features(path) for path in tmp_path.iterdir()})
    processor = {count: DiffusionVMRProcessor([12] * count, 8) for count in (1, 2)}
    rows = [
        {**ROWS[0], "duration": 21.0},
        {**ROWS[1], "duration": 28.0, "relevant_windows": [[2.0, 9.0]]},
    ]  # of 10 and 15 clips

    def covered(*backbones, **changes):
        dataset = MomentRetrievalDataset(rows, backbones, features[1], processor[len(backbones)], **changes)
        samples = [dataset[0], dataset[1]]
        for sample, row in zip(samples, rows):
            start, end = row["relevant_windows"][0]
            wanted = torch.tensor([(start + end) / 2, end - start]) / sample["covered_duration"]
            torch.testing.assert_close(sample["labels"]["spans"][0], wanted)
        return [sample["covered_duration"] for sample in samples]

    assert covered(stores.silent) == covered(features[0]) == [21, 28]  # the duration divided by the clips
    assert covered(stores.says_2) == covered(stores.silent, stores.says_2) == [20, 30]
    assert covered(stores.says_2, clip_seconds=2.5) == covered(stores.silent, clip_seconds=2.5) == [25, 37.5]
    assert covered(stores.says_1, stores.says_2, clip_seconds=2.0) == [20, 30]
    with pytest.raises(ValueError, match="clips of the same length, got 1 s in .*says_1, 2 s in .*says_2"):
        covered(stores.says_1, stores.says_2)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_rejected_clip_seconds(make_dataset, seconds):
    with pytest.raises(ValueError, match="`clip_seconds` must be a number"):
        make_dataset(clip_seconds=seconds)


@pytest.mark.parametrize("clip_seconds", [None, 2.0])
def test_averaged_videos_are_kept(features, tiny_config, monkeypatch, clip_seconds):
    def make(most):
        monkeypatch.setattr(dataset_module, "MAX_AVERAGED_VIDEOS", most)
        processor = DiffusionVMRProcessor([12], 8, max_clips=12, max_tokens=10)  # v1 has 10 clips, v2 15, v3 34
        video = Counting(features[0])
        rows = [*ROWS, {**ROWS[1], "qid": 7, "duration": 33.0}]  # of the same video, but longer
        return MomentRetrievalDataset(
            rows, video, {**features[1], 7: features[1][1]}, processor, tiny_config(), clip_seconds
        )

    order = (3, 1, 6, 5, 1, 0, 2, 3, 6, 0)
    never = make(0)
    alone = [never[index] for index in order]
    assert never.video_features[0].reads == {"v1": 3, "v2": 4, "v3": 3}
    for most, reads in ((256, {"v1": 3, "v2": 1, "v3": 1}), (1, {"v1": 3, "v2": 4, "v3": 1})):
        kept = make(most)
        for sample, index in zip(alone, order):
            assert_same(kept[index], sample)
            assert kept[index]["covered_duration"] == sample["covered_duration"]
        assert kept.video_features[0].reads == {vid: 2 * n if n > 1 else 1 for vid, n in reads.items()}
    durations = {index: sample["covered_duration"] for index, sample in zip(order, alone)}
    assert (durations[1], durations[6]) == ((30, 33) if clip_seconds is None else (30, 30))


@pytest.mark.parametrize("window, part", [([10.3, 10.5], 3), ([0.0, 0.1], 0), ([67.9, 68.0], 19), ([40.5, 40.7], 11)])
def test_window_narrower_than_a_part_has_a_clip(make_dataset, window, part):
    dataset = make_dataset([{**ROWS[3], "relevant_windows": [window]}, ROWS[0]])  # 20 parts of 3.4 s
    for epoch in range(3):
        dataset.set_epoch(epoch)
        labels = dataset[0]["labels"]
        assert labels["saliency_pos"].tolist() == [part, part] and part not in labels["saliency_neg"].tolist()


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


@pytest.mark.parametrize("batch", [[0, 1, 2, 3, 4, 5], [5, 0], [3, 1, 3], [2], [4, 3, 2, 1, 0]])
def test_same_draws_in_any_batch(make_dataset, batch):
    dataset, alone = make_dataset(), make_dataset()
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        samples = dataset.__getitems__(batch)
        assert [sample["index"] for sample in samples] == batch
        for sample in samples:
            assert_same(sample, alone[sample["index"]])


def test_same_draws_among_more_rows(make_dataset):
    """Except for the sentence of another video, which any of the rows may give."""
    many = [{**ROWS[5], "relevant_windows": [[i, i + 1.0] for i in range(12)]}] * 300
    few, more = make_dataset(), make_dataset([*ROWS, *many])
    few.set_epoch(2)
    more.set_epoch(2)
    for index in range(6):
        for name in ("noisy_spans", "timesteps"):
            torch.testing.assert_close(more[index][name], few[index][name], atol=0, rtol=0)
        for name, value in few[index]["labels"].items():
            torch.testing.assert_close(more[index]["labels"][name], value, atol=0, rtol=0)


def test_each_row_has_draws_of_its_own(make_dataset):
    """Even if the rows are the same."""
    dataset = make_dataset([ROWS[0], ROWS[1]] * 300)
    noise = torch.stack([sample["noisy_spans"] for sample in dataset.__getitems__(range(600))])
    assert len(noise.flatten(1).unique(dim=0)) == 600
    steps = torch.stack([sample["timesteps"] for sample in dataset.__getitems__(range(600))])
    assert len(steps.unique()) > 90 and abs(steps.float().mean() - 49.5) < 5  # of 100


def test_rows_from_the_end(make_dataset):
    dataset = make_dataset()
    assert_same(dataset[-1], dataset[5])
    assert_same(dataset[-6], dataset[0])
    for index in (6, -7):
        with pytest.raises(IndexError):
            dataset[index]
    assert [sample["index"] for sample in dataset] == list(range(6))  # iteration ends


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


# Workers that start with each epoch, and persistent ones
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
        assert sorted(sample["index"] for sample in samples) == list(range(6))
        for sample in samples:
            assert_same(sample, alone[sample["index"]])


def test_windows_come_first_in_the_noisy_spans(make_dataset):
    """Visible at a small t. If there are more windows than proposals, some of them come first."""
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


def test_negative_sentence_is_not_true_in_the_video(make_dataset):
    """With the absent term. Without it, the draws stay as they were."""
    # True in v1: "a", "c" and "e"; row 4 (v1) is labeled as absent
    queries = ("A  dog", "a dog.", "c", "d", "e", "E ")
    rows = [{**row, "query": query} for row, query in zip(ROWS, queries)]
    rows[4]["relevant_windows"] = []
    plain, dataset = make_dataset(rows), make_dataset(rows, absent_loss_coefficient=1)
    chosen = {index: set() for index in range(6)}
    for epoch in range(60):
        for each in (plain, dataset):
            each.set_epoch(epoch)
        for index in range(6):
            sample, before = dataset[index], plain[index]
            other = row_of_sentence(sample["negative_text_features"])
            chosen[index].add(other)
            if other == row_of_sentence(before["negative_text_features"]):
                assert_same(sample, before)
    # Row 1 says of v2 what row 0 says of v1. Row 5 says of v3 what is labeled as absent in v1, so it is drawn for v1
    assert chosen == {0: {3, 5}, 2: {3, 5}, 4: {3, 5}, 1: {2, 3, 4, 5}, 3: {0, 1, 2}, 5: {0, 1, 2}}


def test_without_a_negative_sentence(make_dataset):
    rows = [{**ROWS[0], "query": "a dog"}, {**ROWS[1], "query": "A dog"}, {**ROWS[3], "query": "a dog"}]
    assert len(make_dataset(rows)) == 3
    with pytest.raises(ValueError, match="^video v1: every sentence of another video is also true in it"):
        make_dataset(rows, absent_loss_coefficient=1)
    assert len(make_dataset([*rows, {**ROWS[5], "query": "a cat"}], absent_loss_coefficient=1)) == 4


def test_the_absent_term_of_the_model_and_of_the_dataset(make_dataset, tiny_config):
    dataset = make_dataset()
    with pytest.raises(ValueError, match="built with absent_loss_coefficient=0.0, the model has 1"):
        dataset.check_config(tiny_config(absent_loss_coefficient=1))


def test_saliency_pairs_are_inside_and_outside(make_dataset):
    dataset = make_dataset()
    # 10, 15 and 10 clips of 2 s, by their centers; a window of 0.2 s that holds no center belongs to the clip around it
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


# Saliency pairs by annotators' scores

EPOCHS = 200
SCORED = {  # clips of the features, duration, and the sums of annotators' scores of 2 s clips
    "of 2 s": (10, 20, {2: 4, 3: 6, 4: 12, 7: 1, 8: 5}),
    "equally good and bad ones": (10, 20, {1: 9, 2: 4, 3: 9, 4: 6, 7: 4, 8: 6, 9: 4}),
    "all are relevant": (10, 20, {clip: (5, 6, 4)[clip % 3] for clip in range(10)}),
    "all are relevant and equal": (10, 20, dict.fromkeys(range(10), 5)),
    "equal": (10, 20, {2: 5, 3: 5, 9: 5}),
    "all zero": (10, 20, {2: 0, 3: 0}),
    "zero is the worst, not irrelevant": (10, 20, {2: 0, 3: 1, 5: 5}),
    "one": (10, 20, {0: 12}),
    "of 4 s": (5, 20, {0: 1, 1: 5, 4: 6, 7: 9, 8: 4}),
    "of 1 s": (20, 20, {2: 4, 3: 6, 4: 12, 7: 1}),
    "of 0.8 s": (10, 8, {0: 4, 2: 6}),
    "of 3 s": (8, 24, {0: 4, 3: 6, 4: 12, 11: 1}),
    "of 2.1 s": (10, 21, {0: 4, 1: 5, 5: 6, 8: 12, 9: 1}),
    "averaged down to 3.4 s": (34, 68, {0: 4, 1: 6, 5: 12, 6: 9, 20: 1, 32: 1, 33: 4}),
    "averaged down to 7.5 s": (75, 150, {0: 4, 1: 6, 2: 4, 4: 5, 40: 2, 41: 2, 73: 12, 74: 4}),
}


def people(total: int) -> list[int]:
    """Split a sum into the scores of three annotators."""
    return [total // 3, (total + 1) // 3, (total + 2) // 3]


def allowed_pairs(num_clips: int, covered: float, totals: dict[int, int]) -> list[tuple[set, set]]:
    """
    Apply the definition clip by clip: the clips that each of a sample's two pairs may be drawn from, (better, worse).

    A clip has the highest score among the annotated clips whose center it contains and the one that contains its own
    center.
    """
    seconds, scores = covered / num_clips, {}
    for clip in range(num_clips):
        for annotated, total in totals.items():
            center, own = 2 * annotated + 1, (clip + 0.5) * seconds
            if clip * seconds <= center < (clip + 1) * seconds or 2 * annotated <= own < 2 * annotated + 2:
                scores[clip] = max(total, scores.get(clip, 0))
    best = {clip for clip, score in scores.items() if score == max(scores.values())}
    worst = {clip for clip, score in scores.items() if score == min(scores.values())} - best
    others = set(range(num_clips)) - set(scores)
    hard, easy = ([(best, worst)] if worst else []), ([(set(scores), others)] if scores and others else [])
    return (hard + easy) * (2 if len(hard + easy) == 1 else 1)


@pytest.fixture(scope="module")
def scored(tiny_config):
    """For each case (one row each), how often each pair of clips was drawn as the first and as the second pair."""
    rng = np.random.default_rng(0)
    rows, video, text = [], {}, {}
    for qid, (name, (num_clips, duration, totals)) in enumerate(SCORED.items()):
        video[name] = rng.normal(size=(num_clips, 12)).astype(np.float32)
        text[qid] = rng.normal(size=(2, 8)).astype(np.float32)
        row = {"qid": qid, "query": "a", "vid": name, "duration": duration}
        row["relevant_windows"] = [[0.0, duration / 3]]  # annotators' scores take precedence
        row["relevant_clip_ids"] = list(totals)
        row["saliency_scores"] = [people(total) for total in totals.values()]
        rows.append(row)
    processor = DiffusionVMRProcessor([12], 8, max_clips=20, max_tokens=10)
    dataset = MomentRetrievalDataset(rows, video, text, processor, tiny_config())
    seen = {name: (Counter(), Counter()) for name in SCORED}
    for epoch in range(EPOCHS):
        dataset.set_epoch(epoch)
        for name, sample in zip(SCORED, dataset.__getitems__(range(len(rows)))):
            labels = sample["labels"]
            for pair, clips in enumerate(zip(labels["saliency_pos"].tolist(), labels["saliency_neg"].tolist())):
                seen[name][pair][clips] += 1
    return seen


@pytest.mark.parametrize("name", SCORED)
def test_saliency_pairs_by_annotators(scored, name):
    num_clips, duration, totals = SCORED[name]
    allowed = allowed_pairs(min(num_clips, 20), duration, totals)
    assert bool(allowed) == (name != "all are relevant and equal")
    seen = [pairs for pairs in scored[name] if pairs]
    assert len(seen) == len(allowed)
    for pairs, (better, worse) in zip(seen, allowed):
        assert {pair[0] for pair in pairs} == better and {pair[1] for pair in pairs} == worse
        for side, clips in enumerate((better, worse)):  # each is as likely as another
            counts = Counter()
            for pair, count in pairs.items():
                counts[pair[side]] += count
            chi = sum((counts[clip] - EPOCHS / len(clips)) ** 2 for clip in clips) * len(clips) / EPOCHS
            assert chi < len(clips) + 5 * math.sqrt(2 * len(clips))


def test_annotated_clips_beyond_the_features(make_dataset):
    """The features of v1 cover 20 s; scores of later clips do not go to the last clip."""
    row = {**ROWS[0], "duration": 26.0, "relevant_clip_ids": [1, 2, 10, 11]}
    row["saliency_scores"] = [people(total) for total in (4, 6, 12, 0)]
    dataset = make_dataset([row, ROWS[1]], clip_seconds=2.0)
    for epoch in range(30):
        dataset.set_epoch(epoch)
        labels = dataset[0]["labels"]
        assert labels["saliency_pos"][0] == 2 and labels["saliency_neg"][0] == 1
        assert labels["saliency_pos"][1] in (1, 2) and labels["saliency_neg"][1] not in (1, 2)


def test_rows_with_and_without_annotators(make_dataset):
    """In one batch, each by its own rule, at different lengths."""
    row = {**ROWS[1], "relevant_clip_ids": [2, 14], "saliency_scores": [[1, 1, 1], [3, 3, 3]]}
    dataset, plain = make_dataset([ROWS[0], row, *ROWS[2:]]), make_dataset()
    for epoch in range(10):
        dataset.set_epoch(epoch)
        plain.set_epoch(epoch)
        samples = dataset.__getitems__([0, 1, 2, 5])
        assert_same(samples[0], plain[0])
        assert_same(samples[3], plain[5])
        assert (samples[1]["labels"]["saliency_pos"][0], samples[1]["labels"]["saliency_neg"][0]) == (14, 2)
        assert len(samples[2]["labels"]["saliency_pos"]) == 0
