"""How the work grows with the inputs. Operators and operations are counted, since times depend on the machine."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from modeling_diffusionvmr import DiffusionVMRConfig, DiffusionVMRForMomentRetrieval, DiffusionVMRProcessor
from modeling_diffusionvmr.loss_diffusionvmr import Targets
from modeling_diffusionvmr.training.prediction import predict_for_settings, predict_moments
from modeling_diffusionvmr.windows import plan_windows, search
from operator_counter import OperatorCounter
from small_training import make_dataset

CLIPS, TOKENS = 20, 6


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return DiffusionVMRForMomentRetrieval(tiny_config()).eval()


def features(size: int, clips: int = CLIPS, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(size)
    return {
        "video_features": torch.randn(size, clips, 12, generator=rng),
        "text_features": torch.randn(size, tokens, 8, generator=rng),
    }


@torch.inference_mode()
def retrieval(model, inputs, **options) -> OperatorCounter:
    """Return the counts of one call in eval mode."""
    with OperatorCounter() as counter:
        model(**inputs, **options)
    return counter


def training_step(model, size: int, num_windows: int, num_proposals: int) -> OperatorCounter:
    """Return the counts of forward, loss and backward, of samples with 0 to `num_windows` windows."""
    rng = torch.Generator().manual_seed(size)
    spans = torch.rand(size, num_windows, 2, generator=rng) / 2 + 0.1
    labels = Targets.from_labels([{"spans": own[: index % (num_windows + 1)]} for index, own in enumerate(spans)])
    negative = torch.randn(size, 5, 8, generator=rng)
    model.train()
    with OperatorCounter() as counter:
        inputs = features(size) | {"negative_text_features": negative, "num_proposals": num_proposals}
        model(**inputs, labels=labels).loss.backward()
    model.zero_grad()
    model.eval()
    return counter


def calls_of(module) -> list[int]:
    """Return a list that grows by the batch size with each call of a module."""
    calls: list[int] = []
    module.register_forward_hook(lambda _, inputs, output: calls.append(len(output[0])))
    return calls


# Proposals, sentences and steps


def test_cost_is_linear_in_proposals(model):
    """Except self-attention: per layer 2 N^2 products of D numbers, each an addition and a multiplication."""
    config, inputs = model.config, features(1)
    counted = {number: retrieval(model, inputs, num_proposals=number) for number in (2, 10, 100, 1000)}
    linear = {
        number: counter.flops - 2 * 2 * number**2 * config.d_model * config.decoder_layers
        for number, counter in counted.items()
    }
    slope = (linear[10] - linear[2]) // 8
    assert slope > 0
    for number in (100, 1000):
        assert linear[number] == linear[2] + (number - 2) * slope
    assert counted[2].calls == counted[10].calls == counted[100].calls == counted[1000].calls


@torch.inference_mode()
def test_proposals_attend_to_each_other_at_little_cost():
    """In the paper's configuration, the quadratic part is less than an eighth of the work for 1,000 proposals."""
    config, num_proposals = DiffusionVMRConfig(), 1000
    with torch.device("meta"), OperatorCounter() as counter:  # shapes alone
        model = DiffusionVMRForMomentRetrieval(config).eval()
        video = torch.empty(1, config.max_clips, config.video_feature_size)
        model(video, torch.empty(1, config.max_tokens, config.text_feature_size), num_proposals=num_proposals)
    quadratic = 2 * 2 * num_proposals**2 * config.d_model * config.decoder_layers
    assert 0 < quadratic < counter.flops / 8


def test_cost_is_linear_in_sentences(model):
    counted = {size: retrieval(model, features(size)) for size in (2, 7, 40)}
    for size, counter in counted.items():
        assert counter.flops == size * retrieval(model, features(1)).flops
        assert counter.calls == counted[2].calls


@torch.inference_mode()
def test_steps_repeat_the_decoder_only(model):
    inputs = features(3)
    with OperatorCounter() as encoder:
        memory = model.model.encode(**inputs)
    with OperatorCounter() as decoder:
        model.model.denoise(memory, *model.model.starting_point(3, None, None, None))
    with OperatorCounter() as saliency:
        model.saliency_head(memory.video)
    for steps in (1, 2, 5):
        wanted = encoder.flops + saliency.flops + steps * decoder.flops
        assert retrieval(model, inputs, num_sampling_steps=steps).flops == wanted


def test_steps_and_proposals_are_searched_without_encoding_again(model):
    dataset = make_dataset(None, num_rows=7)
    settings = [(5, 1), (12, 2), (None, None)]
    expected = [predict_moments(model, dataset, 3, *setting, progress=False) for setting in settings]
    encoded, decoded = calls_of(model.model.encoder), calls_of(model.model.decoder)
    found = predict_for_settings(model, dataset, settings, batch_size=3, progress=False)
    assert len(encoded) == 3 and len(decoded) == 3 * (1 + 2 + 1)
    assert found == expected and len({len(rows[0]["pred_relevant_windows"]) for rows in found}) == 2


@pytest.mark.parametrize("count", [2, 40])
def test_a_video_is_projected_once_for_all_its_sentences(model, count):
    rng = np.random.default_rng(0)
    processor = DiffusionVMRProcessor([12], 8, max_clips=CLIPS, max_tokens=10)
    texts, mask = processor.pad([processor.prepare_text(rng.normal(size=(TOKENS, 8))) for _ in range(count)])
    arrays, plan = [rng.normal(size=(CLIPS, 12)).astype("f4")], plan_windows(CLIPS, CLIPS)
    video = torch.zeros(1, CLIPS, 12)
    with torch.inference_mode():
        with OperatorCounter() as projection:
            model.model.project_video(video, torch.ones(1, CLIPS, dtype=torch.bool))
        with OperatorCounter() as together:
            findings = search(model, processor, arrays, texts, mask, plan)
        with OperatorCounter() as alone:
            single = [search(model, processor, arrays, texts[[i]], mask[[i]], plan)[0] for i in range(count)]
    batches = -(-count // 32)
    assert alone.flops - together.flops == (count - batches) * projection.flops > 0
    for one, other in zip(findings, single):
        torch.testing.assert_close(one.pred_spans, other.pred_spans, atol=1e-5, rtol=0)


def test_one_video_with_negative_sentences(model):
    """One video for all sentences gives the loss of as many copies of it."""
    inputs, labels = features(3), [{"spans": torch.tensor([[0.5, 0.2]])}] * 3
    inputs |= {"negative_text_features": inputs["text_features"].flip(0), "labels": labels}
    inputs["video_features"] = inputs["video_features"][:1]
    copies = {**inputs, "video_features": inputs["video_features"].repeat(3, 1, 1)}
    with torch.inference_mode():
        assert model(**inputs).loss.item() == pytest.approx(model(**copies).loss.item(), rel=1e-6)


# Training


def test_a_training_step_has_no_loop_over_samples_windows_or_proposals(model):
    reference = training_step(model, 2, 1, 3)
    for size, num_windows, num_proposals in ((2, 1, 50), (2, 5, 3), (16, 1, 3), (16, 5, 50)):
        assert training_step(model, size, num_windows, num_proposals).calls == reference.calls
    assert training_step(model, 4, 1, 3).flops == 2 * reference.flops


# Compilation


def test_no_shape_and_no_number_of_steps_is_compiled_again(tiny_config):
    """Each function needs one graph for the first shapes, one for all others, and at most one more."""
    model = DiffusionVMRForMomentRetrieval(tiny_config(encoder_layers=1, decoder_layers=1)).eval()
    compiled = torch.compile(model, backend="eager")
    torch._dynamo.reset()
    counters.clear()
    shapes = [(2, 20, 6, 5, 1), (3, 15, 5, 9, 2), (7, 11, 9, 20, 3), (40, 9, 3, 100, 1), (5, 8, 4, 17, 5)]
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for size, clips, tokens, num_proposals, steps in shapes:
            inputs = features(size, clips, tokens) | {"num_proposals": num_proposals, "num_sampling_steps": steps}
            torch.testing.assert_close(compiled(**inputs).pred_spans, model(**inputs).pred_spans)
            graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert not counters["graph_break"] and 0 < graphs <= 20
