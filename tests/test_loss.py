"""Matching is compared with all assignments, and every term with numbers computed independently."""

import itertools
import math

import numpy as np
import pytest
import torch

from modeling_diffusionvmr import DiffusionVMRConfig
from modeling_diffusionvmr.loss_diffusionvmr import (
    Targets,
    absent_loss,
    contrastive_loss,
    detection_losses,
    diffusionvmr_loss,
    hinge_loss,
    match,
    matching_cost,
)

CONFIG = DiffusionVMRConfig()


def best_by_trying_all(cost: np.ndarray) -> tuple[float, set[tuple[int, int]]]:
    """The lowest cost of assigning as many windows (columns) to proposals (rows) as possible, and the pairs."""
    num_proposals, num_windows = cost.shape
    size = min(cost.shape)
    best = (math.inf, set())
    for windows in itertools.combinations(range(num_windows), size):
        for proposals in itertools.permutations(range(num_proposals), size):
            pairs = set(zip(proposals, windows, strict=True))
            best = min(best, (sum(cost[pair] for pair in pairs), pairs), key=lambda candidate: candidate[0])
    return best


@pytest.mark.parametrize(
    ("num_proposals", "counts"),
    [(4, (2, 3, 1)), (4, (4, 0, 2)), (3, (5, 1, 0, 3)), (1, (3, 1)), (2, (0, 0)), (5, (0, 2))],
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_matching_is_the_best_of_all(num_proposals, counts, scale):
    rng = np.random.default_rng(0)
    for _ in range(5):
        # Costs below and above 0, and problems of very different costs
        cost = scale * rng.normal(size=(len(counts), num_proposals, max(counts)))
        cost += 10 * scale * rng.normal(size=(len(counts), 1, 1))
        problem, proposal, window = match(cost, np.array(counts))
        for index, count in enumerate(counts):
            pairs = set(zip(proposal[problem == index].tolist(), window[problem == index].tolist(), strict=True))
            assert len(pairs) == (problem == index).sum() == min(count, num_proposals)
            total, best = best_by_trying_all(cost[index, :, :count])
            assert sum(cost[index][pair] for pair in pairs) == pytest.approx(total, rel=1e-9, abs=1e-9 * scale)
            assert pairs == best


def test_matching_of_equal_costs_is_complete():
    problem, proposal, window = match(np.zeros((2, 4, 3)), np.array([3, 3]))
    for index in range(2):
        assert len(set(proposal[problem == index])) == 3 and set(window[problem == index]) == {0, 1, 2}


def make_labels(counts: list[int], pairs: list[int] | None = None, num_clips: int = 6, seed: int = 0) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for index, count in enumerate(counts):
        width = 0.1 + 0.4 * torch.rand(count, generator=generator)
        center = width / 2 + (1 - width) * torch.rand(count, generator=generator)
        label = {"spans": torch.stack((center, width), dim=-1)}
        if pairs is not None:
            for name in ("saliency_pos", "saliency_neg"):
                label[name] = torch.randint(num_clips, (pairs[index],), generator=generator)
        labels.append(label)
    return labels


def make_predictions(batch: int, layers: int, num_proposals: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, layers, num_proposals, 2, generator=generator)
    width = 0.05 + 0.5 * torch.rand(batch, layers, num_proposals, generator=generator)
    center = torch.rand(batch, layers, num_proposals, generator=generator)
    return logits, torch.stack((center, width), dim=-1)


def iou_of_windows(span, other) -> tuple[float, float]:
    (start, end), (other_start, other_end) = ((c - w / 2, c + w / 2) for c, w in (span, other))
    intersection = max(0.0, min(end, other_end) - max(start, other_start))
    union = end - start + other_end - other_start - intersection
    hull = max(end, other_end) - min(start, other_start)
    return intersection / union, intersection / union - (hull - union) / hull


def detection_by_hand(logits, spans, windows, config) -> dict[str, float]:
    """One layer of one sample: logits (N, 2), spans (N, 2), windows (n, 2), as Python numbers."""
    probability = [math.exp(f) / (math.exp(f) + math.exp(b)) for f, b in logits]
    cost = np.zeros((len(spans), len(windows)))
    for i, span in enumerate(spans):
        for j, window in enumerate(windows):
            distance = (abs(span[0] - window[0]) + abs(span[1] - window[1])) / 2
            overlap = iou_of_windows(span, window)[1]
            cost[i, j] = config.l1_loss_coefficient * distance
            cost[i, j] += config.iou_loss_coefficient * (1 - overlap) - probability[i]
    _, pairs = best_by_trying_all(cost)
    matched = {proposal for proposal, _ in pairs}
    entropy = [
        -math.log(p) if i in matched else -config.background_coefficient * math.log(1 - p)
        for i, p in enumerate(probability)
    ]
    distances = [np.abs(np.subtract(spans[i], windows[j])).mean() for i, j in pairs]
    overlaps = [1 - iou_of_windows(spans[i], windows[j])[1] for i, j in pairs]
    return {
        "class": sum(entropy) / (len(matched) + config.background_coefficient * (len(spans) - len(matched))),
        "l1": sum(distances) / max(len(pairs), 1),
        "iou": sum(overlaps) / max(len(pairs), 1),
    }


@pytest.mark.parametrize(("num_proposals", "counts"), [(4, [2, 1]), (4, [0, 3, 1]), (2, [4, 1, 0]), (3, [0])])
def test_detection_terms(num_proposals, counts):
    labels = make_labels(counts)
    logits, spans = make_predictions(len(counts), 2, num_proposals)
    result = detection_losses(logits, spans, Targets.from_labels(labels, "cpu"), CONFIG)
    expected = dict.fromkeys(("class", "l1", "iou"), 0.0)
    for sample, label in enumerate(labels):
        for layer in range(2):
            arguments = (values[sample, layer].tolist() for values in (logits, spans))
            for name, value in detection_by_hand(*arguments, label["spans"].tolist(), CONFIG).items():
                expected[name] += value / len(counts)  # summed over layers, averaged over samples
    assert {name: value.item() for name, value in result.items()} == pytest.approx(expected, rel=1e-5)


def test_background_that_does_not_count():
    """A sample without windows then has no class loss, and a gradient of 0."""
    logits, spans = make_predictions(1, 2, 3)
    config = DiffusionVMRConfig(background_coefficient=0)
    targets = Targets.from_labels([{"spans": torch.zeros(0, 2)}], "cpu")
    loss = detection_losses(logits.requires_grad_(), spans, targets, config)["class"]
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(4 * loss, logits)
    assert (gradient == 0).all()


def test_detection_terms_by_hand():
    """Two proposals and one window (0.2 to 0.6), small enough to follow."""
    labels = [{"spans": torch.tensor([[0.4, 0.4]])}]
    logits = torch.tensor([[[[0.0, 0.0], [math.log(3.0), 0.0]]]])  # foreground: 1/2 and 3/4
    spans = torch.tensor([[[[0.5, 0.4], [0.8, 0.2]]]])  # 0.3 to 0.7, and 0.7 to 0.9
    targets = Targets.from_labels(labels, "cpu")
    # Overlap 0.3 of 0.5; and none, with a gap of 0.1 in a hull of 0.7
    cost = matching_cost(logits, spans, targets, 10.0, 2.0)
    expected = torch.tensor([[[[10 * 0.05 - 2 * 0.6 - 0.5], [10 * 0.3 + 2 * 0.1 / 0.7 - 0.75]]]])
    torch.testing.assert_close(cost, expected)
    terms = detection_losses(logits, spans, targets, CONFIG)
    assert terms["l1"].item() == pytest.approx(0.05)
    assert terms["iou"].item() == pytest.approx(1 - 0.6)
    assert terms["class"].item() == pytest.approx((math.log(2) + 0.1 * math.log(4)) / 1.1)


def test_a_model_that_diverged_has_a_loss_of_nan():
    logits, spans = make_predictions(2, 2, 4)
    terms = detection_losses(logits * math.nan, spans, Targets.from_labels(make_labels([2, 1])), CONFIG)
    assert terms["class"].isnan() and terms["l1"].isfinite()


def test_hinge_by_hand():
    scores = torch.tensor([[1.0, 0.5, 0.9, 0.0], [0.0, 2.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    labels = [
        # 0.2 + 0.5 - 1 is below 0; 0.2 + 0.9 - 1 = 0.1; 0.2 + 1 - 0.5 = 0.7
        {"spans": torch.zeros(0, 2), "saliency_pos": torch.tensor([0, 0, 1]), "saliency_neg": torch.tensor([1, 2, 0])},
        {"spans": torch.zeros(0, 2), "saliency_pos": torch.tensor([2]), "saliency_neg": torch.tensor([1])},  # 2.2
        {"spans": torch.zeros(0, 2)},
    ]
    loss = hinge_loss(scores, Targets.from_labels(labels, "cpu"), margin=0.2)
    assert loss.item() == pytest.approx((0.8 / 3 + 2.2 + 0) / 3)
    assert hinge_loss(scores, Targets.from_labels(labels[2:] * 3, "cpu"), margin=0.2).item() == 0


def test_contrastive_by_hand():
    # Clips centered at 1/8, 3/8, 5/8, 7/8; the moment from 0.25 to 0.75 holds the middle two. The second video has two
    # clips, and its moment the first; the third sample has no moment
    labels = [{"spans": torch.tensor([row])} for row in ([0.5, 0.5], [0.25, 0.5])] + [{"spans": torch.zeros(0, 2)}]
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    scores = torch.tensor([[9.0, 1.0, 2.0, 9.0], [0.5, 7.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    negative = torch.tensor([[0.0, 0.5, 1.0, 0.0], [1.5, -1.0, 50.0, 50.0], [1.0, 1.0, 1.0, 1.0]])
    loss = contrastive_loss(scores, negative, Targets.from_labels(labels, "cpu"), mask)

    def entropy(score, against):
        return -math.log(math.exp(score) / (math.exp(score) + sum(math.exp(other) for other in against)))

    first = (entropy(1.0, [0.0, 0.5, 1.0, 0.0]) + entropy(2.0, [0.0, 0.5, 1.0, 0.0])) / 2
    second = entropy(0.5, [1.5, -1.0])
    assert loss.item() == pytest.approx((first + second + 0) / 3)


def everything(batch_labels, logits, spans, scores, negative, mask, config=CONFIG):
    targets = Targets.from_labels(batch_labels, "cpu")
    return diffusionvmr_loss(logits, spans, scores, targets, mask, config, negative)


def make_batch():
    counts, pairs = [2, 0, 5, 1], [3, 0, 1, 2]
    labels = make_labels(counts, pairs)
    del labels[1]["saliency_pos"], labels[1]["saliency_neg"]
    logits, spans = make_predictions(4, 2, 3)
    generator = torch.Generator().manual_seed(2)
    scores, negative = torch.randn(2, 4, 6, generator=generator)
    mask = (torch.arange(6) < torch.tensor([6, 6, 6, 6])[:, None]).long()
    mask[3, 4:] = 0
    labels[3]["saliency_pos"], labels[3]["saliency_neg"] = torch.tensor([0, 3]), torch.tensor([2, 1])
    return labels, logits, spans, scores, negative, mask


def test_the_total_is_the_weighted_sum():
    config = DiffusionVMRConfig(
        l1_loss_coefficient=3,
        iou_loss_coefficient=5,
        class_loss_coefficient=7,
        hinge_loss_coefficient=11,
        contrastive_loss_coefficient=13,
    )
    total, terms = everything(*make_batch(), config)
    weights = {"l1": 3, "iou": 5, "class": 7, "hinge": 11, "contrastive": 13}
    assert terms.keys() == weights.keys() and all(term.item() > 0 for term in terms.values())
    assert total.item() == pytest.approx(sum(weights[name] * term.item() for name, term in terms.items()), rel=1e-5)


def test_absent_by_hand():
    """One layer: proposals with foreground 1/2 and 3/4 in the first sample, 1/2 and 1/2 in the second."""
    logits = torch.tensor([[[[0.0, 0.0], [math.log(3.0), 0.0]]], [[[1.0, 1.0], [0.0, 0.0]]]])
    expected = ((math.log(2) + math.log(4)) / 2 + math.log(2)) / 2
    assert absent_loss(logits).item() == pytest.approx(expected)
    assert absent_loss(torch.cat((logits, logits), dim=1)).item() == pytest.approx(2 * expected)  # two layers


def test_absent_in_the_total():
    config = DiffusionVMRConfig(absent_loss_coefficient=3)
    labels, logits, spans, scores, negative, mask = make_batch()
    targets = Targets.from_labels(labels, "cpu")
    other_logits, _ = make_predictions(4, 2, 3, seed=5)
    without, _ = diffusionvmr_loss(logits, spans, scores, targets, mask, config, negative)
    total, terms = diffusionvmr_loss(logits, spans, scores, targets, mask, config, negative, other_logits.bfloat16())
    assert terms["absent"].dtype == torch.float32
    assert terms["absent"].item() == pytest.approx(absent_loss(other_logits.bfloat16().float()).item())
    assert total.item() == pytest.approx(without.item() + 3 * terms["absent"].item(), rel=1e-6)


def test_a_sample_weighs_the_same_in_any_batch():
    labels, *tensors = make_batch()
    together = everything(labels, *tensors)
    alone = [everything(labels[i : i + 1], *(tensor[i : i + 1] for tensor in tensors)) for i in range(4)]
    assert together[0].item() == pytest.approx(np.mean([total.item() for total, _ in alone]), rel=1e-5)
    for name, term in together[1].items():
        assert term.item() == pytest.approx(np.mean([terms[name].item() for _, terms in alone]), rel=1e-5), name
    order = [2, 0, 3, 1]
    shuffled = everything([labels[i] for i in order], *(tensor[order] for tensor in tensors))
    assert shuffled[0].item() == pytest.approx(together[0].item(), rel=1e-5)


def test_padding_has_no_part_in_it():
    labels, logits, spans, scores, negative, mask = make_batch()
    result = everything(labels, logits, spans, scores, negative, mask)
    longer = [
        torch.nn.functional.pad(tensor, (0, 3), value=value) for tensor, value in ((scores, 9.0), (negative, 9.0))
    ]
    padded = everything(labels, logits, spans, *longer, torch.nn.functional.pad(mask, (0, 3)))
    assert padded[0].item() == pytest.approx(result[0].item(), rel=1e-6)


def test_without_negative_text_pairs_or_windows():
    labels, logits, spans, scores, _, mask = make_batch()
    empty = [{"spans": torch.zeros(0, 2)}] * 4
    total, terms = everything(
        empty, logits.requires_grad_(), spans.requires_grad_(), scores.requires_grad_(), None, mask
    )
    assert all(terms[name].item() == 0 for name in ("l1", "iou", "hinge", "contrastive"))
    # All is background
    expected = -logits.log_softmax(-1)[..., 1].mean((0, 2)).sum()
    torch.testing.assert_close(terms["class"], expected)
    # Every output keeps a gradient, even if it is 0: distributed training would wait for it
    for gradient in torch.autograd.grad(total, (logits, spans, scores)):
        assert gradient.isfinite().all()
    _, terms = everything(labels, logits, spans, scores, None, mask)
    assert terms["contrastive"].item() == 0 and terms["hinge"].item() > 0


def test_half_precision_is_computed_in_float32():
    labels, logits, spans, scores, negative, mask = make_batch()
    halves = [tensor.bfloat16() for tensor in (logits, scores, negative)]
    total, terms = everything(labels, halves[0], spans, halves[1], halves[2], mask)
    expected, _ = everything(labels, halves[0].float(), spans, halves[1].float(), halves[2].float(), mask)
    assert total.dtype == torch.float32 and all(term.dtype == torch.float32 for term in terms.values())
    torch.testing.assert_close(total, expected)


def test_gradients():
    labels, *tensors = make_batch()
    # One sample has more windows than proposals, the other has padding
    targets = Targets.from_labels(labels[2:], "cpu")
    targets["spans"] = targets.spans.double()
    *inputs, mask = (tensor[2:] for tensor in tensors)
    inputs = [tensor.double().requires_grad_() for tensor in inputs]

    def terms(logits, spans, scores, negative):
        detected = detection_losses(logits, spans, targets, CONFIG)
        saliency = hinge_loss(scores, targets, 0.2), contrastive_loss(scores, negative, targets, mask)
        return (*detected.values(), *saliency)

    assert torch.autograd.gradcheck(terms, inputs)


def test_a_step_along_the_gradient_lowers_the_span_terms():
    labels, logits, spans, scores, negative, mask = make_batch()
    spans.requires_grad_()
    total, before = everything(labels, logits, spans, scores, negative, mask)
    (gradient,) = torch.autograd.grad(total, spans)
    _, after = everything(labels, logits, spans - 1e-3 * gradient, scores, negative, mask)
    assert after["l1"] + after["iou"] < before["l1"] + before["iou"]


def test_targets():
    labels = [
        {"spans": torch.tensor([[0.5, 0.25]], dtype=torch.float64), "saliency_pos": torch.tensor([4, 2])},
        {"spans": torch.zeros(0, 2)},
        {"spans": torch.tensor([[0.1, 0.1], [0.2, 0.1], [0.3, 0.1]])},
    ]
    labels[0]["saliency_neg"] = torch.tensor([0, 1])
    targets = Targets.from_labels(labels, torch.device("cpu"))
    assert targets.spans.shape == (3, 3, 2) and targets.spans.dtype == torch.float32
    assert targets.window_mask.tolist() == [[True, False, False], [False] * 3, [True] * 3]
    assert targets.pair_mask.tolist() == [[True, True], [False] * 2, [False] * 2]
    assert targets.saliency_pos[0].tolist() == [4, 2] and targets.saliency_neg[0].tolist() == [0, 1]
    assert targets.spans[2, 1].tolist() == pytest.approx([0.2, 0.1])


def test_targets_read_like_the_labels():
    labels = make_labels([2, 0, 3], pairs=[1, 0, 2])
    targets = Targets.from_labels(labels)
    assert len(targets) == 3
    for index in (0, 1, 2, -1):
        assert targets[index].keys() == labels[index].keys()
        for name, value in labels[index].items():
            assert torch.equal(targets[index][name], value)
    with pytest.raises(IndexError):
        targets[3]
    with pytest.raises(AttributeError, match="no attribute 'windows'"):
        targets.windows  # noqa: B018


@pytest.mark.parametrize(
    "label",
    [
        {"spans": torch.rand(2, 3)},
        {"spans": torch.rand(2)},
        {"spans": torch.rand(1, 2), "saliency_pos": torch.tensor([1])},
        {"spans": torch.rand(1, 2), "saliency_pos": torch.tensor([1, 2]), "saliency_neg": torch.tensor([0])},
    ],
)
def test_labels_of_other_shapes(label):
    with pytest.raises(ValueError, match=r"`labels\[1\]`"):
        Targets.from_labels([{"spans": torch.rand(1, 2)}, label], torch.device("cpu"))
