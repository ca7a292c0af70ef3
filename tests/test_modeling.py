"""The model's interface. Formulas are written out again here, independently of the model's code."""

import math

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import set_seed

from modeling_diffusionvmr import DiffusionVMRForMomentRetrieval, DiffusionVMRModel, modeling_diffusionvmr
from modeling_diffusionvmr.diffusion import cosine_alphas_cumprod, fixed_noise, spans_to_signal
from modeling_diffusionvmr.loss_diffusionvmr import Targets, diffusionvmr_loss
from modeling_diffusionvmr.modeling_diffusionvmr import DiffusionVMRMemory, sine_embedding
from modeling_diffusionvmr.spans import iou_and_generalized_iou, keep_inside, span_to_window

CLIPS, TOKENS = (9, 6, 1), (5, 2, 4)
TERMS = ("class", "l1", "iou", "hinge", "contrastive")


@pytest.fixture
def make_model(tiny_config, device):
    def make(train=False, **changes) -> DiffusionVMRForMomentRetrieval:
        set_seed(2)  # with some seeds, the spans of random weights all end at the edges of the video
        return DiffusionVMRForMomentRetrieval(tiny_config(**changes)).to(device).train(train)

    return make


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.fixture
def inputs(device) -> dict:
    """Three pairs of different lengths, with nonzero values in the padding."""
    random = torch.Generator().manual_seed(1)
    return {
        "video_features": torch.randn(3, 9, 12, generator=random).to(device),
        "text_features": torch.randn(3, 5, 8, generator=random).to(device),
        "video_mask": (torch.arange(9) < torch.tensor(CLIPS)[:, None]).long().to(device),
        "text_mask": (torch.arange(5) < torch.tensor(TOKENS)[:, None]).long().to(device),
    }


@pytest.fixture
def labels(device) -> list:
    """Two windows, one window and none, with saliency pairs for the first two samples."""
    labels = [
        {
            "spans": torch.tensor([[0.25, 0.3], [0.7, 0.2]]),
            "saliency_pos": torch.tensor([1, 2]),
            "saliency_neg": torch.tensor([4, 8]),
        },
        {"spans": torch.tensor([[0.5, 0.4]]), "saliency_pos": torch.tensor([2]), "saliency_neg": torch.tensor([5])},
        {"spans": torch.zeros(0, 2)},
    ]
    return [{name: value.to(device) for name, value in label.items()} for label in labels]


@pytest.fixture
def negative(inputs) -> dict:
    """Sentences of other samples, with other lengths."""
    return {
        "negative_text_features": torch.nn.functional.pad(inputs["text_features"].roll(1, 0), (0, 0, 0, 2), value=3.0),
        "negative_text_mask": torch.nn.functional.pad(inputs["text_mask"].roll(1, 0), (0, 2)),
    }


def calls_of(module) -> list:
    """Return a list that grows by one element with each call of a module."""
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


# Outputs


def test_names_and_shapes(model, inputs, labels, negative):
    model.set_attn_implementation("eager")  # the only one that returns attentions
    output = model(**inputs, **negative, labels=labels, output_attentions=True, output_hidden_states=True)
    batch, clips, proposals, layers, heads, size = 3, 9, 5, 2, 4, 32
    length = clips + 7  # the negative sentence is the longest
    shapes = {
        "loss": (),
        "logits": (batch, proposals, 2),
        "pred_spans": (batch, proposals, 2),
        "saliency_scores": (batch, clips),
        "intermediate_logits": (batch, layers, proposals, 2),
        "intermediate_spans": (batch, layers + 1, proposals, 2),
        "encoder_last_hidden_state": (batch, length, size),
    }
    assert {name: tuple(output[name].shape) for name in shapes} == shapes
    assert set(output.loss_dict) == set(TERMS) and all(term.shape == () for term in output.loss_dict.values())
    shapes = {
        "encoder_hidden_states": [(batch, length, size)] * (layers + 1),
        "decoder_hidden_states": [(batch, proposals, size)] * (layers + 1),
        "encoder_attentions": [(batch, heads, length, length)] * layers,
        "decoder_attentions": [(batch, heads, proposals, proposals)] * layers,
    }
    assert {name: [tuple(value.shape) for value in output[name]] for name in shapes} == shapes
    close(output.logits, output.intermediate_logits[:, -1], 0)
    inside, last = (
        span_to_window(spans).clamp(0, 1) for spans in (output.pred_spans, output.intermediate_spans[:, -1])
    )
    close(inside, last, 1e-6)
    assert (output.pred_spans >= 0).all() and (output.pred_spans <= 1).all()

    names = ["logits", "pred_spans", "saliency_scores", "intermediate_logits", "intermediate_spans"]
    assert list(model(**inputs)) == [*names, "encoder_last_hidden_state"]
    assert isinstance(model(**inputs, return_dict=False), tuple)


def test_model_is_encode_then_denoise(tiny_config, device, inputs):
    set_seed(0)
    model = DiffusionVMRModel(tiny_config()).to(device).eval()
    noisy, timesteps = torch.randn(3, 4, 2, device=device), torch.tensor([3, 99, 50], device=device)
    output = model(**inputs, noisy_spans=noisy, timesteps=timesteps)
    memory = model.encode(**inputs)
    assert memory.video.shape == (3, 9, 32) and memory.text.shape == (3, 5, 32)
    decoded = model.denoise(memory, noisy, timesteps)
    for name in ("last_hidden_state", "intermediate_logits", "intermediate_spans"):
        close(output[name], decoded[name], 0)
    close(output.encoder_last_hidden_state, memory.last_hidden_state, 0)
    close(output.intermediate_spans[:, 0], (noisy.clamp(-2, 2) / 2 + 1) / 2, 1e-6)


def test_each_input_matters(model, inputs):
    model = model.model  # not clipped to the video: with random weights, clipped spans may all be equal
    base = model(**inputs)
    other_text = model(**{**inputs, "text_features": inputs["text_features"].roll(1, 0)})
    other_video = model(**{**inputs, "video_features": inputs["video_features"].flip(0)})
    noisy = model.schedule.initial_noise(5)[None]
    other_step = model(**inputs, noisy_spans=noisy, timesteps=torch.full((3,), 7, device=noisy.device))
    other_noise = model(**inputs, noisy_spans=noisy.flip(1) * 0.5)
    for output in (other_text, other_video, other_step, other_noise):
        for name in ("intermediate_logits", "intermediate_spans"):
            assert (output[name][:, -1] - base[name][:, -1]).abs().max() > 1e-3


def test_clip_positions_from_the_mask(model, inputs):
    seen = []
    model.model.video_projection.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(**inputs)
    assert seen[0].shape == (3, 9, 14)
    for row, clips in enumerate(CLIPS):
        wanted = [[index / clips, (index + 1) / clips] for index in range(clips)] + [[0, 0]] * (9 - clips)
        close(seen[0][row, :, 12:].cpu(), torch.tensor(wanted), 1e-6)
    # Without a mask, all clips are real
    model(inputs["video_features"][:, :4], inputs["text_features"])
    close(seen[1][0, :, 12:].cpu(), torch.tensor([[0, 0.25], [0.25, 0.5], [0.5, 0.75], [0.75, 1]]), 1e-6)


# Determinism


@pytest.mark.parametrize("steps", [1, 3])
def test_same_output_in_any_batch_and_padding(model, inputs, steps):
    together = model(**inputs, num_sampling_steps=steps)
    again = model(**inputs, num_sampling_steps=steps)
    close(together.pred_spans, again.pred_spans, 0)
    for row, (clips, tokens) in enumerate(zip(CLIPS, TOKENS)):
        video, text = inputs["video_features"][row : row + 1, :clips], inputs["text_features"][row : row + 1, :tokens]
        pad = torch.nn.functional.pad
        more = {
            "video_features": pad(video, (0, 0, 0, 30), value=50.0),
            "text_features": pad(text, (0, 0, 0, 11), value=-50.0),
            "video_mask": pad(torch.ones_like(video[..., 0]), (0, 30)).bool(),
            "text_mask": pad(torch.ones_like(text[..., 0]), (0, 11)),
        }
        for output in (model(video, text, num_sampling_steps=steps), model(**more, num_sampling_steps=steps)):
            for name in ("logits", "pred_spans", "intermediate_spans", "intermediate_logits"):
                close(output[name][0], together[name][row])
            close(output.saliency_scores[0, :clips], together.saliency_scores[row, :clips])
            assert (output.saliency_scores[0, clips:] == 0).all()


@pytest.mark.parametrize(("proposals", "steps"), [(1, 1), (3, 100), (40, 2), (1500, 3)])
def test_any_number_of_proposals_and_steps(model, inputs, proposals, steps):
    output = model(**inputs, num_proposals=proposals, num_sampling_steps=steps)
    assert output.pred_spans.shape == (3, proposals, 2)
    assert output.pred_spans.isfinite().all() and output.logits.isfinite().all()


def test_defaults_of_the_configuration_are_read_at_the_call(model, inputs):
    calls = calls_of(model.model.decoder)
    model.config.num_proposals, model.config.num_sampling_steps = 8, 4
    assert model(**inputs).pred_spans.shape[1] == 8
    assert len(calls) == 4


def test_starts_from_one_fixed_noise(model, make_model, inputs):
    starts = {n: model(**inputs, num_proposals=n).intermediate_spans[:, 0] for n in (3, 40, 1500)}
    close(starts[3], starts[40][:, :3], 0)
    close(starts[40], starts[1500][:, :40], 0)
    wanted = (fixed_noise(1500).clamp(-2, 2) / 2 + 1) / 2
    for row in starts[1500].cpu():
        close(row, wanted, 1e-6)
    torch.manual_seed(5)  # another model and another random state
    close(make_model(encoder_layers=1)(**inputs, num_proposals=40).intermediate_spans[:, 0], starts[40], 0)


def test_noise_of_the_caller(model, inputs):
    noisy = torch.randn(1, 4, 2, device=model.device)
    one = model(**inputs, noisy_spans=noisy)
    each = model(**inputs, noisy_spans=noisy.expand(3, -1, -1), timesteps=torch.full((3,), 99, device=model.device))
    close(one.pred_spans, each.pred_spans, 0)
    assert one.pred_spans.shape == (3, 4, 2)
    close(one.intermediate_spans[0, 0], (noisy[0].clamp(-2, 2) / 2 + 1) / 2, 1e-6)
    first = model(**inputs, noisy_spans=noisy, num_proposals=2)
    close(first.intermediate_spans[:, 0], one.intermediate_spans[:, 0, :2], 0)
    # Passing the default noise gives the default output
    close(model(**inputs, noisy_spans=fixed_noise(5)[None].to(model.device)).pred_spans, model(**inputs).pred_spans, 0)


# Sampling


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_sampler_is_ddim(model, inputs, steps):
    """DDIM with eta = 0, from T - 1 to the clean signal in equal steps, around the model's encoder and decoder."""
    output = model(**inputs, num_sampling_steps=steps)
    memory = model.model.encode(**inputs)
    alphas = cosine_alphas_cumprod(100).float()
    visited = [round(100 * (steps - index) / steps) - 1 for index in range(steps)]
    signal = fixed_noise(5).expand(3, -1, -1).to(model.device)
    for index, step in enumerate(visited):
        decoded = model.model.denoise(memory, signal, torch.full((3,), step, device=model.device))
        if index + 1 == steps:
            break
        clean = ((decoded.intermediate_spans[:, -1] * 2 - 1) * 2).clamp(-2, 2)
        now, after = alphas[step].item(), alphas[visited[index + 1]].item()
        noise = (signal - math.sqrt(now) * clean) / math.sqrt(1 - now)
        signal = math.sqrt(after) * clean + math.sqrt(1 - after) * noise
    close(output.intermediate_logits, decoded.intermediate_logits, 2e-5)
    noisy, refined = decoded.intermediate_spans[:, :1], decoded.intermediate_spans[:, 1:]
    close(output.intermediate_spans, torch.cat((noisy, keep_inside(refined, 0.0)), dim=1), 2e-5)


def test_sampler_starts_at_each_samples_own_step(model, inputs):
    noisy = torch.randn(3, 4, 2, device=model.device)
    timesteps = torch.tensor([99, 40, 1], device=model.device)
    together = model(**inputs, noisy_spans=noisy, timesteps=timesteps, num_sampling_steps=2)
    for row in range(3):
        part = {name: value[row : row + 1] for name, value in inputs.items()}
        alone = model(
            **part, noisy_spans=noisy[row : row + 1], timesteps=timesteps[row : row + 1], num_sampling_steps=2
        )
        close(alone.pred_spans[0], together.pred_spans[row])


def test_several_steps_encode_once(model, inputs, labels, negative):
    encoder, decoder = (calls_of(module) for module in (model.model.encoder, model.model.decoder))
    model(**inputs, num_sampling_steps=5)
    assert (len(encoder), len(decoder)) == (1, 5)
    model(**inputs, **negative, labels=labels, num_sampling_steps=5)
    assert (len(encoder), len(decoder)) == (2, 10)


# Modes


def test_training_draws_from_the_labels(make_model, inputs, labels, monkeypatch):
    model = make_model(train=True)
    calls = calls_of(model.model.decoder)
    seen = []
    model.model.decoder.register_forward_pre_hook(lambda _, a, kwargs: seen.append(kwargs), with_kwargs=True)
    for _ in range(2):
        output = model(**inputs, labels=labels)
    assert output.pred_spans.shape == (3, 6, 2)  # max_training_proposals
    assert len(calls) == 2  # one per call of the model
    assert model(**inputs, labels=labels, num_proposals=4, num_sampling_steps=9).pred_spans.shape == (3, 4, 2)
    assert len(calls) == 3
    assert (seen[0]["noisy_spans"] != seen[1]["noisy_spans"]).all()
    steps = torch.stack([model(**inputs, labels=labels) and seen[-1]["timesteps"] for _ in range(20)])
    assert steps.unique().numel() > 20 and steps.min() >= 0 and steps.max() < 100
    # With little noise, the drawn spans are near the true ones
    monkeypatch.setattr(
        torch, "randint", lambda high, size, **options: torch.zeros(size, dtype=torch.long, device=model.device)
    )
    start = model(**inputs, labels=labels).intermediate_spans[:, 0]
    close(start[1, 0].cpu(), torch.tensor([0.5, 0.4]), 0.1)


def test_training_with_draws(make_model, inputs, labels):
    model = make_model(train=True, dropout=0.0, input_dropout=0.0)
    calls = calls_of(model.model.decoder)
    noisy, timesteps = torch.randn(3, 6, 2, device=model.device), torch.tensor([5, 60, 99], device=model.device)
    draws = {"noisy_spans": noisy, "timesteps": timesteps}
    output = model(**inputs, **draws, labels=labels)
    assert len(calls) == 1
    decoded = model.model.denoise(model.model.encode(**inputs), noisy, timesteps)
    close(output.intermediate_spans[:, 1:], keep_inside(decoded.intermediate_spans[:, 1:], 0.0))
    fewer = model(**inputs, **draws, labels=labels, num_proposals=2)
    close(fewer.intermediate_spans[:, 0], output.intermediate_spans[:, 0, :2], 0)
    # The same noise for the whole batch
    one = model(**inputs, noisy_spans=noisy[:1], timesteps=timesteps, labels=labels)
    same = model(**inputs, noisy_spans=noisy[:1].expand(3, -1, -1), timesteps=timesteps, labels=labels)
    close(one.loss, same.loss, 1e-6)


def test_train_mode_without_labels_samples(make_model, inputs):
    model = make_model(train=True, dropout=0.0, input_dropout=0.0)
    calls = calls_of(model.model.decoder)
    output = model(**inputs, num_sampling_steps=3)
    assert len(calls) == 3
    assert output.loss is None and output.loss_dict is None
    close(output.pred_spans, model.eval()(**inputs, num_sampling_steps=3).pred_spans)


def test_eval_mode_with_labels_has_the_loss_of_the_last_step(model, inputs, labels, negative):
    output = model(**inputs, **negative, labels=labels, num_sampling_steps=3)
    raw = []  # the loss reads spans before they are clipped to the video
    model.model.decoder.register_forward_hook(lambda _, arguments, decoded: raw.append(decoded.intermediate_spans))
    plain = model(**inputs, num_sampling_steps=3)
    last = raw[-1][:, 1:]
    close(output.pred_spans, plain.pred_spans)
    close(output.logits, plain.logits)
    close(output.saliency_scores, plain.saliency_scores)
    with_negative = model(
        inputs["video_features"],
        negative["negative_text_features"],
        inputs["video_mask"],
        negative["negative_text_mask"],
    )
    loss, terms = diffusionvmr_loss(
        plain.intermediate_logits,
        last,
        plain.saliency_scores,
        Targets.from_labels(labels, model.device),
        inputs["video_mask"].bool(),
        model.config,
        with_negative.saliency_scores,
    )
    close(output.loss, loss, 1e-4)
    for name in TERMS:
        close(output.loss_dict[name], terms[name], 1e-4)
        assert terms[name] > 0


def test_terms_add_up_with_their_coefficients(make_model, inputs, labels, negative):
    coefficients = dict(zip(TERMS, (3.0, 0.5, 7.0, 11.0, 0.25)))
    model = make_model(**{f"{name}_loss_coefficient": value for name, value in coefficients.items()})
    output = model(**inputs, **negative, labels=labels)
    assert set(output.loss_dict) == set(TERMS)
    close(output.loss, sum(coefficients[name] * output.loss_dict[name] for name in TERMS), 1e-4)


def test_terms_without_their_inputs_are_zero(model, inputs, labels, negative):
    spans_only = [{"spans": label["spans"]} for label in labels]
    terms = model(**inputs, labels=spans_only).loss_dict
    assert terms["hinge"] == 0 and terms["contrastive"] == 0
    assert model(**inputs, labels=labels).loss_dict["hinge"] > 0
    assert model(**inputs, **negative, labels=spans_only).loss_dict["contrastive"] > 0


@pytest.mark.parametrize("train", [True, False])
def test_absent_term(make_model, inputs, labels, negative, device, train):
    """It equals the class term of the negative sentences alone, without windows. All other outputs stay the same."""
    options = {"train": train, "dropout": 0.0, "input_dropout": 0.0}
    start = {"noisy_spans": torch.randn(3, 4, 2, device=device), "timesteps": torch.tensor([3, 99, 50], device=device)}
    start |= {"num_sampling_steps": 2, "output_hidden_states": True}
    without = make_model(**options)(**inputs, **negative, **start, labels=labels)
    model = make_model(**options, absent_loss_coefficient=0.5)
    output = model(**inputs, **negative, **start, labels=labels)
    nothing = [{"spans": torch.zeros(0, 2, device=device)}] * 3
    pairs = (inputs["video_features"], negative["negative_text_features"])
    masks = (inputs["video_mask"], negative["negative_text_mask"])
    null = model(*pairs, *masks, **start, labels=nothing)

    assert set(without.loss_dict) == set(TERMS) and set(output.loss_dict) == {*TERMS, "absent"}
    close(output.loss_dict["absent"], null.loss_dict["class"])
    close(output.loss, without.loss + 0.5 * null.loss_dict["class"], 1e-4)
    assert list(output) == list(without)
    for name in ("pred_spans", "logits", "saliency_scores", "intermediate_spans", "encoder_last_hidden_state"):
        close(output[name], without[name])
    for name in ("encoder_hidden_states", "decoder_hidden_states"):
        for value, wanted in zip(output[name], without[name], strict=True):
            close(value, wanted)


def test_no_absent_term_without_negative_sentences_or_labels(make_model, inputs, labels, negative):
    model = make_model(absent_loss_coefficient=1)
    assert set(model(**inputs, labels=labels).loss_dict) == set(TERMS)
    seen = []
    model.model.decoder.register_forward_hook(lambda _, arguments, decoded: seen.append(len(decoded.last_hidden_state)))
    assert model(**inputs, **negative).loss_dict is None and seen == [3]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("proposals", [1, 2, 20])
def test_any_number_of_windows(make_model, inputs, device, train, proposals):
    model = make_model(train=train)
    counts = (0, 1, 7)
    labels = [{"spans": torch.rand(count, 2, device=device) * 0.5 + 0.25} for count in counts]
    output = model(**inputs, labels=labels, num_proposals=proposals)
    assert output.loss.isfinite() and output.loss_dict["l1"] > 0
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    nothing = model(**inputs, labels=[{"spans": torch.zeros(0, 2, device=device)}] * 3, num_proposals=proposals)
    assert nothing.loss_dict["l1"] == nothing.loss_dict["iou"] == 0
    close(nothing.loss, 4 * nothing.loss_dict["class"])
    nothing.loss.backward()


@pytest.mark.parametrize("absent", [0, 1])
def test_every_parameter_learns(make_model, inputs, labels, negative, absent):
    # Parameters without gradients would also stop distributed training
    model = make_model(train=True, absent_loss_coefficient=absent)
    model(**inputs, **negative, labels=labels).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    still = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0]
    # The softmax does not change if all keys shift by a constant, nor do differences of saliency scores
    assert [name for name in still if not name.endswith(("k_proj.bias", "saliency_head.bias"))] == []


def test_gradients_flow_in_every_mode(make_model, inputs, labels):
    for train, arguments in ((True, {"labels": labels}), (True, {}), (False, {"labels": labels}), (False, {})):
        model = make_model(train=train)
        video = inputs["video_features"].clone().requires_grad_(True)
        output = model(**{**inputs, "video_features": video}, **arguments, num_sampling_steps=2)
        for value in (output.pred_spans, output.logits, output.saliency_scores, output.loss):
            if value is None:
                continue
            (gradient,) = torch.autograd.grad(value.square().sum(), video, retain_graph=True)
            assert gradient.isfinite().all() and gradient.abs().sum() > 0
            assert (gradient[1, CLIPS[1] :] == 0).all()  # padding has no effect


@pytest.mark.parametrize("absent", [0, 1])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, inputs, labels, negative, absent):
    gradients, passes = [], []
    for checkpointing in (False, True):
        # With dropout, which the second pass must repeat
        model = make_model(train=True, absent_loss_coefficient=absent)
        if checkpointing:
            # The second name is the one of older versions of transformers
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        calls = [calls_of(layer.feed_forward) for layer in (model.model.encoder.layers[0], *model.model.decoder.layers)]
        set_seed(3)
        model(**inputs, **negative, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        passes.append([len(counted) for counted in calls])
    assert passes == [[1, 1, 1], [2, 2, 2]]
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient, 1e-6)


# Precision


def windows_in_video(output) -> torch.Tensor:
    return span_to_window(output.pred_spans).clamp(0, 1)


def check_low_precision(output, exact, tolerance):
    for name in ("pred_spans", "intermediate_spans"):
        assert output[name].dtype == torch.float32
    close(windows_in_video(output), windows_in_video(exact), tolerance)
    # Spans are finer than the dtype of the features, except where they were clipped to the video
    spans = output.intermediate_spans[:, 1:].flatten(0, -2)
    spans = spans[((span_to_window(spans) > 0) & (span_to_window(spans) < 1)).all(-1)]
    assert len(spans) > 3 and (spans != spans.to(torch.bfloat16).float()).any(-1).float().mean() > 0.9


@pytest.mark.parametrize(("context", "seen"), [(1.0, {3, 4, 5, 6}), (2, set(range(2, 8))), (3.0, set(range(1, 9)))])
def test_a_proposal_reads_its_span_and_its_surroundings(make_model, device, context, seen):
    model = make_model(roi_context=context, decoder_layers=1).model
    memory = DiffusionVMRMemory(
        video=torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0)).to(device),
        video_mask=torch.ones(1, 10, dtype=torch.bool, device=device),
    )
    # Clips 4 and 5, and their neighbors by interpolation
    spans = torch.tensor([[[0.5, 0.2]]], device=device)
    arguments = (spans_to_signal(spans, model.config.signal_scale), torch.tensor([50], device=device))
    base = model.denoise(memory, *arguments).intermediate_logits
    matter = set()
    for clip in range(10):
        video = memory.video.clone()
        video[:, clip] = 0
        changed = model.denoise(DiffusionVMRMemory(video=video, video_mask=memory.video_mask), *arguments)
        if (changed.intermediate_logits - base).abs().max() > 1e-5:
            matter.add(clip)
    assert matter == seen


def test_proposals_know_their_position(model, device):
    """Each half of the video has equal clips, so moving a proposal within its half changes only its position."""
    halves = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0)).to(device).repeat_interleave(10, dim=1)
    memory = DiffusionVMRMemory(video=halves, video_mask=torch.ones(1, 20, dtype=torch.bool, device=device))
    timesteps = torch.tensor([50], device=device)

    def logits_of_the_second(first: list[float]) -> torch.Tensor:
        noisy = spans_to_signal(torch.tensor([[first, [0.75, 0.2]]], device=device), 2.0)
        return model.model.denoise(memory, noisy, timesteps).intermediate_logits[0, 0, 1]

    base = logits_of_the_second([0.25, 0.1])
    for other in ([0.2, 0.1], [0.25, 0.2]):
        assert (logits_of_the_second(other) - base).abs().max() > 1e-4


@pytest.fixture
def roi_calls(monkeypatch) -> list:
    """Record the arguments of each call of `roi_align`."""
    calls, roi_align = [], modeling_diffusionvmr.roi_align
    monkeypatch.setattr(
        modeling_diffusionvmr, "roi_align", lambda *arguments: calls.append(arguments) or roi_align(*arguments)
    )
    return calls


def test_pooled_feature_covers_the_span_only(make_model, inputs, roi_calls):
    model = make_model(roi_context=3)
    model(**inputs)
    for surrounded, _, _, edges in roi_calls:
        assert edges.tolist() == [-0.5, 0.5, -1.5, -0.75, 0, 0.75, 1.5]
        assert torch.equal(surrounded[:, -1], model.model.decoder.beyond_video.expand(len(surrounded), -1))
    assert len(roi_calls) == 2


def test_no_span_is_read_narrower_than_a_clip(make_model, inputs, roi_calls):
    model = make_model()
    signal = torch.tensor([0.0, -model.config.signal_scale]).expand(1, 3, 2)  # in the middle, of width 0
    model(**inputs, noisy_spans=signal)
    _, num_clips, spans, _ = roi_calls[0]
    torch.testing.assert_close(spans[..., 1], (1 / num_clips[:, None]).expand(-1, 3))


def test_sine_embedding():
    positions = torch.tensor([[0.0, 1.5], [6.28, 999.0]])
    angles = positions.double()[..., None] * 10000.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    embedded = sine_embedding(positions, 10)
    assert embedded.dtype == torch.float32
    for start, expected in enumerate((angles.sin(), angles.cos())):
        torch.testing.assert_close(embedded[..., start::2].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype, absent", [(torch.bfloat16, 0), (torch.float16, 0), (torch.bfloat16, 1)])
def test_autocast(make_model, inputs, labels, negative, device, roi_calls, dtype, absent):
    model = make_model(absent_loss_coefficient=absent)
    exact = model(**inputs, **negative, labels=labels, num_sampling_steps=3)
    roi_calls.clear()
    with torch.autocast(device.type, dtype):
        output = model(**inputs, **negative, labels=labels, num_sampling_steps=3)
    check_low_precision(output, exact, 0.06)
    assert all(spans.dtype == torch.float32 for _, _, spans, *_ in roi_calls) and len(roi_calls) == 6
    assert output.loss.dtype == torch.float32
    close(output.loss, exact.loss, 0.2)
    model.train()
    with torch.autocast(device.type, dtype):
        loss = model(**inputs, **negative, labels=labels).loss
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_whole_model_in_bfloat16(make_model, inputs, labels, negative, roi_calls):
    model = make_model()
    exact = model(**inputs, num_sampling_steps=3)
    alphas = model.model.schedule.alphas_cumprod.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    for name, table in model.model.schedule.named_buffers():
        assert table.dtype == torch.float32, name
    close(model.model.schedule.alphas_cumprod, alphas, 0)
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    roi_calls.clear()
    output = model(**half, num_sampling_steps=3)
    check_low_precision(output, exact, 0.06)
    assert all(spans.dtype == torch.float32 for _, _, spans, *_ in roi_calls) and len(roi_calls) == 6
    assert output.logits.dtype == torch.bfloat16
    # The loss equals the float32 loss of these outputs
    raw = []
    model.model.decoder.register_forward_hook(lambda _, arguments, decoded: raw.append(decoded.intermediate_spans))
    output = model(**half, labels=labels)
    wanted, _ = diffusionvmr_loss(
        output.intermediate_logits.float(),
        raw[-1][:, 1:],
        output.saliency_scores.float(),
        Targets.from_labels(labels, model.device),
        inputs["video_mask"].bool(),
        model.config,
    )
    close(output.loss, wanted)
    negative["negative_text_features"] = negative["negative_text_features"].bfloat16()
    loss = model.train()(**half, **negative, labels=labels).loss
    assert loss.dtype == torch.float32
    loss.backward()


def test_loaded_in_bfloat16(model, inputs, tmp_path, device):
    model.save_pretrained(tmp_path)
    exact = model(**inputs)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.06)):
        loaded = DiffusionVMRForMomentRetrieval.from_pretrained(tmp_path, dtype=dtype).to(device)
        assert loaded.dtype == dtype and not loaded.training
        for name, table in model.model.schedule.named_buffers():
            close(loaded.model.schedule.get_buffer(name), table, 0)
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        close(windows_in_video(loaded(**given)), windows_in_video(exact), tolerance)


@torch.no_grad()
def test_compiled_in_one_graph(make_model, inputs):
    # Slow, even without code generation. One layer of each kind is enough to trace
    model = make_model(encoder_layers=1, decoder_layers=1)
    eager = model(**inputs, num_sampling_steps=2)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, num_sampling_steps=2)
    for name in ("pred_spans", "logits", "saliency_scores"):
        close(compiled[name], eager[name])


def test_no_recompilation_for_shapes_of_labels(make_model, inputs):
    """Labels may have any number of windows and of pairs. The noise is given, as in training with the trainer."""
    model = make_model(train=True, encoder_layers=1, decoder_layers=1)
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(model, backend="eager")
    start = {
        "noisy_spans": torch.zeros(3, 6, 2, device=model.device),
        "timesteps": torch.arange(3, device=model.device),
    }
    graphs = []
    for num_windows, num_pairs in ((2, 3), (1, 0), (5, 1), (0, 4), (7, 2)):
        pairs = torch.zeros(num_pairs, dtype=torch.long, device=model.device)
        spans = torch.full((num_windows, 2), 0.4, device=model.device)
        label = {"spans": spans, "saliency_pos": pairs, "saliency_neg": pairs}
        compiled(**inputs, **start, labels=[label, {"spans": spans}, {"spans": spans[:1]}]).loss.backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == graphs[:1] * len(graphs)
    assert not counters["graph_break"]
    torch.compiler.reset()


# Errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video_features": torch.zeros(3, 9, 11)}, r"`video_features` must be \(B, Lv, Dv\) with 12 .*\(3, 9, 11\)"),
        ({"video_features": torch.zeros(9, 12)}, r"`video_features` must be .*\(9, 12\)"),
        ({"video_features": torch.zeros(3, 0, 12)}, r"`video_features` must be .*\(3, 0, 12\)"),
        ({"text_features": torch.zeros(3, 5, 12)}, r"`text_features` must be \(B, Lt, Dt\) with 8 .*\(3, 5, 12\)"),
        ({"text_features": torch.zeros(3, 0, 8)}, r"`text_features` must be .*\(3, 0, 8\)"),
        ({"text_features": torch.zeros(2, 5, 8), "text_mask": None}, "3 videos but 2 "),
        ({"video_mask": torch.ones(3, 8)}, r"`video_mask` must be \(3, 9\) like the features, got \(3, 8\)"),
        ({"text_mask": torch.ones(2, 5)}, r"`text_mask` must be \(3, 5\) like the features, got \(2, 5\)"),
        ({"noisy_spans": torch.zeros(2, 5, 2)}, r"`noisy_spans` must be \(3 or 1, N, 2\), got \(2, 5, 2\)"),
        ({"noisy_spans": torch.zeros(3, 5, 3)}, r"`noisy_spans` must be .*\(3, 5, 3\)"),
        ({"noisy_spans": torch.zeros(5, 2)}, r"`noisy_spans` must be .*\(5, 2\)"),
        ({"noisy_spans": torch.zeros(3, 0, 2)}, "`num_proposals` must be at least 1, got 0"),
        ({"noisy_spans": torch.zeros(3, 5, 2), "num_proposals": 6}, "`num_proposals` is 6, but .* 5 rows"),
        ({"timesteps": torch.zeros(2, dtype=torch.long)}, r"`timesteps` must be \(3,\), got \(2,\)"),
        ({"num_proposals": 0}, "`num_proposals` must be at least 1, got 0"),
        ({"num_proposals": -2}, "`num_proposals` must be at least 1, got -2"),
        ({"num_proposals": 2.5}, "`num_proposals` must be a whole number, got 2.5"),
        ({"num_proposals": "5"}, "`num_proposals` must be a whole number, got '5'"),
        ({"num_proposals": True}, "`num_proposals` must be a whole number, got True"),
        ({"num_sampling_steps": 2.5}, "`num_sampling_steps` must be a whole number, got 2.5"),
        ({"num_sampling_steps": True}, "`num_sampling_steps` must be a whole number, got True"),
        ({"num_sampling_steps": 0}, "`num_sampling_steps` must be .*1 to num_diffusion_steps=100, got 0"),
        ({"num_sampling_steps": 101}, "`num_sampling_steps` must be .*1 to num_diffusion_steps=100, got 101"),
        ({"labels": [{"spans": torch.zeros(0, 2)}] * 2}, "3 samples but 2 labels"),
        ({"negative_text_features": torch.zeros(3, 5, 9)}, r"negative_text_features.*\(3, 5, 9\)"),
        ({"negative_text_features": torch.zeros(2, 5, 8)}, "3 videos but 2 `negative_text_features`"),
        (
            {"negative_text_features": torch.zeros(3, 5, 8), "negative_text_mask": torch.ones(3, 4)},
            r"`negative_text_mask` must be \(3, 5\)",
        ),
        # A negative sentence does not hide an error in the others
        (
            {"negative_text_features": torch.zeros(3, 7, 8), "text_mask": torch.ones(3, 4)},
            r"`text_mask` must be \(3, 5\)",
        ),
    ],
)
def test_invalid_inputs(model, inputs, changes, message):
    changes = {n: v.to(model.device) if isinstance(v, torch.Tensor) else v for n, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_proposals": 0}, "`num_proposals` must be at least 1, got 0"),
        ({"num_proposals": -2}, "`num_proposals` must be at least 1, got -2"),
        ({"num_proposals": 2.5}, "`num_proposals` must be a whole number, got 2.5"),
        ({"noisy_spans": torch.zeros(3, 5, 2)}, "`noisy_spans` and `timesteps` must be given together"),
        ({"timesteps": torch.zeros(3, dtype=torch.long)}, "`noisy_spans` and `timesteps` must be given together"),
    ],
)
def test_invalid_draws(make_model, inputs, labels, changes, message):
    model = make_model(train=True)
    changes = {n: v.to(model.device) if isinstance(v, torch.Tensor) else v for n, v in changes.items()}
    with pytest.raises(ValueError, match=message):
        model(**inputs, labels=labels, **changes)


# Learning


def test_overfits_eight_samples(make_model, device):
    # Slow: trains for several seconds
    random = torch.Generator().manual_seed(0)
    text = torch.randn(8, 3, 8, generator=random)
    video = 0.3 * torch.randn(8, 20, 12, generator=random)
    first = torch.randint(0, 12, (8,), generator=random)
    length = torch.randint(3, 8, (8,), generator=random)
    clips = torch.arange(20)
    inside = (clips >= first[:, None]) & (clips < (first + length)[:, None])
    video[..., :8] += inside[..., None] * text.mean(1, keepdim=True) * 2
    truth = torch.stack(((first + length / 2) / 20, length / 20), dim=-1)
    # Several noise samples per window and batch: a larger batch is almost free at this size
    truth = truth.repeat(4, 1).to(device)
    inputs = {
        "video_features": video.repeat(4, 1, 1).to(device),
        "text_features": text.repeat(4, 1, 1).to(device),
        "labels": [{"spans": span[None]} for span in truth],
    }

    model = make_model(train=True, dropout=0.0, input_dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=250)
    start = model.eval()(**inputs).loss.item()
    model.train()
    for _ in range(250):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    output = model.eval()(**inputs)
    best = output.logits.softmax(-1)[..., 0].argmax(1)
    iou, _ = iou_and_generalized_iou(output.pred_spans[torch.arange(32, device=device), best], truth)
    assert output.loss < start / 3, (start, output.loss)
    assert iou.mean() > 0.8, iou
