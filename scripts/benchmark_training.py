"""`benchmark.py --part training`: the parts of a training step."""

import argparse
import itertools

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmark_common import Clock, device_name, peak_mib
from benchmark_samples import NUM_CLIPS, NUM_TOKENS, RandomFeatures, simulate_truth
from modeling_diffusionvmr import (
    DiffusionVMRConfig,
    DiffusionVMRDataCollator,
    DiffusionVMRForMomentRetrieval,
    DiffusionVMRProcessor,
    MomentRetrievalDataset,
    loss_diffusionvmr,
)
from modeling_diffusionvmr.cli.options import check_device
from modeling_diffusionvmr.cli.settings import SettingsParser
from modeling_diffusionvmr.data.annotations import SALIENCY_CLIP_SECONDS

WARM_UP_STEPS = 3


def make_dataset(config: DiffusionVMRConfig, queries: int, num_tokens: int, seed: int) -> MomentRetrievalDataset:
    """Return a training dataset of simulated features, of the sizes that the configuration needs."""
    sizes = [entry["feature_size"] for entry in config.backbones or [] if "feature_size" in entry]
    sizes = sizes if sum(sizes) == config.video_feature_size else [config.video_feature_size]
    rows = simulate_truth(seed, queries)
    videos, sentences = [row["vid"] for row in rows], [row["qid"] for row in rows]
    return MomentRetrievalDataset(
        rows,
        [RandomFeatures(videos, NUM_CLIPS, size, seed) for size in sizes],
        RandomFeatures(sentences, num_tokens, config.text_feature_size, seed),
        DiffusionVMRProcessor(sizes, config.text_feature_size, config.max_clips, config.max_tokens),
        config,
        SALIENCY_CLIP_SECONDS,
    )


def make_training(arguments: argparse.Namespace, settings: argparse.Namespace):
    """Return the model of a preset, and a dataset for it."""
    config = DiffusionVMRConfig(**settings.config)
    dataset = make_dataset(config, 8 * arguments.batch_size, NUM_TOKENS, arguments.seed)
    torch.manual_seed(arguments.seed)
    return DiffusionVMRForMomentRetrieval(config), dataset


def measure_training(arguments: argparse.Namespace) -> dict:
    """Measure the time that each part of a training step takes."""
    check_device(arguments.device)
    device = torch.device(arguments.device)
    settings = SettingsParser("train", ["--preset", arguments.preset, *arguments.flags]).parse_settings()
    model, dataset = make_training(arguments, settings)
    model.to(device).train()
    loader = DataLoader(dataset, arguments.batch_size, shuffle=True, collate_fn=DiffusionVMRDataCollator())
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.training["learning_rate"])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bool(settings.training.get("bf16")))

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    clock = Clock(device)
    with clock.inside(loss_diffusionvmr, "match", "matching"):
        for step in tqdm(range(WARM_UP_STEPS + arguments.steps), desc="training", unit="step"):
            if step == WARM_UP_STEPS:
                clock.seconds.clear()
            with clock("data"):
                batch = send_to_device(next(batches), device)
            with clock("forward and loss"), autocast:
                loss = model(**batch).loss
            with clock("backward"):
                loss.backward()
            with clock("optimizer"):
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.training["max_grad_norm"])
                optimizer.step()
                optimizer.zero_grad()
    seconds = {name: clock.seconds[name] for name in ("data", "forward and loss", "matching", "backward", "optimizer")}
    seconds["forward and loss"] -= seconds["matching"]
    total = sum(seconds.values())
    return {
        "data": f"simulated (seed {arguments.seed})",
        "preset": " ".join([arguments.preset, *arguments.flags]),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "batch size": arguments.batch_size,
        "samples per second": round(arguments.steps * arguments.batch_size / total, 1),
        "peak MiB": round(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak_mib()),
        "table": [
            {"what": name, "ms per step": round(1000 * value / arguments.steps, 2), "share": f"{value / total:.1%}"}
            for name, value in seconds.items()
        ],
    }
