"""The training objective (section 3.5): matching (Eq. 9 and 10) and the terms of the loss (Eq. 11 to 13)."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .spans import iou_and_generalized_iou, relevant_clips


class Targets(dict[str, Tensor]):
    """
    The labels of B samples as padded tensors, for up to M windows and up to P saliency pairs. Padding is on the right.

    This is a dict because accelerate, `Trainer`, pinned memory and `nn.DataParallel` all rebuild any subclass of dict
    from its items. Like the list of labels that it replaces, it has length B, and `targets[i]` is one sample's label.
    """

    spans: Tensor  # (B, M, 2)
    window_mask: Tensor  # (B, M), true for real windows
    saliency_pos: Tensor  # (B, P), indices of the more salient clips
    saliency_neg: Tensor  # (B, P), indices of the less salient clips
    pair_mask: Tensor  # (B, P), true for real pairs

    @classmethod
    @torch.compiler.disable  # it would be recompiled for every shape of every label
    def from_labels(cls, labels: Sequence[Mapping[str, Tensor]], device: torch.device | str | None = None) -> "Targets":
        """
        Pad the labels that `DiffusionVMRForMomentRetrieval.forward` describes.

        Raises:
            ValueError: if a tensor has the wrong shape. The message names the label.
        """
        for index, label in enumerate(labels):
            if label["spans"].ndim != 2 or label["spans"].shape[1] != 2:
                raise ValueError(f"`labels[{index}]`: `spans` must be (n, 2), got {tuple(label['spans'].shape)}")
            pairs = [tuple(label[name].shape) for name in ("saliency_pos", "saliency_neg") if name in label]
            if pairs and (len(pairs) != 2 or pairs[0] != pairs[1] or len(pairs[0]) != 1):
                raise ValueError(f"`labels[{index}]`: `saliency_pos` and `saliency_neg` must both be (p,), got {pairs}")
        spans = [label["spans"].float() for label in labels]
        no_pairs = spans[0].new_zeros(0, dtype=torch.long)
        positive = [label.get("saliency_pos", no_pairs) for label in labels]
        negative = [label.get("saliency_neg", no_pairs) for label in labels]

        def mask(rows: list[Tensor]) -> Tensor:
            lengths = [len(row) for row in rows]
            return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]

        padded = cls(
            spans=pad_sequence(spans, batch_first=True),
            window_mask=mask(spans),
            saliency_pos=pad_sequence(positive, batch_first=True),
            saliency_neg=pad_sequence(negative, batch_first=True),
            pair_mask=mask(positive),
        )
        return padded if device is None else padded.to(device, non_blocking=True)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Targets":
        """Return the same labels on a device."""
        return type(self)({name: value.to(device, non_blocking=non_blocking) for name, value in self.items()})

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, key):
        if isinstance(key, str):
            return super().__getitem__(key)
        windows, pairs = self.window_mask[key], self.pair_mask[key]
        label = {"spans": self.spans[key][windows]}
        return label | {name: self[name][key][pairs] for name in ("saliency_pos", "saliency_neg")}

    def __getattr__(self, name: str) -> Tensor:
        if name in self:
            return self[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def match(cost: np.ndarray, num_windows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Assign windows to proposals at the minimum total cost (Eq. 9), in Q independent problems.

    If there are more windows than proposals, the windows that cost most stay unmatched.

    Args:
        cost: (Q, N, M), finite.
        num_windows: (Q,), the number of real windows in each problem. They come before the padding.

    Returns:
        The matched pairs as three arrays: problem, proposal and window.
    """
    problems, proposals, windows = [], [], []
    for problem, (pair_cost, count) in enumerate(zip(cost, num_windows)):
        window, proposal = linear_sum_assignment(pair_cost[:, :count].T)
        problems.append(np.full(len(window), problem))
        proposals.append(proposal)
        windows.append(window)
    return np.concatenate(problems), np.concatenate(proposals), np.concatenate(windows)


def matching_cost(logits: Tensor, spans: Tensor, targets: Targets, l1_weight: float, iou_weight: float) -> Tensor:
    """
    Return the matching cost (Eq. 10) of each proposal and window, (B, K, N, M).

    Args:
        logits: (B, K, N, 2) of K decoder layers; index 0 is foreground.
        spans: (B, K, N, 2).
        targets: the windows, B samples of up to M.
        l1_weight, iou_weight: coefficients of the L1 distance and of the generalized IoU.
    """
    foreground = logits.softmax(-1)[..., :1]
    truth = targets.spans[:, None, None]
    distance = (spans[..., None, :] - truth).abs().mean(-1)
    _, generalized_iou = iou_and_generalized_iou(spans[..., None, :], truth)
    return l1_weight * distance - iou_weight * generalized_iou - foreground


def mean_per_sample(values: Tensor, sample: Tensor, num_samples: int) -> Tensor:
    """Average values (R,) within each sample, then over all `num_samples`. A sample without values counts as 0."""
    totals = values.new_zeros(num_samples).index_add(0, sample, values)
    counts = values.new_zeros(num_samples).index_add(0, sample, torch.ones_like(values))
    return (totals / counts.clamp(min=1)).mean()


def detection_losses(logits: Tensor, spans: Tensor, targets: Targets, config) -> dict[str, Tensor]:
    """
    Return the terms `class`, `l1` and `iou` (Eq. 11 and 12), each summed over the decoder layers as in DETR.

    Args:
        logits: (B, K, N, 2); index 0 is foreground.
        spans: (B, K, N, 2).
        targets: the windows.
        config: a `DiffusionVMRConfig`, for the coefficients.
    """
    batch, layers, num_proposals, _ = logits.shape
    with torch.no_grad():
        cost = matching_cost(logits, spans, targets, config.l1_loss_coefficient, config.iou_loss_coefficient)
        # The only transfer to the host in a training step: costs and counts of all samples and layers at once. If the
        # model diverged, costs are NaN, which the solver rejects.
        num_windows = targets.window_mask.sum(1, keepdim=True, dtype=cost.dtype)
        host = torch.cat((cost.nan_to_num().flatten(1), num_windows), dim=1).cpu().numpy()
        problems = host[:, :-1].reshape(batch * layers, num_proposals, targets.spans.shape[1])
        matched = match(problems, host[:, -1].astype(int).repeat(layers))
        problem, proposal, window = torch.from_numpy(np.stack(matched)).to(logits.device, non_blocking=True)
        sample, layer = problem // layers, problem % layers

    is_background = torch.ones(batch, layers, num_proposals, dtype=torch.long, device=logits.device)
    is_background[sample, layer, proposal] = 0
    class_loss = F.cross_entropy(logits.flatten(0, 2), is_background.flatten(), reduction="none")
    # Divide by the sum of a sample's weights, as DETR does for a batch, and not by N as in Moment-DETR: otherwise the
    # share of the few foreground proposals would shrink as N grows
    class_weight = torch.where(is_background == 1, config.background_coefficient, 1.0)
    class_weight = class_weight / class_weight.sum(-1, keepdim=True).clamp(min=torch.finfo(class_weight.dtype).tiny)
    class_loss = (class_loss.view_as(class_weight) * class_weight).sum(-1)

    predicted, truth = spans[sample, layer, proposal], targets.spans[sample, window]
    _, generalized_iou = iou_and_generalized_iou(predicted, truth)
    per_layer = batch * layers
    return {
        "class": class_loss.sum(1).mean(),
        "l1": layers * mean_per_sample((predicted - truth).abs().mean(-1), problem, per_layer),
        "iou": layers * mean_per_sample(1 - generalized_iou, problem, per_layer),
    }


def hinge_loss(saliency_scores: Tensor, targets: Targets, margin: float) -> Tensor:
    """
    Return the hinge term of Eq. 13: in each pair, the more salient clip should score higher by at least the margin.

    Args:
        saliency_scores: (B, Lv).
        targets: the saliency pairs.
        margin: the required difference.
    """
    if not targets.pair_mask.shape[1]:
        return saliency_scores.sum() * 0
    high = saliency_scores.gather(1, targets.saliency_pos)
    low = saliency_scores.gather(1, targets.saliency_neg)
    loss = (margin + low - high).clamp(min=0) * targets.pair_mask
    return (loss.sum(1) / targets.pair_mask.sum(1).clamp(min=1)).mean()


def contrastive_loss(scores: Tensor, negative_scores: Tensor, targets: Targets, video_mask: Tensor) -> Tensor:
    """
    Return the contrastive term of Eq. 13: relevant clips should score higher than all clips paired with a sentence of
    another video.

    The paper gives no formula. This is InfoNCE: the negative log-likelihood of each relevant clip among itself and the
    clips of the same video paired with the other sentence.

    Args:
        scores, negative_scores: (B, Lv), saliency of the clips, paired with the own and with the other sentence.
        targets: the windows, which determine the relevant clips.
        video_mask: (B, Lv), 1 = real.
    """
    relevant = relevant_clips(targets.spans, targets.window_mask, video_mask.sum(1), scores.shape[1])
    against = negative_scores.masked_fill(~video_mask.bool(), -torch.inf).logsumexp(1, keepdim=True)
    loss = F.softplus(against - scores).masked_fill(~relevant, 0)
    return (loss.sum(1) / relevant.sum(1).clamp(min=1)).mean()


def absent_loss(logits: Tensor) -> Tensor:
    """
    Return the term `absent`, which is not in the paper: the cross-entropy of logits (B, K, N, 2) if all proposals are
    background, averaged over the proposals of a sample and over samples, and summed over the decoder layers.
    """
    return -logits.log_softmax(-1)[..., 1].mean((0, 2)).sum()


@torch.compiler.disable  # matching runs on the host, and would be recompiled for every number of proposals
def diffusionvmr_loss(
    logits: Tensor,
    spans: Tensor,
    saliency_scores: Tensor,
    targets: Targets,
    video_mask: Tensor,
    config,
    negative_saliency_scores: Tensor | None = None,
    negative_logits: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    Return the total loss (Eq. 11) and its terms without coefficients: `class`, `l1`, `iou`, `hinge`, `contrastive` and,
    with `negative_logits`, `absent`.

    Each sample's terms are averaged over its own proposals, windows and pairs, then over samples, so that a sample
    weighs the same in any batch. Everything is computed in float32.

    Args:
        logits, spans: (B, K, N, 2) of every decoder layer.
        saliency_scores: (B, Lv).
        targets: the labels.
        video_mask: (B, Lv), 1 = real.
        config: a `DiffusionVMRConfig`, for the coefficients and the margin.
        negative_saliency_scores: (B, Lv), with a sentence of another video. Without them, the contrastive term is 0.
        negative_logits: (B, K, N, 2), with a sentence of another video.
    """
    logits, spans, saliency_scores = logits.float(), spans.float(), saliency_scores.float()
    terms = detection_losses(logits, spans, targets, config)
    terms["hinge"] = hinge_loss(saliency_scores, targets, config.saliency_margin)
    if negative_saliency_scores is None:
        terms["contrastive"] = saliency_scores.new_zeros(())
    else:
        terms["contrastive"] = contrastive_loss(saliency_scores, negative_saliency_scores.float(), targets, video_mask)
    if negative_logits is not None:
        terms["absent"] = absent_loss(negative_logits.float())
    total = sum(getattr(config, f"{name}_loss_coefficient") * term for name, term in terms.items())
    return total, terms
