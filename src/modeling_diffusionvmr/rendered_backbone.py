"""A tiny CLIP that knows the rendered world: the frozen backbone of the embedded model, trained here from nothing on single frames.

A frame matches many sentences, so the loss is pairwise: every frame against every sentence of the batch, with the exact truth. Hard negatives
come for free: frames of one family show the same words in other bindings, and each batch asks for all singles and counts, and for relations
that are true, that are true with their words swapped, or whose two objects are there but apart.
"""

import io
import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup

from .rendered_world import COLOURS, PAIRS, SEEN_PAIRS, SHAPES, TEMPLATES, Statement, next_to, plan_stills, render_frame

IMAGE_SIZE = 72
PATCH_SIZE = 12
PIXEL_MEAN, PIXEL_STD = 0.45, 0.25
MOST_OBJECTS = 6  # in a frame
FAMILY = 4  # frames in a row that share their cast


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with one token for each word of the rendered world; any other word falls apart into pieces, down to bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    texts = {
        Statement(kind, (pair, pair)).text(i)
        for kind, templates in TEMPLATES.items()
        for i in range(len(templates))
        for pair in PAIRS
    }
    words = {
        word: (*word[:-1], word[-1] + "</w>") for word in sorted({word for text in texts for word in text.split()})
    }
    merges = []
    while any(len(pieces) > 1 for pieces in words.values()):
        neighbours = [two for pieces in words.values() for two in zip(pieces, pieces[1:])]
        best = max(sorted(set(neighbours)), key=neighbours.count)
        merges.append(best)
        words = {word: _merge(pieces, best) for word, pieces in words.items()}
    letters = sorted(ByteLevel.alphabet())
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *letters,
        *(letter + "</w>" for letter in letters),
        *("".join(two) for two in merges),
    ]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=32)


def _merge(pieces: tuple, two: tuple) -> tuple:
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == two:
            merged[-1] += piece
        else:
            merged.append(piece)
    return tuple(merged)


def build_image_processor() -> CLIPImageProcessorPil:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=size, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )


def build_clip(tokenizer, width=192, layers=4, text_layers=2) -> CLIPModel:
    """An untrained CLIP of 2.1 million weights. Images, sentences and their tokens share one space of `width` numbers."""
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=text_layers
    )
    text |= dict(num_attention_heads=width // 32, max_position_embeddings=32, hidden_act="relu", **special)
    vision = dict(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=width // 32
    )
    vision |= dict(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, hidden_act="relu")
    # On a CPU in bfloat16, eager attention over so few tokens takes half the time of the fused kernel.
    clip = CLIPModel._from_config(
        CLIPConfig(text_config=text, vision_config=vision, projection_dim=width), attn_implementation="eager"
    )
    # The token states themselves live in the space of the image features, for the model that reads them instead of the projection.
    clip.text_projection.weight.data.copy_(torch.eye(width))
    clip.text_projection.requires_grad_(False)
    _start_vision(clip.vision_model.embeddings)
    # The last layer hands what the patches know to the pooled token: it starts as a plain average of them.
    last = clip.vision_model.encoder.layers[-1].self_attn
    for linear in (last.v_proj, last.out_proj):
        linear.weight.data.copy_(torch.eye(width))
    clip.logit_scale.data.fill_(math.log(10.0))
    return clip


@torch.no_grad()
def _start_vision(embeddings) -> None:
    # Shapes span several patches, so which patch is whose neighbour matters from the first step on: positions start as waves, not as noise,
    # and patches as their own lowest frequencies, a channel each.
    side, width = IMAGE_SIZE // PATCH_SIZE, embeddings.patch_embedding.out_channels
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"))
    speeds = math.pi / 2 * 8.0 ** -torch.linspace(0, 1, width // 4)
    waves = torch.cat([wave(axis[:, None] * speeds) for axis in (x, y) for wave in (torch.sin, torch.cos)], 1)
    embeddings.position_embedding.weight.copy_(torch.cat([torch.zeros(1, width), 0.7 * waves]))
    places = (torch.arange(PATCH_SIZE) + 0.5) / PATCH_SIZE
    basis = torch.cos(math.pi * torch.arange(PATCH_SIZE)[:, None] * places) * math.sqrt(2 / PATCH_SIZE)
    order = sorted(((i, j) for i in range(PATCH_SIZE) for j in range(PATCH_SIZE)), key=lambda two: (sum(two), two))[
        : width // 3
    ]
    filters = torch.stack([torch.outer(basis[i], basis[j]) for i, j in order])  # (width / 3, patch, patch)
    weight = embeddings.patch_embedding.weight.zero_()
    for channel in range(3):
        weight[channel * len(order) : (channel + 1) * len(order), channel] = filters * 0.5


# --- Frames and their truth ----------------------------------------------------------------------------------------------------------------


@dataclass
class Frames:
    """N frames and what they show. Where colours are nameless, `pair` and `neighbour` tell the truth about the shapes only."""

    pixels: torch.Tensor  # uint8 (N, 3, IMAGE_SIZE, IMAGE_SIZE)
    pair: torch.Tensor  # long (N, MOST_OBJECTS): indexes `PAIRS`, -1 where there is no object
    neighbour: torch.Tensor  # long (N, MOST_OBJECTS): the pair of the object next to it, -1 where there is none
    place: torch.Tensor  # float (N, MOST_OBJECTS, 2): the objects' centres (x, y) in frame widths

    def __getitem__(self, index) -> "Frames":
        return Frames(self.pixels[index], self.pair[index], self.neighbour[index], self.place[index])

    @staticmethod
    def concatenated(*several: "Frames") -> "Frames":
        return Frames(*(torch.cat([getattr(frames, each.name) for frames in several]) for each in fields(Frames)))

    def relations(self) -> torch.Tensor:
        """long (N, MOST_OBJECTS): which two pairs are next to each other, as the lower index * len(PAIRS) + the higher; -1 for no neighbour."""
        code = torch.minimum(self.pair, self.neighbour) * len(PAIRS) + torch.maximum(self.pair, self.neighbour)
        return torch.where(self.neighbour < 0, -1, code)

    def counts(self) -> torch.Tensor:
        """How often each pair is shown: long (N, len(PAIRS))."""
        return F.one_hot(self.pair + 1, len(PAIRS) + 1).sum(1)[:, 1:]


_PAIR_INDEX = {pair: i for i, pair in enumerate(PAIRS)}
_SEEN = torch.tensor([_PAIR_INDEX[pair] for pair in SEEN_PAIRS])


def render_frames(seed: int, count: int, nameless: bool = False) -> Frames:
    """`count` frames of seen pairs, or of shapes in nameless colours, degraded as a video codec would."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    pair, neighbour = (np.full((count, MOST_OBJECTS), -1) for _ in range(2))
    place = np.zeros((count, MOST_OBJECTS, 2), np.float32)
    for i, still in enumerate(plan_stills(seed, count, nameless=nameless, family=FAMILY)):
        pixels[i] = _degraded(render_frame(still, 0.0), int(rng.integers(60, 96)))
        for j, track in enumerate(still.tracks):
            pair[i, j], place[i, j] = _index(track), track.centre(0.0)
            for other in still.tracks:
                if other is not track and next_to(track, other):
                    neighbour[i, j] = _index(other)
    return Frames(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), *map(torch.from_numpy, (pair, neighbour, place))
    )


def _index(track) -> int:
    return _PAIR_INDEX.get(track.pair, SHAPES.index(track.pair[1]))


def _degraded(picture: np.ndarray, quality: int) -> np.ndarray:
    # JPEG loses what H.264 loses: fine detail, and colour at half the resolution.
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def _augmented(frames: Frames, generator) -> tuple:
    """(pixel values float (B, 3, size, size), places moved along): flips, shifts and light. No shape's name depends on left or right."""

    def uniform(low, high, *shape):
        return torch.rand(shape, generator=generator) * (high - low) + low

    pixels, place = frames.pixels.float() / 255, frames.place.clone()
    if uniform(0, 1, 1) < 0.5:
        pixels, place[..., 0] = pixels.flip(3), 1 - place[..., 0]
    right, down = (int(torch.randint(-3, 4, (1,), generator=generator)) for _ in range(2))
    pixels = F.pad(pixels, (3, 3, 3, 3), mode="replicate")[
        ..., 3 - down : 3 - down + IMAGE_SIZE, 3 - right : 3 - right + IMAGE_SIZE
    ]
    place += torch.tensor([right, down]) / IMAGE_SIZE
    size = len(pixels)
    pixels = pixels * uniform(0.92, 1.08, size, 1, 1, 1) + uniform(-0.02, 0.02, size, 3, 1, 1)
    return (pixels - PIXEL_MEAN) / PIXEL_STD, place


def _at_objects(patches: torch.Tensor, there: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Features (objects, width) of the patch at each object's centre; `patches` is (B, patches, width), `there` bool (B, MOST_OBJECTS)."""
    side = IMAGE_SIZE // PATCH_SIZE
    column, row = (place * side).long().clamp(0, side - 1).unbind(-1)
    batch = torch.arange(len(there))[:, None].expand_as(there)
    return patches[batch[there], (row * side + column)[there]]


def _families(pool: Frames, count: int, rng) -> Frames:
    """`count` frames, drawn with the whole of their families."""
    chosen = torch.from_numpy(rng.choice(len(pool.pair) // FAMILY, count // FAMILY, replace=False))
    return pool[(chosen[:, None] * FAMILY + torch.arange(FAMILY)).flatten()]


# --- Sentences of a batch ------------------------------------------------------------------------------------------------------------------


def _relations_for(frames: Frames, rng, count: int) -> list:
    """(a, b) indices of `PAIRS`, to ask in one batch: relations that hold in its frames, the same words swapped, and objects that are apart."""
    true = {(int(code) // len(PAIRS), int(code) % len(PAIRS)) for code in frames.relations().unique() if code >= 0}
    shapes, allowed = len(SHAPES), {_PAIR_INDEX[pair] for pair in SEEN_PAIRS}
    swapped = {tuple(sorted((a // shapes * shapes + b % shapes, b // shapes * shapes + a % shapes))) for a, b in true}
    apart = {tuple(sorted({int(p) for p in row if p >= 0})[:2]) for row in frames.pair}
    chosen = []
    for relations, share in ((true, 0.5), (swapped - true, 0.3), (apart - true - swapped, 0.2)):
        relations = sorted(two for two in relations if len(set(two)) == 2 and set(two) <= allowed)
        chosen += [relations[i] for i in rng.permutation(len(relations))[: round(share * count)]]
    return chosen


def _statements_for(frames: Frames, rng, each: int = 60) -> tuple:
    """(statements, truth float (B, statements), numbers of singles, counts and relations): those that hold in the batch, and others."""
    counts = frames.counts()
    statements, truth, sizes = [], [], []
    for kind, holds, number in (("single", counts >= 1, len(SEEN_PAIRS)), ("count", counts >= 2, each)):
        # Those that hold somewhere come first; which others do is random.
        order = np.sort(np.argsort(rng.random(len(SEEN_PAIRS)) - 2 * holds.any(0)[_SEEN].numpy())[:number])
        statements += [Statement(kind, (SEEN_PAIRS[i],)) for i in order]
        truth.append(holds[:, _SEEN[order]])
        sizes.append(len(order))
    relations = _relations_for(frames, rng, each)
    statements += [
        Statement("relation", (PAIRS[a], PAIRS[b]) if rng.random() < 0.5 else (PAIRS[b], PAIRS[a]))
        for a, b in relations
    ]
    codes = torch.tensor([min(two) * len(PAIRS) + max(two) for two in relations], dtype=torch.long)
    truth.append((frames.relations()[:, :, None] == codes).any(1))
    return statements, torch.cat(truth, 1).float(), [*sizes, len(relations)]


# --- Training ------------------------------------------------------------------------------------------------------------------------------


def train_rendered_clip(
    seed=0, steps=4000, batch_size=128, pool_size=32_000, learning_rate=1.5e-3, progress=None
) -> tuple:
    """(CLIPModel, CLIPTokenizer, CLIPImageProcessorPil), trained on frames of seen pairs.

    A batch is `batch_size` frames, and a quarter more in nameless colours. `progress(step, steps, losses)` is called after each step with one
    float a term.
    """
    torch.manual_seed(seed)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    tokenizer, processor = build_tokenizer(), build_image_processor()
    clip = build_clip(tokenizer)
    helpers = _Helpers(clip.config.vision_config.hidden_size, clip.config.projection_dim)
    parameters = [parameter for parameter in (*clip.parameters(), *helpers.parameters()) if parameter.requires_grad]
    weights, others = ([p for p in parameters if (p.ndim > 1) == is_weight] for is_weight in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, min(100, steps // 10), steps)
    pool, nameless_pool = render_frames(seed, pool_size), render_frames(seed, pool_size // 2, nameless=True)
    clip.train()
    for step in range(steps):
        frames, nameless = _families(pool, batch_size, rng), _families(nameless_pool, batch_size // 4, rng)
        losses = _losses(clip, helpers, tokenizer, frames, nameless, rng, generator)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, {name: loss.item() for name, loss in losses.items()})
    return clip.eval(), tokenizer, processor


class _Helpers(nn.Module):
    """What only training needs: it describes the object of a patch in words, and says what a pair's vector should be."""

    def __init__(self, width: int, projection: int):
        super().__init__()
        # The object's colour and shape, and its neighbour's, where 0 is none.
        self.describe = nn.ModuleDict(
            {
                "colour": nn.Linear(width, len(COLOURS)),
                "shape": nn.Linear(width, len(SHAPES)),
                "neighbour_colour": nn.Linear(width, len(COLOURS) + 1),
                "neighbour_shape": nn.Linear(width, len(SHAPES) + 1),
            }
        )
        self.colours = nn.Parameter(torch.randn(len(COLOURS), projection))
        self.shapes = nn.Parameter(torch.randn(len(SHAPES), projection))
        self.bias = nn.Parameter(torch.tensor(-6.0))

    def products(self) -> torch.Tensor:
        """(seen pairs, projection): colour times shape, for what a product says of ninety pairs it says of the other ten as well."""
        return F.normalize(self.colours[_SEEN // len(SHAPES)] * self.shapes[_SEEN % len(SHAPES)], dim=-1)


def _losses(clip, helpers, tokenizer, frames: Frames, nameless: Frames, rng, generator) -> dict:
    # The nameless follow the named ones: whatever is said of colours and of sentences stops before them.
    both, named = Frames.concatenated(frames, nameless), len(frames.pair)
    pixels, place = _augmented(both, generator)
    statements, truth, sizes = _statements_for(frames, rng)
    tokens = tokenizer(
        [statement.text(int(rng.integers(6))) for statement in statements], padding=True, return_tensors="pt"
    )
    with torch.autocast("cpu", torch.bfloat16):
        vision = clip.vision_model(pixel_values=pixels, output_hidden_states=True)
        images = clip.visual_projection(vision.pooler_output[:named])
        texts = clip.text_projection(clip.text_model(**tokens).pooler_output)
        # The patches that the last layer pools already know what they show, one object each: binding is settled before objects are mixed.
        patches = _at_objects(vision.hidden_states[-2][:, 1:], both.pair >= 0, place)
        described = {name: head(patches) for name, head in helpers.describe.items()}
        objects = clip.visual_projection(clip.vision_model.post_layernorm(patches))
    images, texts, objects = (F.normalize(vectors.float(), dim=-1) for vectors in (images, texts, objects))

    pairwise = F.binary_cross_entropy_with_logits(
        clip.logit_scale.exp() * images @ texts.T + helpers.bias, truth, reduction="none"
    )
    by_kind = zip(("single", "count", "relation"), pairwise.split(sizes, 1), truth.split(sizes, 1))
    losses = {kind: loss.sum() / true.sum().clamp(min=1) for kind, loss, true in by_kind}

    shown = both.pair >= 0
    pair, neighbour, known = both.pair[shown], both.neighbour[shown], int((frames.pair >= 0).sum())
    alone = neighbour < 0
    labels = {
        "colour": pair // len(SHAPES),
        "shape": pair % len(SHAPES),
        "neighbour_colour": (neighbour // len(SHAPES) + 1).masked_fill(alone, 0),
        "neighbour_shape": (neighbour % len(SHAPES) + 1).masked_fill(alone, 0),
    }
    for name, label in labels.items():
        end = known if "colour" in name else len(label)
        losses[name] = F.cross_entropy(described[name][:end].float(), label[:end])

    products, names = helpers.products(), texts[: len(SEEN_PAIRS)]
    losses["object"] = _match(objects[:known], products, torch.searchsorted(_SEEN, pair[:known]))
    losses["name"] = _match(names, products, torch.arange(len(names)))
    return losses


def _match(vectors: torch.Tensor, products: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
    """Each unit vector (n, size) should be nearest to its own product, and there."""
    return F.cross_entropy(20 * vectors @ products.T, which) + 2 * (1 - (vectors * products[which]).sum(-1)).mean()


# --- Measuring -----------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_clip(clip, tokenizer, processor, plans, folder=None, clip_seconds=2.0) -> dict:
    """How well cosine similarity finds the true clips of each sentence within its video, from one frame at each clip's centre.

    Frames are decoded from `folder/<vid>.mp4` where a folder is given, and rendered otherwise. A row a kind: sentences, and the means of AUC,
    average precision and best F1 over all thresholds, the share of sentences with a best F1 of 0.9 or more, and F1 at one threshold for all.
    """
    scores = []
    for plan in plans:
        times = [i * clip_seconds + clip_seconds / 2 for i in range(int(plan.duration / clip_seconds))]
        frames = _decoded(f"{folder}/{plan.vid}.mp4", times) if folder else [render_frame(plan, time) for time in times]
        images = clip.get_image_features(
            **processor(images=[Image.fromarray(frame) for frame in frames], return_tensors="pt")
        )
        texts = clip.get_text_features(
            **tokenizer([query.text for query in plan.queries], padding=True, return_tensors="pt")
        )
        similarity = (F.normalize(texts.pooler_output, dim=-1) @ F.normalize(images.pooler_output, dim=-1).T).numpy()
        for query, row in zip(plan.queries, similarity):
            truth = np.array([any(start <= time < end for start, end in query.windows) for time in times])
            if truth.any() and not truth.all():
                scores.append((query, row, truth))
    every, true = np.concatenate([row for _, row, _ in scores]), np.concatenate([truth for *_, truth in scores])
    threshold = max(np.quantile(every, np.linspace(0.5, 0.99, 99)), key=lambda value: _f1(every >= value, true))
    tags = {
        "all": lambda q: True,
        "seen": lambda q: not q.unseen,
        "unseen": lambda q: q.unseen,
        "swapped": lambda q: q.swapped,
    }
    for kind in TEMPLATES:
        tags |= {
            kind: lambda q, kind=kind: q.kind == kind,
            f"unseen {kind}": lambda q, kind=kind: q.unseen and q.kind == kind,
        }
    table = {}
    for tag, belongs in tags.items():
        chosen = [(row, truth) for query, row, truth in scores if belongs(query)]
        if chosen:
            figures = np.array([(*_ranking(row, truth), _f1(row >= threshold, truth)) for row, truth in chosen])
            table[tag] = dict(
                sentences=len(chosen), auc=figures[:, 0].mean(), ap=figures[:, 1].mean(), best_f1=figures[:, 2].mean()
            )
            table[tag] |= dict(solved=(figures[:, 2] >= 0.9).mean(), one_threshold_f1=figures[:, 3].mean())
    print("sentences    auc     ap  bestF1 solved  1-thr")
    for tag, row in table.items():
        sentences, *figures = row.values()
        print(f"{sentences:9d} " + " ".join(f"{figure:.4f}" for figure in figures) + f"  {tag}")
    return table


def _ranking(score: np.ndarray, truth: np.ndarray) -> tuple:
    """(AUC, average precision, best F1 over all thresholds) of one sentence."""
    order = np.argsort(-score, kind="stable")
    hits = truth[order].cumsum()
    ranks = np.arange(1, len(score) + 1)
    positives, negatives = truth.sum(), (~truth).sum()
    auc = (hits * ~truth[order]).sum() / (positives * negatives)
    return auc, (hits / ranks)[truth[order]].mean(), (2 * hits / (ranks + positives)).max()


def _f1(guess: np.ndarray, truth: np.ndarray) -> float:
    return 2 * (guess & truth).sum() / max(1, guess.sum() + truth.sum())


def _decoded(path, times) -> list:
    """The frame that is on screen at each of the times (rising): uint8 (H, W, 3)."""
    import av

    frames, shown = [], None
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            while len(frames) < len(times) and frame.time > times[len(frames)] and shown is not None:
                frames.append(shown.to_ndarray(format="rgb24"))
            shown = frame
    return frames + [shown.to_ndarray(format="rgb24")] * (len(times) - len(frames))
