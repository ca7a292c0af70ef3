"""`benchmark.py --part data`: opening a converted folder, and reading training samples from it."""

import argparse
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from benchmark_common import resident_mib
from benchmark_samples import NUM_CLIPS, NUM_TOKENS, TEXT_SIZE, RandomFeatures, simulate_truth
from modeling_diffusionvmr import DiffusionVMRConfig, DiffusionVMRProcessor, MomentRetrievalDataset
from modeling_diffusionvmr.data.annotations import SALIENCY_CLIP_SECONDS, load_annotations

BACKBONE_SIZES = {"slowfast": 2304, "clip": 512}
BATCH_SIZE = 32


def make_folder(folder: Path, num_videos: int, seed: int) -> None:
    """Write a converted folder with one query per video and features of the sizes of QVHighlights."""
    from modeling_diffusionvmr.data.benchmarks import Benchmark
    from modeling_diffusionvmr.data.conversion import Source, convert

    rows = simulate_truth(seed, num_videos)
    videos, sentences = [row["vid"] for row in rows], [row["qid"] for row in rows]
    backbones = {name: RandomFeatures(videos, NUM_CLIPS, size, seed) for name, size in BACKBONE_SIZES.items()}
    text = RandomFeatures(sentences, NUM_TOKENS, TEXT_SIZE, seed)
    simulated = Benchmark("Simulated", "Random numbers in the shape of QVHighlights.")
    convert(simulated, Source({"train": rows}, backbones, text, SALIENCY_CLIP_SECONDS), folder)


def open_folder(folder: Path, samples: int, repeats: int, seed: int) -> dict[str, float]:
    """Measure the seconds and MiB to open a converted folder, and the training samples per second read from it."""
    import datasets  # noqa: F401  imported first, so that the import is not measured
    import pyarrow.parquet  # noqa: F401

    from modeling_diffusionvmr.data.features import open_text_features, open_video_features

    torch.set_num_threads(1)  # as in a worker of a `DataLoader`
    before, started = resident_mib(), time.perf_counter()
    rows = load_annotations(folder, "train")
    video, text = open_video_features([folder]), open_text_features(folder, rows)
    seconds, memory = time.perf_counter() - started, resident_mib() - before
    dataset = MomentRetrievalDataset(rows, video, text, DiffusionVMRProcessor(), DiffusionVMRConfig())
    order = np.random.default_rng(seed).permutation(len(dataset))[:samples].tolist()
    rates = []
    for _ in range(repeats):
        started = time.perf_counter()
        for first in range(0, len(order), BATCH_SIZE):
            dataset.__getitems__(order[first : first + BATCH_SIZE])
        rates.append(len(order) / (time.perf_counter() - started))
    return {"seconds": seconds, "MiB": memory, "rate": statistics.median(rates)}


def measure_data(arguments: argparse.Namespace) -> dict:
    """Measure the first and the second opening of a converted folder, each in its own process."""
    if arguments.work_dir is not None and not Path(arguments.work_dir).is_dir():
        raise ValueError(f"--work_dir: {arguments.work_dir} is not a folder")
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as work:
        folder = Path(work) / "simulated"
        # With an empty cache, the first opening really is the first
        os.environ["HF_DATASETS_CACHE"] = f"{work}/cache"
        started = time.perf_counter()
        make_folder(folder, arguments.videos, arguments.seed)
        converted = time.perf_counter() - started
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet"))
        table = []
        for name in ("first opening", "second opening"):
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                opened = process.submit(open_folder, folder, arguments.samples, arguments.repeats, arguments.seed)
                figures = opened.result()
            table.append(
                {
                    "what": name,
                    "seconds": round(figures["seconds"], 2),
                    "MiB beyond imports": round(figures["MiB"]),
                    "samples per second": round(figures["rate"]),
                }
            )
    return {
        "data": f"simulated (seed {arguments.seed})",
        "videos": arguments.videos,
        "MiB of Parquet": round(size / 2**20),
        "seconds to convert": round(converted, 1),
        "table": table,
    }
