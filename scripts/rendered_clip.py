"""
A tiny CLIP for the rendered world: the frozen backbone of the embedded model, trained from scratch on single frames.

A frame matches many sentences, so the loss is pairwise: every frame against every sentence of the batch, with the exact
truth. Hard negatives come from two sources: frames of one family show the same words in other combinations, and each
batch asks for relations that are true, that are true with their words swapped, and whose objects are visible but apart.
"""

import io
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup

from modeling_diffusionvmr.synthetic.rendered_world import (
    COLORS,
    FRAME_RATE,
    PAIRS,
    SEEN_PAIRS,
    SHAPES,
    TEMPLATES,
    Query,
    Statement,
    Track,
    VideoPlan,
    next_to,
    plan_stills,
    render_frame,
)
from modeling_diffusionvmr.video import open_video

IMAGE_SIZE = 72  # pixels, square
PATCH_SIZE = 12
PATCHES_PER_SIDE = IMAGE_SIZE // PATCH_SIZE
PIXEL_MEAN, PIXEL_STD = 0.45, 0.25
MAX_OBJECTS = 6  # per frame
FAMILY = 4  # number of consecutive frames with the same cast


def build_tokenizer() -> CLIPTokenizer:
    """
    Build CLIP's byte-level BPE with one token per word of the rendered world. Any other word becomes several tokens,
    bytes at worst.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    texts = {
        Statement(kind, (pair, pair)).text(i)
        for kind, templates in TEMPLATES.items()
        for i in range(len(templates))
        for pair in PAIRS
    }
    vocabulary = sorted({word for text in texts for word in text.split()})
    words = {word: (*word[:-1], word[-1] + "</w>") for word in vocabulary}
    merges = []
    while any(len(pieces) > 1 for pieces in words.values()):
        adjacent = [couple for pieces in words.values() for couple in zip(pieces, pieces[1:])]
        most_frequent = max(sorted(set(adjacent)), key=adjacent.count)
        merges.append(most_frequent)
        words = {word: _merged(pieces, most_frequent) for word, pieces in words.items()}
    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokens += [letter + "</w>" for letter in letters]
    tokens += ["".join(couple) for couple in merges]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=32)


def _merged(pieces: tuple[str, ...], couple: tuple[str, str]) -> tuple[str, ...]:
    """Merge every occurrence of two adjacent pieces in a word."""
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == couple:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def build_image_processor() -> CLIPImageProcessorPil:
    """Build the processor of frames of any size to pixel values (B, 3, IMAGE_SIZE, IMAGE_SIZE)."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )


def build_clip(tokenizer: CLIPTokenizer, size: int = 192, layers: int = 4, text_layers: int = 2) -> CLIPModel:
    """Build an untrained CLIP (2.1 million weights) with one space of `size` dimensions for images and sentences."""
    both = {
        "hidden_size": size,
        "intermediate_size": 2 * size,
        "num_attention_heads": size // 32,
        "hidden_act": "relu",
    }
    text = {
        **both,
        "num_hidden_layers": text_layers,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**both, "num_hidden_layers": layers, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=size)
    # On a CPU in bfloat16, eager attention over so few tokens is twice as fast as the fused kernel
    clip = CLIPModel._from_config(config, attn_implementation="eager")
    # An identity projection puts the token states into the space of the image features. The model uses token states,
    # not projected sentences
    clip.text_projection.weight.data.copy_(torch.eye(size))
    clip.text_projection.requires_grad_(False)
    _start_embeddings(clip.vision_model.embeddings)
    # The last layer passes information from the patches to the pooled token. It starts as a plain average of them
    last = clip.vision_model.encoder.layers[-1].self_attn
    for linear in (last.v_proj, last.out_proj):
        linear.weight.data.copy_(torch.eye(size))
    clip.logit_scale.data.fill_(math.log(10.0))
    return clip


@torch.no_grad()
def _start_embeddings(embeddings: nn.Module) -> None:
    """
    Initialize position embeddings as waves instead of noise, since shapes span several patches and adjacency matters
    from the first step on. Initialize patch embeddings as the lowest frequencies of the patch, with a third of the
    dimensions per channel.
    """
    size = embeddings.patch_embedding.out_channels
    sides = torch.arange(PATCHES_PER_SIDE), torch.arange(PATCHES_PER_SIDE)
    y, x = (axis.flatten() for axis in torch.meshgrid(*sides, indexing="ij"))
    speeds = math.pi / 2 * 8.0 ** -torch.linspace(0, 1, size // 4)
    waves = torch.cat([wave(axis[:, None] * speeds) for axis in (x, y) for wave in (torch.sin, torch.cos)], 1)
    embeddings.position_embedding.weight.copy_(torch.cat([torch.zeros(1, size), 0.7 * waves]))

    # JPEG's cosine basis, by ascending frequency
    places = (torch.arange(PATCH_SIZE) + 0.5) / PATCH_SIZE
    basis = torch.cos(math.pi * torch.arange(PATCH_SIZE)[:, None] * places) * math.sqrt(2 / PATCH_SIZE)
    frequencies = [(i, j) for i in range(PATCH_SIZE) for j in range(PATCH_SIZE)]
    frequencies = sorted(frequencies, key=lambda couple: (sum(couple), couple))[: size // 3]
    filters = torch.stack([torch.outer(basis[i], basis[j]) for i, j in frequencies])  # (size / 3, patch, patch)
    weight = embeddings.patch_embedding.weight.zero_()
    for channel in range(3):
        weight[channel * len(filters) : (channel + 1) * len(filters), channel] = filters * 0.5


@dataclass
class Frames:
    """N frames and their content. For nameless colors, `pair` and `neighbor` have the right shape and a wrong color."""

    pixels: Tensor  # uint8 (N, 3, IMAGE_SIZE, IMAGE_SIZE)
    pair: Tensor  # long (N, MAX_OBJECTS): index into `PAIRS`; -1 for no object
    neighbor: Tensor  # long (N, MAX_OBJECTS): pair of the object next to it; -1 for none
    place: Tensor  # float (N, MAX_OBJECTS, 2): center (x, y) in frame widths

    def __len__(self) -> int:
        return len(self.pair)

    def __getitem__(self, index: Any) -> "Frames":
        return Frames(self.pixels[index], self.pair[index], self.neighbor[index], self.place[index])

    @staticmethod
    def concatenated(*several: "Frames") -> "Frames":
        """Concatenate frames in this order."""
        return Frames(*(torch.cat([getattr(frames, each.name) for frames in several]) for each in fields(Frames)))

    def relations(self) -> Tensor:
        """
        Return the two pairs that are next to each other as one code: lower index * len(PAIRS) + higher index, or -1 for
        an object without a neighbor. Long (N, MAX_OBJECTS).
        """
        code = torch.minimum(self.pair, self.neighbor) * len(PAIRS) + torch.maximum(self.pair, self.neighbor)
        return torch.where(self.neighbor < 0, -1, code)

    def counts(self) -> Tensor:
        """Return how often each pair is visible: long (N, len(PAIRS))."""
        return F.one_hot(self.pair + 1, len(PAIRS) + 1).sum(1)[:, 1:]


_PAIR_INDEX = {pair: i for i, pair in enumerate(PAIRS)}
_SEEN = torch.tensor([_PAIR_INDEX[pair] for pair in SEEN_PAIRS])  # ascending


def render_frames(seed: int, count: int, nameless: bool = False) -> Frames:
    """Render `count` frames of seen pairs, or of shapes in nameless colors, with compression artifacts."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    pair, neighbor = (np.full((count, MAX_OBJECTS), -1) for _ in range(2))
    place = np.zeros((count, MAX_OBJECTS, 2), np.float32)
    for i, still in enumerate(plan_stills(seed, count, nameless=nameless, family=FAMILY)):
        pixels[i] = _degraded(render_frame(still, 0.0), int(rng.integers(60, 96)))
        for j, track in enumerate(still.tracks):
            pair[i, j], place[i, j] = _pair_index(track), track.center(0.0)
            for other in still.tracks:
                if other is not track and next_to(track, other):
                    neighbor[i, j] = _pair_index(other)
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Frames(channels_first, *map(torch.from_numpy, (pair, neighbor, place)))


def _pair_index(track: Track) -> int:
    # A nameless color counts as the first color
    return _PAIR_INDEX.get(track.pair, SHAPES.index(track.pair[1]))


def _degraded(picture: np.ndarray, quality: int) -> np.ndarray:
    # JPEG loses what H.264 loses: fine detail and color resolution
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def _draw_families(pool: Frames, count: int, rng: np.random.Generator) -> Frames:
    """Draw complete families of frames, `count` frames in total."""
    chosen = torch.from_numpy(rng.choice(len(pool) // FAMILY, count // FAMILY, replace=False))
    return pool[(chosen[:, None] * FAMILY + torch.arange(FAMILY)).flatten()]


def _augmented(frames: Frames, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """
    Normalize frames, with random flips, shifts and lighting. No shape's name depends on left or right.

    Returns:
        Pixel values, float (B, 3, IMAGE_SIZE, IMAGE_SIZE), and the new places of the objects, (B, MAX_OBJECTS, 2).
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    pixels, place = frames.pixels.float() / 255, frames.place.clone()
    if uniform(0, 1, 1) < 0.5:
        pixels, place[..., 0] = pixels.flip(3), 1 - place[..., 0]
    right, down = (int(torch.randint(-3, 4, (1,), generator=generator)) for _ in range(2))
    rows, columns = slice(3 - down, 3 - down + IMAGE_SIZE), slice(3 - right, 3 - right + IMAGE_SIZE)
    pixels = F.pad(pixels, (3, 3, 3, 3), mode="replicate")[..., rows, columns]
    place += torch.tensor([right, down]) / IMAGE_SIZE
    batch = len(pixels)
    pixels = pixels * uniform(0.92, 1.08, batch, 1, 1, 1) + uniform(-0.02, 0.02, batch, 3, 1, 1)
    return (pixels - PIXEL_MEAN) / PIXEL_STD, place


def _draw_relations(frames: Frames, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """
    Draw about `count` relations to ask for in one batch: some that hold in a frame, some with their words swapped, and
    some of two objects that are apart. Each is two ascending indices into `PAIRS`, of seen pairs.
    """
    true = {(int(code) // len(PAIRS), int(code) % len(PAIRS)) for code in frames.relations().unique() if code >= 0}
    shapes = len(SHAPES)
    swapped = {tuple(sorted((a // shapes * shapes + b % shapes, b // shapes * shapes + a % shapes))) for a, b in true}
    apart = {tuple(sorted({int(pair) for pair in row if pair >= 0})[:2]) for row in frames.pair}
    allowed = {_PAIR_INDEX[pair] for pair in SEEN_PAIRS}
    chosen = []
    for relations, share in ((true, 0.5), (swapped - true, 0.3), (apart - true - swapped, 0.2)):
        relations = sorted(couple for couple in relations if len(set(couple)) == 2 and set(couple) <= allowed)
        chosen += [relations[i] for i in rng.permutation(len(relations))[: round(share * count)]]
    return chosen


def _draw_statements(
    frames: Frames, rng: np.random.Generator, each: int = 60
) -> tuple[list[Statement], Tensor, list[int]]:
    """
    Draw S statements to ask for in one batch. Some hold in one of its frames, others do not.

    Args:
        frames: B frames.
        rng: for the draws.
        each: maximum number of counts, and approximate number of relations. Singles are always asked for in full.

    Returns:
        The statements, in the order singles, counts, relations; whether each holds in each frame, float (B, S); and the
        number of statements of each kind.
    """
    counts = frames.counts()
    statements, truth, numbers = [], [], []
    for kind, holds, number in (("single", counts >= 1, len(SEEN_PAIRS)), ("count", counts >= 2, each)):
        # Statements that hold in a frame come first, then others at random
        priority = rng.random(len(SEEN_PAIRS)) - 2 * holds.any(0)[_SEEN].numpy()
        chosen = np.sort(np.argsort(priority)[:number])
        statements += [Statement(kind, (SEEN_PAIRS[i],)) for i in chosen]
        truth.append(holds[:, _SEEN[chosen]])
        numbers.append(len(chosen))
    relations = _draw_relations(frames, rng, each)
    for a, b in relations:
        statements.append(Statement("relation", (PAIRS[a], PAIRS[b]) if rng.random() < 0.5 else (PAIRS[b], PAIRS[a])))
    codes = torch.tensor([a * len(PAIRS) + b for a, b in relations], dtype=torch.long)
    truth.append((frames.relations()[:, :, None] == codes).any(1))
    return statements, torch.cat(truth, 1).float(), [*numbers, len(relations)]


def train_rendered_clip(
    seed: int = 0,
    steps: int = 4000,
    batch_size: int = 128,
    pool_size: int = 32_000,
    learning_rate: float = 1.5e-3,
    progress: Callable[[int, int, dict[str, float]], Any] | None = None,
) -> tuple[CLIPModel, CLIPTokenizer, CLIPImageProcessorPil]:
    """
    Train a CLIP on frames of seen pairs.

    Args:
        seed: seed of all random draws.
        steps: number of optimizer steps.
        batch_size: number of frames per batch. A quarter of that number is added in nameless colors.
        pool_size: number of frames to draw batches from. Half that number is added in nameless colors.
        learning_rate: peak learning rate.
        progress: called as `progress(step, steps, losses)` after each step, with one float per loss term.

    Returns:
        The model in evaluation mode, its tokenizer and its image processor.
    """
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tokenizer, image_processor = build_tokenizer(), build_image_processor()
    clip = build_clip(tokenizer)
    helpers = _Helpers(clip.config.vision_config.hidden_size, clip.config.projection_dim)
    parameters = [parameter for parameter in (*clip.parameters(), *helpers.parameters()) if parameter.requires_grad]
    weights, others = ([p for p in parameters if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    groups = [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    pool, nameless_pool = render_frames(seed, pool_size), render_frames(seed, pool_size // 2, nameless=True)
    clip.train()
    for step in range(steps):
        frames = _draw_families(pool, batch_size, rng)
        nameless = _draw_families(nameless_pool, batch_size // 4, rng)
        losses = _losses(clip, helpers, tokenizer, frames, nameless, rng, generator)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, {name: loss.item() for name, loss in losses.items()})
    return clip.eval(), tokenizer, image_processor


class _Helpers(nn.Module):
    """
    Modules that only training needs: heads that classify the object in a patch, and a target vector for each pair.

    Args:
        size: of a patch's vector.
        shared_size: of a vector in the space that images and sentences share.
    """

    def __init__(self, size: int, shared_size: int):
        super().__init__()
        # Class 0 of the last two is "no neighbor"
        self.describe = nn.ModuleDict(
            {
                "color": nn.Linear(size, len(COLORS)),
                "shape": nn.Linear(size, len(SHAPES)),
                "neighbor_color": nn.Linear(size, len(COLORS) + 1),
                "neighbor_shape": nn.Linear(size, len(SHAPES) + 1),
            }
        )
        self.colors = nn.Parameter(torch.randn(len(COLORS), shared_size))
        self.shapes = nn.Parameter(torch.randn(len(SHAPES), shared_size))
        self.bias = nn.Parameter(torch.tensor(-6.0))

    def products(self) -> Tensor:
        """
        Return color vector times shape vector of each seen pair, as unit vectors (len(SEEN_PAIRS), shared_size).
        Products generalize to the ten unseen pairs.
        """
        return F.normalize(self.colors[_SEEN // len(SHAPES)] * self.shapes[_SEEN % len(SHAPES)], dim=-1)


def _losses(
    clip: CLIPModel,
    helpers: _Helpers,
    tokenizer: CLIPTokenizer,
    frames: Frames,
    nameless: Frames,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Compute the loss terms. Training minimizes their plain sum."""
    # Frames in nameless colors come last, so that slices can leave them out of terms about colors and sentences
    both = Frames.concatenated(frames, nameless)
    pixels, place = _augmented(both, generator)
    statements, truth, numbers = _draw_statements(frames, rng)
    sentences = [statement.text(int(rng.integers(6))) for statement in statements]
    tokens = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        vision = clip.vision_model(pixel_values=pixels, output_hidden_states=True)
        images = clip.visual_projection(vision.pooler_output[: len(frames)])
        texts = clip.text_projection(clip.text_model(**tokens).pooler_output)
        # These terms apply before the last layer pools the patches: colors and shapes must be bound before objects mix
        patches = _at_objects(vision.hidden_states[-2][:, 1:], both.pair >= 0, place)
        described = {name: head(patches) for name, head in helpers.describe.items()}
        objects = clip.visual_projection(clip.vision_model.post_layernorm(patches))
    images, texts, objects = (F.normalize(vectors.float(), dim=-1) for vectors in (images, texts, objects))

    logits = clip.logit_scale.exp() * images @ texts.T + helpers.bias
    pairwise = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    by_kind = zip(("single", "count", "relation"), pairwise.split(numbers, 1), truth.split(numbers, 1))
    losses = {kind: loss.sum() / true.sum().clamp(min=1) for kind, loss, true in by_kind}

    shown = both.pair >= 0
    pair, neighbor, named = both.pair[shown], both.neighbor[shown], int((frames.pair >= 0).sum())
    alone = neighbor < 0
    labels = {
        "color": pair // len(SHAPES),
        "shape": pair % len(SHAPES),
        "neighbor_color": (neighbor // len(SHAPES) + 1).masked_fill(alone, 0),
        "neighbor_shape": (neighbor % len(SHAPES) + 1).masked_fill(alone, 0),
    }
    for name, label in labels.items():
        end = named if "color" in name else len(label)
        losses[name] = F.cross_entropy(described[name][:end].float(), label[:end])

    products, names = helpers.products(), texts[: len(SEEN_PAIRS)]
    losses["object"] = _product_loss(objects[:named], products, torch.searchsorted(_SEEN, pair[:named]))
    losses["name"] = _product_loss(names, products, torch.arange(len(names)))
    return losses


def _at_objects(patches: Tensor, is_object: Tensor, place: Tensor) -> Tensor:
    """
    Select the patch at each object's center.

    Args:
        patches: (B, PATCHES_PER_SIDE ** 2, size).
        is_object: bool (B, MAX_OBJECTS), true for each object.
        place: (B, MAX_OBJECTS, 2) in frame widths.

    Returns:
        (objects, size), in the order of `is_object`.
    """
    cells = (place * PATCHES_PER_SIDE).long().clamp(0, PATCHES_PER_SIDE - 1)
    column, row = cells.unbind(-1)
    batch = torch.arange(len(is_object))[:, None].expand_as(is_object)
    return patches[batch[is_object], (row * PATCHES_PER_SIDE + column)[is_object]]


def _product_loss(vectors: Tensor, products: Tensor, which: Tensor) -> Tensor:
    """Pull unit vectors (n, size) toward their own products, of index `which` (n,), and away from the others."""
    return F.cross_entropy(20 * vectors @ products.T, which) + 2 * (1 - (vectors * products[which]).sum(-1)).mean()


@torch.no_grad()
def measure_clip(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    processor: CLIPImageProcessorPil,
    plans: Iterable[VideoPlan],
    folder: str | os.PathLike | None = None,
    clip_seconds: float = 2.0,
) -> dict[str, dict[str, float]]:
    """
    Measure and print how well cosine similarity finds the clips of a video in which a sentence is true, with one frame
    in each clip's frame. Sentences that are true in all clips or in none are skipped.

    Args:
        clip: the model to measure.
        tokenizer: of that model.
        processor: image processor of that model.
        plans: the videos.
        folder: where to decode frames from `<vid>.mp4`. By default frames are rendered.
        clip_seconds: length of a clip.

    Returns:
        One row per kind of sentence: the number of `sentences`; the means of `auc`, average precision `ap` and
        `best_f1` over all thresholds; the share `solved` of sentences with a best F1 of at least 0.9; and the mean F1
        at one threshold for all sentences, `one_threshold_f1`.
    """
    scores = []
    for plan in plans:
        scores += _scores(clip, tokenizer, processor, plan, folder, clip_seconds)
    every, true = np.concatenate([score for _, score, _ in scores]), np.concatenate([truth for *_, truth in scores])
    threshold = max(np.quantile(every, np.linspace(0.5, 0.99, 99)), key=lambda value: _f1(every >= value, true))
    table = {}
    for name, belongs in _groups().items():
        chosen = [(score, truth) for query, score, truth in scores if belongs(query)]
        if chosen:
            figures = np.array([(*_ranking(score, truth), _f1(score >= threshold, truth)) for score, truth in chosen])
            auc, ap, best_f1, one_threshold_f1 = figures.T
            table[name] = {
                "sentences": len(chosen),
                "auc": auc.mean(),
                "ap": ap.mean(),
                "best_f1": best_f1.mean(),
                "solved": (best_f1 >= 0.9).mean(),
                "one_threshold_f1": one_threshold_f1.mean(),
            }
    print("sentences    auc     ap  bestF1 solved  1-thr")
    for name, row in table.items():
        sentences, *figures = row.values()
        print(f"{sentences:9d} " + " ".join(f"{figure:.4f}" for figure in figures) + f"  {name}")
    return table


def _scores(
    clip: CLIPModel,
    tokenizer: CLIPTokenizer,
    processor: CLIPImageProcessorPil,
    plan: VideoPlan,
    folder: str | os.PathLike | None,
    clip_seconds: float,
) -> list[tuple[Query, np.ndarray, np.ndarray]]:
    """Return each sentence of a video with its similarity to the clips and its truth there, float and bool (clips,)."""
    # A clip's frame is the last one before its center
    centers = np.arange(clip_seconds / 2, plan.duration, clip_seconds)
    times = (np.ceil(centers * FRAME_RATE - 1e-6) - 1) / FRAME_RATE
    if folder is None:
        frames = [render_frame(plan, time) for time in times]
    else:
        frames = list(open_video(os.path.join(folder, f"{plan.vid}.mp4"), clip_seconds))[: len(times)]
    pixels = processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
    images = clip.get_image_features(**pixels)
    tokens = tokenizer([query.text for query in plan.queries], padding=True, return_tensors="pt")
    texts = clip.get_text_features(**tokens)
    similarity = (F.normalize(texts.pooler_output, dim=-1) @ F.normalize(images.pooler_output, dim=-1).T).numpy()
    scores = []
    for query, score in zip(plan.queries, similarity):
        truth = np.array([any(start <= time < end for start, end in query.windows) for time in times])
        if truth.any() and not truth.all():
            scores.append((query, score, truth))
    return scores


def _groups() -> dict[str, Callable[[Query], bool]]:
    """Return the groups of sentences that `measure_clip` reports, as predicates by name."""
    groups = {
        "all": lambda query: True,
        "seen": lambda query: not query.unseen,
        "unseen": lambda query: query.unseen,
        "swapped": lambda query: query.swapped,
    }
    for kind in TEMPLATES:
        groups[kind] = lambda query, kind=kind: query.kind == kind
        groups[f"unseen {kind}"] = lambda query, kind=kind: query.unseen and query.kind == kind
    return groups


def _ranking(score: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """Return AUC, average precision and the best F1 over all thresholds, for similarity and truth of shape (clips,)."""
    order = np.argsort(-score, kind="stable")
    hits = truth[order].cumsum()
    ranks = np.arange(1, len(score) + 1)
    positives, negatives = truth.sum(), (~truth).sum()
    auc = (hits * ~truth[order]).sum() / (positives * negatives)
    return auc, (hits / ranks)[truth[order]].mean(), (2 * hits / (ranks + positives)).max()


def _f1(guess: np.ndarray, truth: np.ndarray) -> float:
    """Return the F1 score of bool arrays, 0 if neither has a true element."""
    return 2 * (guess & truth).sum() / max(1, guess.sum() + truth.sum())
