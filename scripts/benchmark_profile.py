"""`benchmark.py --part profile`: where the time of inference and of a training step goes, by kind of work."""

import argparse
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm.auto import tqdm

from benchmark_common import alternate
from benchmark_inference import SIZES, Column, make_batch, our_contender, repeat
from modeling_diffusionvmr import DiffusionVMRConfig, modeling_diffusionvmr
from modeling_diffusionvmr.modeling_diffusionvmr import (
    DiffusionVMRDynamicInteraction,
    DiffusionVMRFeedForward,
    DiffusionVMRProjection,
    DiffusionVMRSelfAttention,
)

COLUMNS = (
    Column("one query", "retrieve", 1, 10),
    Column("batch 100", "retrieve", 100, 1),
    Column("training step, batch 32", "train", 32, 1),
)
KIND_OF_CLASS = {
    nn.LayerNorm: "layer norms",
    DiffusionVMRSelfAttention: "attention",
    DiffusionVMRFeedForward: "feed-forward",
    DiffusionVMRProjection: "projections of features",
    DiffusionVMRDynamicInteraction: "filters applied to bins",
}
GENERATOR = "generator of filters"  # the layers of a dynamic interaction whose names begin with "filter"
HEADS = "heads and embeddings"
HEAD_NAMES = ("time_embedding", "span_projection", "time_modulation", "class_head", "span_head", "saliency_head")
KIND_OF_FUNCTION = {"roi_align": "RoI align", "diffusionvmr_loss": "loss and matching"}  # called by the model
OPTIMIZER, OTHER, OUTSIDE = "optimizer", "other operators", "Python and overhead"
KINDS = (*KIND_OF_CLASS.values(), GENERATOR, HEADS, *KIND_OF_FUNCTION.values(), OPTIMIZER, OTHER, OUTSIDE)
MARK = "kind: "  # names of marks begin with this, and end with the kind
RUN = "profiled run"
BACKWARD = "autograd::engine::evaluate_function"


def kind_of_module(name: str, module: nn.Module) -> str | None:
    """Return the kind of work of a module, or None to count it as part of the module around it."""
    last = name.rpartition(".")[2]
    if last.startswith("filter"):
        return GENERATOR
    return HEADS if last in HEAD_NAMES else KIND_OF_CLASS.get(type(module))


@contextlib.contextmanager
def marked(model: nn.Module) -> Iterator[None]:
    """Inside the block, name the kind of work in the profile: of modules and of functions."""
    stack: list[record_function] = []

    def enter(kind: str, *_) -> None:
        stack.append(record_function(MARK + kind))
        stack[-1].__enter__()

    def leave(*_) -> None:
        stack.pop().__exit__(None, None, None)

    def inside(kind: str, function: Callable, *args, **kwargs):
        with record_function(MARK + kind):
            return function(*args, **kwargs)

    with contextlib.ExitStack() as undo:
        for name, module in model.named_modules():
            if (kind := kind_of_module(name, module)) is not None:
                undo.callback(module.register_forward_pre_hook(partial(enter, kind)).remove)
                undo.callback(module.register_forward_hook(leave).remove)
        for owner, name, kind in [
            *((modeling_diffusionvmr, name, kind) for name, kind in KIND_OF_FUNCTION.items()),
            (nn.utils, "clip_grad_norm_", OPTIMIZER),
        ]:
            function = getattr(owner, name)
            undo.callback(setattr, owner, name, function)
            setattr(owner, name, partial(inside, kind, function))
        yield


def lineage(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """Yield an event and then the events around it, from the inside out."""
    around: FunctionEvent | None = event
    while around is not None:
        yield around
        around = around.cpu_parent


def kinds_of(events: Iterable[FunctionEvent]) -> Iterator[tuple[FunctionEvent, str]]:
    """
    Yield each event with its kind of work: that of the innermost mark around it or, in the backward pass, of the event
    of the forward pass that made its node.
    """
    kind_of_node: dict[int, str] = {}  # by sequence number
    for event in sorted(events, key=lambda event: event.time_range.start):
        kind, is_forward = OTHER, True
        for around in lineage(event):
            if around.name.startswith(MARK):
                kind = around.name.removeprefix(MARK)
                break
            if around.name.startswith("Optimizer."):
                kind = OPTIMIZER
                break
            if around.name.startswith(BACKWARD):
                kind, is_forward = kind_of_node.get(around.sequence_nr, OTHER), False
                break
        if is_forward:  # events before the one that makes a node have the node's number, too: the last one decides
            kind_of_node[event.sequence_nr] = kind
        # What these three take beyond the operators inside them is not work
        yield event, OUTSIDE if event.name == RUN or event.name.startswith((MARK, BACKWARD)) else kind


def time_by_kind(job: Callable[[], None]) -> dict[str, float]:
    """Profile a job. Return the share of its time per kind of work."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(RUN):
        job()
    microseconds: dict[str, float] = defaultdict(float)
    for event, kind in kinds_of(profiler.events()):
        microseconds[kind] += event.self_cpu_time_total
    total = sum(microseconds.values())
    return {kind: microseconds[kind] / total for kind in KINDS}


def measure_profile(arguments: argparse.Namespace) -> dict:
    """
    Measure the share of each kind of work in inference and in a training step, the backward pass included. The total
    is measured without the profiler, which makes small operators look slower than they are.
    """
    shares, totals = {}, {}
    for size in arguments.sizes:
        config = DiffusionVMRConfig(**SIZES[size])
        torch.manual_seed(arguments.seed)
        model = our_contender(size, config)
        for column in tqdm(COLUMNS, desc=f"profiling, {size}"):
            batch = make_batch(config, column.batch_size, arguments.seed)
            job = partial(repeat, getattr(model, column.function), batch, column.calls)
            job()
            heading = f"{column.name}, {size}"
            totals[heading] = alternate({heading: job}, arguments.repeats)[heading][0] / column.calls
            with marked(model.module):
                shares[heading] = time_by_kind(job)
    table = [{"kind": kind, **{name: f"{share[kind]:.1%}" for name, share in shares.items()}} for kind in KINDS]
    table.append({"kind": "total", **{name: f"{1000 * seconds:.1f} ms" for name, seconds in totals.items()}})
    return {
        "data": f"simulated (seed {arguments.seed})",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "table": table,
    }
