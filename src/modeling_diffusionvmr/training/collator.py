"""Collate the samples of a dataset into a batch."""

from collections.abc import Sequence
from typing import Any

import torch

from ..loss_diffusionvmr import Targets
from ..processing_diffusionvmr import DiffusionVMRProcessor


class DiffusionVMRDataCollator:
    """
    Turn samples of a `MomentRetrievalDataset` into the arguments of `DiffusionVMRForMomentRetrieval.forward`.

    Features and labels are padded on the right. The batch has `labels` only if every sample has them.

    Args:
        with_indices: also return `indices` (B,) of the samples in the dataset, and `covered_durations` (B,), seconds,
            which predictions need.
    """

    def __init__(self, with_indices: bool = False):
        self.with_indices = with_indices

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for name in ("video", "text", "negative_text"):
            if f"{name}_features" in samples[0]:
                batch[f"{name}_features"], batch[f"{name}_mask"] = DiffusionVMRProcessor.pad(
                    [sample[f"{name}_features"] for sample in samples]
                )
        for name in ("noisy_spans", "timesteps"):
            if name in samples[0]:
                batch[name] = torch.stack([sample[name] for sample in samples])
        if all("labels" in sample for sample in samples):
            batch["labels"] = Targets.from_labels([sample["labels"] for sample in samples])
        if self.with_indices:
            batch["indices"] = torch.tensor([sample["index"] for sample in samples])
            batch["covered_durations"] = torch.tensor(
                [sample["covered_duration"] for sample in samples], dtype=torch.float64
            )
        return batch
