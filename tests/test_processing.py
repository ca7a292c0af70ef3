import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from modeling_diffusionvmr import DiffusionVMRProcessor
from modeling_diffusionvmr.modeling_diffusionvmr import DiffusionVMRMomentRetrievalOutput
from modeling_diffusionvmr.processing_diffusionvmr import average_down

RANDOM = np.random.default_rng(0)


@pytest.fixture
def processor() -> DiffusionVMRProcessor:
    return DiffusionVMRProcessor(video_feature_sizes=[3, 2], text_feature_size=4, max_clips=8, max_tokens=5)


def video(*lengths) -> list[np.ndarray]:
    return [RANDOM.normal(size=(length, size)).astype(np.float32) for length, size in zip(lengths, (3, 2))]


def sentence(tokens) -> np.ndarray:
    return RANDOM.normal(size=(tokens, 4)).astype(np.float32)


# Inputs


def test_each_backbone_and_each_token_is_normalized(processor):
    arrays = [np.array([[3, 4, 0], [0, 0, 0.5]]), np.array([[5, 12], [0, 0]])]
    wanted = [[0.6, 0.8, 0, 5 / 13, 12 / 13], [0, 0, 1, 0, 0]]
    torch.testing.assert_close(processor.prepare_video(arrays), torch.tensor(wanted), atol=1e-4, rtol=0)
    text = processor.prepare_text(np.array([[2, 0, 0, 0], [1, 1, 1, 1]], dtype=np.float16))
    assert text.dtype == torch.float32
    torch.testing.assert_close(text, torch.tensor([[1, 0, 0, 0], [0.5] * 4]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [(7, 5), (5, 7), (5, 6), (5, 5)])
def test_cut_to_the_shortest(processor, lengths):
    arrays = video(*lengths)
    prepared = processor.prepare_video(arrays)
    assert prepared.shape == (5, 5) and prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, processor.prepare_video([array[:5] for array in arrays]), atol=0, rtol=0)


@pytest.mark.parametrize("lengths", [(4, 7), (7, 4), (20, 1)])
def test_a_gap_of_more_than_two_clips(processor, lengths):
    message = rf"^video v7: clip counts \[{lengths[0]}, {lengths[1]}\] differ by more than 2; are they from the same"
    with pytest.raises(ValueError, match=message):
        processor.prepare_video(video(*lengths), "video v7")


@pytest.mark.parametrize(("length", "parts"), [(180, 75), (76, 75), (75, 75), (150, 75), (7, 3), (3, 1)])
def test_average_down_is_the_integral_of_the_step_function(length, parts):
    features = RANDOM.normal(size=(length, 3)).astype(np.float32)
    averaged = average_down(torch.from_numpy(features), parts).numpy()
    # On a grid that both the clips and the parts divide evenly
    wanted = features.astype(np.float64).repeat(parts, axis=0).reshape(parts, length, 3).mean(axis=1)
    assert averaged.shape == (parts, 3) and averaged.dtype == np.float32
    np.testing.assert_allclose(averaged, wanted, atol=1e-5)
    np.testing.assert_allclose(averaged.mean(axis=0), features.mean(axis=0), atol=1e-6)


def test_a_long_video_is_averaged_after_normalization(processor):
    arrays = [100 * array for array in video(20, 21)]
    units = [array[:20] / np.linalg.norm(array[:20], axis=1, keepdims=True) for array in arrays]
    wanted = average_down(torch.from_numpy(np.concatenate(units, axis=1)), 8).numpy()
    np.testing.assert_allclose(processor.prepare_video(arrays).numpy(), wanted, atol=1e-5)
    assert processor.prepare_video(video(8, 9)).shape == (8, 5)


def test_a_long_sentence_is_truncated(processor):
    array = sentence(9)
    torch.testing.assert_close(processor.prepare_text(array), processor.prepare_text(array[:5]), atol=0, rtol=0)


def test_batch_is_padded_with_masks(processor):
    videos, sentences = [video(4, 4), video(20, 20), video(1, 2)], [sentence(2), sentence(5), sentence(9)]
    batch = processor(videos, sentences)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "video_features": (3, 8, 5),
        "video_mask": (3, 8),
        "text_features": (3, 5, 4),
        "text_mask": (3, 5),
    }
    assert batch["video_mask"].sum(1).tolist() == [4, 8, 1] and batch["text_mask"].sum(1).tolist() == [2, 5, 5]
    for row, (arrays, tokens) in enumerate(zip(videos, sentences)):
        for name, rows in (("video", processor.prepare_video(arrays)), ("text", processor.prepare_text(tokens))):
            length = len(rows)
            assert batch[f"{name}_mask"][row].tolist() == [1] * length + [0] * (
                len(batch[f"{name}_mask"][row]) - length
            )
            torch.testing.assert_close(batch[f"{name}_features"][row, :length], rows, atol=0, rtol=0)
            assert (batch[f"{name}_features"][row, length:] == 0).all()


def poisoned(array, row, value):
    array = array.copy()
    array[row, 1] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (video(4, 4)[:1], "video v7 has features of 1 backbones, expected 2"),
        (video(4, 4)[::-1], r"video v7, backbone 0: features must be \(length, 3\), got \(4, 2\)"),
        ([video(4, 4)[0], np.zeros((4, 5))], r"video v7, backbone 1: features must be \(length, 2\), got \(4, 5\)"),
        ([np.zeros(3), np.zeros((1, 2))], r"video v7, backbone 0: features must be \(length, 3\), got \(3,\)"),
        ([video(4, 4)[0], np.zeros((0, 2))], "video v7, backbone 1: no features"),
        ([video(4, 4)[0], poisoned(video(4, 4)[1], 2, np.nan)], "video v7, backbone 1: .*NaN or infinity in row 2"),
        ([poisoned(video(4, 4)[0], 3, np.inf), video(4, 4)[1]], "video v7, backbone 0: .*NaN or infinity in row 3"),
    ],
)
def test_invalid_video_features(processor, arrays, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        processor.prepare_video(arrays, "video v7")
    with pytest.raises(ValueError):
        processor([arrays], [sentence(3)])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 5)), r"qid 9: features must be \(length, 4\), got \(3, 5\)"),
        (np.zeros((0, 4)), "qid 9: no features"),
        # Also beyond `max_tokens`: the file is damaged
        (poisoned(sentence(9), 7, np.nan), "qid 9: .*NaN or infinity in row 7"),
        (poisoned(sentence(3), 0, -np.inf), "qid 9: .*NaN or infinity in row 0"),
    ],
)
def test_invalid_text_features(processor, array, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        processor.prepare_text(array, "qid 9")


def test_other_invalid_arguments(processor):
    with pytest.raises(ValueError, match="2 videos but 1 sentences"):
        processor([video(4, 4), video(4, 4)], [sentence(3)])
    with pytest.raises(ValueError, match="`return_tensors` must be 'pt', got 'np'"):
        processor([video(4, 4)], [sentence(3)], return_tensors="np")


# Outputs


def outputs(*rows, dtype=torch.float32) -> SimpleNamespace:
    """Return model outputs for proposals (start, end, score), all in [0, 1]; one list per sample."""
    rows = torch.tensor(rows)
    spans = torch.stack((rows[..., :2].mean(-1), rows[..., 1] - rows[..., 0]), dim=-1)
    logit = rows[..., 2].logit()
    return SimpleNamespace(pred_spans=spans, logits=torch.stack((logit + 3, torch.full_like(logit, 3)), -1).to(dtype))


def as_rows(moments, digits=3) -> list[tuple]:
    return [tuple(round(moment[key], digits) for key in ("start", "end", "score")) for moment in moments]


PROPOSALS = [[0.1, 0.3, 0.2], [0.5, 0.9, 0.8], [0.12, 0.32, 0.6], [0.9, 0.95, 0.4]]


def test_moments_by_descending_score_in_seconds(processor):
    found = processor.post_process_moment_retrieval(outputs(PROPOSALS, PROPOSALS[::-1]), [100.0, 10.0])
    assert as_rows(found[0]) == [(50, 90, 0.8), (12, 32, 0.6), (90, 95, 0.4), (10, 30, 0.2)]
    assert as_rows(found[1]) == [(5, 9, 0.8), (1.2, 3.2, 0.6), (9, 9.5, 0.4), (1, 3, 0.2)]
    assert all(type(value) is float for moment in found[0] for value in moment.values())
    (low,) = processor.post_process_moment_retrieval(outputs(PROPOSALS, dtype=torch.bfloat16), [100.0])
    assert [round(moment["start"]) for moment in low] == [50, 12, 90, 10]


@pytest.mark.parametrize("round_to", [None, 2.0])
def test_moments_lie_in_the_video(processor, round_to):
    beyond = [[-0.2, 0.4, 0.9], [0.7, 1.3, 0.8], [0.99, 1.0, 0.7], [-0.3, -0.1, 0.6], [1.1, 1.4, 0.5]]
    # Features that cover 152 s of a video of 147.5 s
    (found,) = processor.post_process_moment_retrieval(outputs(beyond), [152.0], [147.5], round_to=round_to)
    for moment in found:
        assert 0 <= moment["start"] <= moment["end"] <= 147.5
    assert found[0]["start"] == 0 and found[0]["end"] == pytest.approx(60 if round_to else 60.8)
    assert found[1]["start"] == pytest.approx(106 if round_to else 106.4) and found[1]["end"] == 147.5
    # Without durations, moments end with the time that the features cover
    (found,) = processor.post_process_moment_retrieval(outputs(beyond), [152.0], round_to=round_to)
    assert found[1]["end"] == 152


def test_options(processor):
    def find(**options):
        return as_rows(processor.post_process_moment_retrieval(outputs(PROPOSALS), [100.0], **options)[0])

    assert find(threshold=0.5) == [(50, 90, 0.8), (12, 32, 0.6)]
    assert find(threshold=0.9) == []
    assert find(top_k=3) == [(50, 90, 0.8), (12, 32, 0.6), (90, 95, 0.4)]
    assert find(top_k=0) == []
    assert find(nms_threshold=0.5) == [(50, 90, 0.8), (12, 32, 0.6), (90, 95, 0.4)]  # IoU 18 / 22 of the last
    assert find(nms_threshold=0.9) == find()
    assert find(nms_threshold=0.5, top_k=2, threshold=0.1) == find()[:2]
    assert find(round_to=8) == [(48, 88, 0.8), (16, 32, 0.6), (88, 96, 0.4), (8, 32, 0.2)]


def test_saved_with_the_processor(processor, tmp_path):
    fields = {
        "video_feature_sizes": [3, 2],
        "text_feature_size": 4,
        "max_clips": 8,
        "max_tokens": 5,
        "threshold": 0.1,
        "top_k": 3,
        "nms_threshold": 0.5,
        "round_to": 8.0,
    }
    DiffusionVMRProcessor(**fields).save_pretrained(tmp_path)
    for loaded in (AutoProcessor.from_pretrained(tmp_path), DiffusionVMRProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is DiffusionVMRProcessor
        assert {name: getattr(loaded, name) for name in fields} == fields
        arrays, text = video(30, 30), sentence(9)
        for name, value in loaded([arrays], [text]).items():
            torch.testing.assert_close(value, processor([arrays], [text])[name], atol=0, rtol=0)

    def find(**options):
        return as_rows(loaded.post_process_moment_retrieval(outputs(PROPOSALS), [100.0], **options)[0])

    assert find() == [(48, 88, 0.8), (16, 32, 0.6), (88, 96, 0.4)]
    assert find(nms_threshold=1.0, top_k=4) == [(48, 88, 0.8), (16, 32, 0.6), (88, 96, 0.4), (8, 32, 0.2)]
    assert find(top_k=1, round_to=1.0) == [(50, 90, 0.8)]
    assert find(threshold=0.7) == [(48, 88, 0.8)]


INVALID = [
    ("top_k", [-1, 1.5, "5", True, 10**30, [5]]),
    ("round_to", [0, -2, "2", float("inf"), True]),
    ("threshold", [float("nan"), "0.5", True]),
    ("nms_threshold", [1.5, -1, "0.5", float("nan"), True]),
]
INVALID_FIELDS = [
    *INVALID,
    ("threshold", [None]),
    ("video_feature_sizes", [None, 12, "12", [], {"12": 1}, [12, 0], [2.5], ["12"], [True], [-12]]),
    *((name, [0, -1, 2.5, "5", True, None]) for name in ("text_feature_size", "max_clips", "max_tokens")),
]


def cases(invalid) -> list[tuple]:
    return [(name, value) for name, values in invalid for value in values]


@pytest.mark.parametrize(("name", "value"), cases(INVALID_FIELDS))
def test_invalid_fields(tmp_path, name, value):
    fields = {"video_feature_sizes": [12], "text_feature_size": 8}
    message = rf"^`{name}(\[\d\])?` must be .*, got "
    with pytest.raises(ValueError, match=message):
        DiffusionVMRProcessor(**{**fields, name: value})

    DiffusionVMRProcessor(**fields).save_pretrained(tmp_path)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    for load in (AutoProcessor.from_pretrained, DiffusionVMRProcessor.from_pretrained):
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    with pytest.raises(ValueError, match=message):
        DiffusionVMRProcessor.from_pretrained(tmp_path, **{name: value})


@pytest.mark.parametrize(("name", "value"), cases(INVALID))
def test_invalid_options(processor, name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be .*, got {re.escape(repr(value))}"):
        processor.post_process_moment_retrieval(outputs(PROPOSALS), [100.0], **{name: value})


def test_whole_numbers_of_numpy(processor):
    (found,) = processor.post_process_moment_retrieval(outputs(PROPOSALS), [100.0], top_k=np.int64(2))
    assert len(found) == 2


@pytest.mark.parametrize("value", [0, -1.5, float("nan"), float("inf"), "9", None, True])
@pytest.mark.parametrize("name", ["covered_durations", "durations"])
def test_invalid_durations(processor, name, value):
    arguments = {"covered_durations": [10.0, 10.0], "durations": [10.0, 10.0], name: [10.0, value]}
    with pytest.raises(ValueError, match=rf"^`{name}\[1\]` must be a number above 0, got {value!r}"):
        processor.post_process_moment_retrieval(outputs(PROPOSALS, PROPOSALS), **arguments)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, tuple, lambda values: np.array(values, np.float32)])
def test_forms_of_durations(processor, make):
    expected = processor.post_process_moment_retrieval(outputs(PROPOSALS, PROPOSALS), [10.0, 20.0], [9.5, 18])
    found = processor.post_process_moment_retrieval(outputs(PROPOSALS, PROPOSALS), make([10.0, 20.0]), make([9.5, 18]))
    assert found == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["logits", "pred_spans", "saliency_scores"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_that_are_not_numbers(processor, name, value, dtype):
    """An empty list would hide that a model is damaged."""
    damaged = outputs(PROPOSALS, PROPOSALS, dtype=dtype)
    damaged.saliency_scores = torch.zeros(2, 7, dtype=dtype)
    assert len(processor.post_process_moment_retrieval(damaged, [100.0, 100.0])) == 2
    getattr(damaged, name)[1].flatten()[-1] = value
    with pytest.raises(ValueError, match=f"^sample 1: `{name}` .* NaN or infinity; are its weights damaged?"):
        processor.post_process_moment_retrieval(damaged, [100.0, 100.0])


@pytest.mark.parametrize(
    ("arguments", "given", "message"),
    [
        ([], {"text": "a dog", "videos": "a.mp4"}, "the processor takes no text, videos"),
        ([], {"text": ["a dog"], "videos": [np.zeros((4, 8, 8, 3))], "return_tensors": "pt"}, "takes no text, videos"),
        ([[video(4, 4)], [sentence(3)]], {"padding": True}, "the processor takes no padding"),
        (["a.mp4", "a dog"], {}, "`video_features` must be arrays, got 'a.mp4'"),
        ([["a.mp4"], ["a dog"]], {}, r"`video_features` must be arrays, got \['a.mp4'\]"),
        ([[video(4, 4)], ["a dog"]], {}, r"`text_features` must be arrays, got \['a dog'\]"),
        ([None, [sentence(3)]], {}, "`video_features` must be arrays, got None"),
    ],
)
def test_videos_and_sentences_are_not_features(processor, arguments, given, message):
    with pytest.raises(ValueError, match=f"{message}; pass features, as .* with pipeline\\('video-moment-retrieval'"):
        processor(*arguments, **given)


@pytest.mark.parametrize("duration", [30.1, 12.3, 99.9])
def test_end_is_never_after_the_duration(duration):
    outputs = DiffusionVMRMomentRetrievalOutput(logits=torch.zeros(1, 1, 2), pred_spans=torch.tensor([[[0.5, 1.0]]]))
    (moment,) = DiffusionVMRProcessor([12], 8).post_process_moment_retrieval(outputs, [duration])[0]
    assert moment["end"] <= duration
    with pytest.raises(ValueError, match=r"`covered_durations` must have one entry per sample \(1\), got 2"):
        DiffusionVMRProcessor([12], 8).post_process_moment_retrieval(outputs, [duration, duration])


def test_nothing_to_prepare():
    processor = DiffusionVMRProcessor([3], 2)
    with pytest.raises(ValueError, match="got no videos; at least one is required"):
        processor([], [])
    with pytest.raises(ValueError, match="features must be real numbers, got complex64"):
        processor.prepare_video([np.ones((4, 3), dtype=np.complex64)])
