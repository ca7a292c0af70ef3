"""
A small rendered world: mp4 videos of colored shapes, sentences about them, and the exact windows in which each
sentence is true.

Everything is a function of a seed. Times are seconds; positions, radii and gaps are fractions of the frame's width. An
object is a `Track`: one colored shape that is visible during [start, end). A sentence says that an object is there ("a
red circle"), that two of a kind are ("two red circles"), or that one is next to another ("a red circle next to a blue
star"). While two red circles are visible, so is one: "a red circle" is true then too.

Every video holds objects that share a word with each of its sentences, often with the words swapped (a red star with a
blue circle, for "a red circle" and for "a red circle next to a blue star"). Ten of the hundred color-shape pairs,
`UNSEEN_PAIRS`, are shown only where they are asked for, so that what was trained on the other ninety can be tested on
combinations that it never saw.
"""

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..data.files import atomic_write

FRAME_SIZE = 96  # pixels, square
FRAME_RATE = 5  # frames per second

COLORS = {
    "red": (214, 28, 34),
    "orange": (252, 132, 8),
    "yellow": (250, 226, 36),
    "green": (30, 152, 44),
    "cyan": (44, 218, 226),
    "blue": (28, 62, 222),
    "purple": (124, 34, 166),
    "pink": (255, 146, 200),
    "white": (248, 248, 248),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "ring", "diamond", "moon", "arrow")
PAIRS = tuple(itertools.product(COLORS, SHAPES))
# A permutation: every color and every shape is missing from exactly one pair of the seen ninety
UNSEEN_PAIRS = frozenset((color, SHAPES[(3 * i + 5) % len(SHAPES)]) for i, color in enumerate(COLORS))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)

TEMPLATES = {
    "single": ("{0}", "there is {0}", "{0} appears"),
    "count": ("two {0}", "there are two {0}", "two {0} appear"),
    "relation": ("{0} next to {1}", "{0} beside {1}"),
}

RADII = (0.11, 0.145)  # from and to
NEXT_TO_GAP = 0.03  # at most this between two objects that are next to each other
APART_GAP = 0.09  # at least this between any others, so that a person never has to guess
DRIFT = 0.015  # an object strays at most this far from its place

SHORTEST_WINDOW = 4.0
SHORTEST_PAUSE = 2.0  # between two windows of one sentence
MOST_WINDOWS = 5

Pair = tuple[str | tuple[float, float, float], str]  # (color, shape); a nameless color is (r, g, b) in [0, 255]
Window = tuple[float, float]  # (start, end) in seconds
Point = tuple[float, float]  # (x, y), in frame widths or in radii


@dataclass(frozen=True)
class Track:
    """One object: visible during [start, end) seconds around its place, from which it drifts slowly."""

    pair: Pair
    start: float
    end: float
    place: Point  # the center, in frame widths
    radius: float  # in frame widths
    angle: float = 0.0  # radians
    phase: float = 0.0  # of the drift, radians

    def center(self, time: float) -> Point:
        """Where the center is at `time` seconds, in frame widths: on a slow circle around the place."""
        turn = self.phase + 0.4 * time
        return self.place[0] + DRIFT * math.cos(turn), self.place[1] + DRIFT * math.sin(turn)


@dataclass(frozen=True)
class Statement:
    """What a sentence claims of one pair or, where it is a relation, of two pairs in either order."""

    kind: str  # "single", "count" or "relation"
    pairs: tuple[Pair, ...]

    def text(self, template: int = 0) -> str:
        """The sentence, in one of the wordings of its kind; any number names one."""
        templates = TEMPLATES[self.kind]
        name = _plural if self.kind == "count" else _singular
        return templates[template % len(templates)].format(*map(name, self.pairs))

    def holds(self, tracks: Sequence[Track]) -> bool:
        """Whether it is true of a scene: `tracks` are those visible at one time."""
        if self.kind == "relation":
            either_order = self.pairs, self.pairs[::-1]
            return any((a.pair, b.pair) in either_order and next_to(a, b) for a, b in itertools.combinations(tracks, 2))
        needed = 2 if self.kind == "count" else 1
        return sum(track.pair == self.pairs[0] for track in tracks) >= needed


@dataclass(frozen=True)
class Query:
    """A sentence about a video, and when it is true."""

    text: str
    statement: Statement
    windows: tuple[Window, ...]  # by rising start
    unseen: bool  # it names a pair of UNSEEN_PAIRS
    swapped: bool  # the video also shows its words bound the other way, while it is false

    @property
    def kind(self) -> str:
        """That of the statement."""
        return self.statement.kind


@dataclass(frozen=True)
class VideoPlan:
    """All that a video shows, and what is asked about it."""

    vid: str
    duration: float  # seconds
    tracks: tuple[Track, ...]
    scenery: tuple[tuple[float, int], ...]  # (start in seconds, seed of the background), the first at 0
    queries: tuple[Query, ...] = ()

    def visible(self, time: float) -> list[Track]:
        """The objects that are visible at `time` seconds."""
        return [track for track in self.tracks if track.start <= time < track.end]


def gap(a: Track, b: Track) -> float:
    """Distance between the outlines of two objects at their places, in frame widths."""
    return math.dist(a.place, b.place) - a.radius - b.radius


def next_to(a: Track, b: Track) -> bool:
    """Whether two objects are next to each other: the border lies halfway between the two gaps that occur."""
    return gap(a, b) < (NEXT_TO_GAP + APART_GAP) / 2


def true_windows(statement: Statement, tracks: Sequence[Track]) -> tuple[Window, ...]:
    """The maximal windows in which the statement is true: between two comings or goings nothing changes."""
    borders = sorted({time for track in tracks for time in (track.start, track.end)})
    windows = []
    for start, end in zip(borders, borders[1:]):
        if statement.holds([track for track in tracks if track.start <= start < track.end]):
            if windows and windows[-1][1] == start:
                start = windows.pop()[0]
            windows.append((start, end))
    return tuple(windows)


def plan_video(seed: int, unseen_pairs: bool = False) -> VideoPlan:
    """
    Draws what happens in one video of 30 to 150 s, with 3 to 6 sentences.

    Args:
        seed: names the video; the same seed gives the same plan.
        unseen_pairs: whether it shows, and asks for, pairs of `UNSEEN_PAIRS`.
    """
    rng = np.random.default_rng([seed, int(unseen_pairs)])
    vid = f"rendered_{'unseen_' if unseen_pairs else ''}{seed:06d}"
    while True:
        duration = float(round(rng.uniform(30, 150) * FRAME_RATE) / FRAME_RATE)
        tracks = _draw_tracks(rng, duration, _draw_cast(rng, unseen_pairs))
        queries = _draw_queries(rng, tracks, duration, unseen_pairs)
        if len(queries) >= 3:
            cuts = np.sort(rng.uniform(0.1, 0.9, rng.integers(0, 3))) * duration
            scenery = tuple((float(start), int(rng.integers(2**31))) for start in (0.0, *cuts))
            return VideoPlan(vid, duration, tracks, scenery, queries)


def plan_stills(
    seed: int, count: int, unseen_pairs: bool = False, nameless: bool = False, family: int = 4
) -> list[VideoPlan]:
    """
    Draws scenes of a single frame, at time 0, without sentences.

    Args:
        seed: of all of them together.
        count: how many.
        unseen_pairs: whether they show pairs of `UNSEEN_PAIRS`.
        nameless: whether objects take colors between the named ones, for learning shapes whatever their color. In
            such a pair the color is (r, g, b) in [0, 255].
        family: so many in a row share their cast and background, and hence are hard to tell apart.
    """
    rng = np.random.default_rng([seed, 2 + int(unseen_pairs) + 2 * int(nameless)])
    stills = []
    for i in range(count):
        if i % family == 0:
            cast, background = _draw_cast(rng, unseen_pairs), int(rng.integers(2**31))
            if nameless:
                cast = _draw_nameless(rng, cast)
        tracks = []
        for _ in range(rng.choice(4, p=(0.05, 0.35, 0.45, 0.15))):
            tracks += _place_tracks(rng, *_draw_appearance(rng, cast), 0.0, 1.0, tracks)
        stills.append(VideoPlan(f"still_{seed}_{i}", 1.0, tuple(tracks), ((0.0, background),)))
    return stills


def annotation_rows(plan: VideoPlan) -> list[dict[str, Any]]:
    """One row a sentence, in the QVHighlights shape, with the tags `kind`, `unseen` and `swapped`."""
    return [
        {
            "qid": f"{plan.vid}_{i}",
            "query": query.text,
            "vid": plan.vid,
            "duration": plan.duration,
            "relevant_windows": [list(window) for window in query.windows],
            "kind": query.kind,
            "unseen": query.unseen,
            "swapped": query.swapped,
        }
        for i, query in enumerate(plan.queries)
    ]


def render_frame(plan: VideoPlan, time: float) -> np.ndarray:
    """The picture at `time` seconds: uint8 (FRAME_SIZE, FRAME_SIZE, 3)."""
    background = [seed for start, seed in plan.scenery if start <= time][-1]
    backdrop, strength = _backdrop(background)
    noise = _noise()[(background + int(time * FRAME_RATE)) % len(_noise())]
    return _draw_picture(plan.visible(time), time, backdrop, strength * noise)


def write_video(plan: VideoPlan, path: str | os.PathLike) -> None:
    """Renders the plan to an H.264 mp4. The file appears whole, or not at all."""
    import av  # optional: only those who write or read video need it

    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options={"preset": "ultrafast", "crf": "20"})
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # frames this small gain nothing from threads
        for i in range(round(plan.duration * FRAME_RATE)):
            frame = av.VideoFrame.from_ndarray(render_frame(plan, i / FRAME_RATE), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# What happens in a video. The order of the random draws is part of what a seed means


def _pick(rng: np.random.Generator, options: Sequence) -> Any:
    # Not `rng.choice`, which would make an array of them
    return options[rng.integers(len(options))]


def _draw_cast(rng: np.random.Generator, unseen_pairs: bool) -> list[Pair]:
    """
    The pairs that a video shows: two of unlike color and shape, the same two with their words swapped, and up to two
    others.
    """
    allowed = PAIRS if unseen_pairs else SEEN_PAIRS
    while True:
        first = _pick(rng, sorted(UNSEEN_PAIRS) if unseen_pairs else SEEN_PAIRS)
        second = _pick(rng, allowed)
        swaps = [(first[0], second[1]), (second[0], first[1])]
        any_pair = _pick(rng, allowed)
        same_color = _pick(rng, (first[0], second[0])), _pick(rng, SHAPES)
        others = [any_pair, same_color][: rng.integers(0, 3)]
        cast = [first, second, *swaps, *others]
        if len(set(cast)) == len(cast) and set(cast) <= set(allowed):
            return cast


def _draw_nameless(rng: np.random.Generator, cast: Sequence[Pair]) -> list[Pair]:
    """The cast with each of its colors replaced by a nameless one."""
    shapes = {shape for _, shape in cast}
    paint = {color: _draw_nameless_color(rng, shapes) for color in sorted({color for color, _ in cast})}
    return [(paint[color], shape) for color, shape in cast]


def _draw_nameless_color(rng: np.random.Generator, shapes: Iterable[str]) -> tuple[float, float, float]:
    """
    (r, g, b) in [0, 255], far from every named color: a strong one, since the backgrounds are dull, and one that makes
    none of `shapes` look like an unseen pair.
    """
    while True:
        color = rng.uniform(0, 255, 3)
        nearest = min(COLORS, key=lambda name: math.dist(color, COLORS[name]))
        strong = np.ptp(color) > 100
        between = math.dist(color, COLORS[nearest]) > 60
        if strong and between and UNSEEN_PAIRS.isdisjoint((nearest, shape) for shape in shapes):
            return tuple(color.tolist())


def _draw_tracks(rng: np.random.Generator, duration: float, cast: Sequence[Pair]) -> tuple[Track, ...]:
    """Two sequences of appearances beside each other, each at times of its own; by rising start."""
    tracks = []
    for _ in range(2):
        time = rng.uniform(0, 8)
        while time < duration - 5:
            end = min(time + rng.uniform(4.5, 20), duration)
            appearance = _draw_appearance(rng, cast)
            tracks += _place_tracks(rng, *appearance, round(float(time), 2), round(float(end), 2), tracks)
            time = end + rng.uniform(*_pick(rng, ((0.3, 2), (2, 9))))
    return tuple(sorted(tracks, key=lambda track: track.start))


def _draw_appearance(rng: np.random.Generator, cast: Sequence[Pair]) -> tuple[list[Pair], bool]:
    """Pairs that come together, and whether next to each other."""
    first, second, first_swap, second_swap = cast[:4]
    a, b = (cast[i] for i in rng.permutation(len(cast))[:2])
    alone = [a], False
    twins = [a, a], False
    neighbors = [a, b], True
    # Swaps are frequent, because they are what a bag of words confuses
    swaps = ([first, second], True), ([first_swap, second_swap], True), ([first_swap, second_swap], False)
    return _pick(rng, (alone, alone, twins, twins, neighbors, neighbors, *swaps))


def _place_tracks(
    rng: np.random.Generator,
    pairs: Sequence[Pair],
    together: bool,
    start: float,
    end: float,
    tracks: Sequence[Track],
    attempts: int = 80,
) -> list[Track]:
    """
    New tracks for `pairs`, next to each other where they come `together`, and clear of `tracks` that are visible
    meanwhile. None where there is no room, or where three of a kind would be visible.
    """
    company = [track for track in tracks if track.start < end and start < track.end]
    if any(sum(track.pair == pair for track in company) + pairs.count(pair) > 2 for pair in pairs):
        return []
    for _ in range(attempts):
        new = _draw_places(rng, pairs, together, start, end)
        if _has_room(new, together, company):
            return new
    return []


def _draw_places(
    rng: np.random.Generator, pairs: Sequence[Pair], together: bool, start: float, end: float
) -> list[Track]:
    """One attempt at placing the pairs."""
    new = []
    # Neighbors drift together, so their gap stays what it is
    shared_phase = rng.uniform(0, 2 * math.pi)
    for pair in pairs:
        radius = float(rng.uniform(*RADII))
        if together and new:
            distance = new[0].radius + radius + rng.uniform(0, NEXT_TO_GAP)
            direction = rng.uniform(-0.4, 0.4) + rng.choice([0, math.pi])
            x, y = new[0].place
            place = float(x + distance * math.cos(direction)), float(y + distance * math.sin(direction))
        else:
            place = tuple(rng.uniform(radius + DRIFT, 1 - radius - DRIFT, 2).tolist())
        angle = rng.uniform(-0.3, 0.3)
        phase = shared_phase if together else rng.uniform(0, 2 * math.pi)
        new.append(Track(pair, start, end, place, radius, angle, phase))
    return new


def _has_room(new: Sequence[Track], together: bool, company: Sequence[Track]) -> bool:
    """Whether new objects lie inside the frame and clear of all that they are not next to."""
    clearance = APART_GAP + 2 * DRIFT
    inside = all(track.radius + DRIFT <= edge <= 1 - track.radius - DRIFT for track in new for edge in track.place)
    clear = all(gap(a, b) >= clearance for a in new for b in company)
    return inside and clear and (together or len(new) == 1 or gap(*new) >= clearance)


def _draw_queries(
    rng: np.random.Generator, tracks: Sequence[Track], duration: float, unseen_pairs: bool
) -> tuple[Query, ...]:
    """Up to six sentences in which the kinds take turns; fewer than three where too little happens."""
    shown = sorted({track.pair for track in tracks})
    neighbors = {
        tuple(sorted((a.pair, b.pair)))
        for a, b in itertools.combinations(tracks, 2)
        if a.pair != b.pair and a.start < b.end and b.start < a.end and next_to(a, b)
    }
    candidates = {
        "relation": [
            Statement("relation", pairs if rng.random() < 0.5 else pairs[::-1]) for pairs in sorted(neighbors)
        ],
        "count": [Statement("count", (pair,)) for pair in shown],
        "single": [Statement("single", (pair,)) for pair in shown],
    }
    ranked = []
    for kind, statements in candidates.items():
        queries = [_draw_query(rng, statement, tracks, duration) for statement in statements]
        queries = [queries[i] for i in rng.permutation(len(queries)) if queries[i]]
        if unseen_pairs:
            queries.sort(key=lambda query: not query.unseen)
        for rank, query in enumerate(queries):
            # The rank among its own kind, so that the kinds take turns
            ranked.append((unseen_pairs and not query.unseen, rank + (0.3 if kind == "count" else 0), query))
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(query for *_, query in ranked[: rng.integers(3, 7)])


def _draw_query(
    rng: np.random.Generator, statement: Statement, tracks: Sequence[Track], duration: float
) -> Query | None:
    """
    The statement in words. None where its windows would be too short, too close, too many or nearly the whole video, or
    where nothing in the video resembles it.
    """
    windows = true_windows(statement, tracks)
    durations = [end - start for start, end in windows]
    lasting = windows and min(durations) >= SHORTEST_WINDOW and sum(durations) < 0.7 * duration
    distinct = all(after[0] - before[1] >= SHORTEST_PAUSE for before, after in zip(windows, windows[1:]))
    if not lasting or not distinct or len(windows) > MOST_WINDOWS or not _has_lookalike(statement, tracks):
        return None
    unseen = not UNSEEN_PAIRS.isdisjoint(statement.pairs)
    return Query(statement.text(int(rng.integers(6))), statement, windows, unseen, _has_swap(statement, tracks))


def _has_lookalike(statement: Statement, tracks: Sequence[Track]) -> bool:
    """Whether another object shares its color or its shape with one that the sentence names."""
    words = {word for pair in statement.pairs for word in pair}
    return any(track.pair not in statement.pairs and not words.isdisjoint(track.pair) for track in tracks)


def _has_swap(statement: Statement, tracks: Sequence[Track]) -> bool:
    """Whether all its words are visible at one time in other bindings while the sentence is false."""
    if statement.kind == "count":
        return False
    if statement.kind == "relation":
        (color_a, shape_a), (color_b, shape_b) = statement.pairs
        swap = Statement("relation", ((color_a, shape_b), (color_b, shape_a)))
        return color_a != color_b and shape_a != shape_b and bool(true_windows(swap, tracks))
    color, shape = statement.pairs[0]
    for time in {track.start for track in tracks}:
        visible = {track.pair for track in tracks if track.start <= time < track.end}
        bound_otherwise = any(c == color for c, _ in visible) and any(s == shape for _, s in visible)
        if statement.pairs[0] not in visible and bound_otherwise:
            return True
    return False


def _singular(pair: Pair) -> str:
    return f"{'an' if pair[0] == 'orange' else 'a'} {pair[0]} {pair[1]}"


def _plural(pair: Pair) -> str:
    return f"{pair[0]} {pair[1]}{'es' if pair[1].endswith('s') else 's'}"


# What it looks like. Shapes are drawn by looking up distances in tables, since a data set has many frames

_TABLE_SIZE = 160  # cells a side
_TABLE_REACH = 1.35  # a table spans [-reach, reach] radii
_COLOR_VALUES = {name: np.array(value, np.float32) for name, value in COLORS.items()}


def _draw_picture(tracks: Sequence[Track], time: float, backdrop: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The objects before the backdrop: uint8 (FRAME_SIZE, FRAME_SIZE, 3), from float32 of that shape."""
    picture = backdrop.copy()
    for track in tracks:
        x, y = (FRAME_SIZE * value for value in track.center(time))
        radius = FRAME_SIZE * track.radius
        reach = radius * _TABLE_REACH
        left, top = (max(0, int(value - reach)) for value in (x, y))
        right, bottom = (min(FRAME_SIZE, int(value + reach) + 2) for value in (x, y))
        across = (np.arange(left, right, dtype=np.float32) + 0.5 - x) / radius
        down = (np.arange(top, bottom, dtype=np.float32)[:, None] + 0.5 - y) / radius
        cos, sin = math.cos(track.angle), math.sin(track.angle)
        column, row = _table_index(cos * across + sin * down), _table_index(cos * down - sin * across)
        color, shape = track.pair
        # One pixel of blend along the outline is all the anti-aliasing that it takes
        cover = np.clip(0.5 - radius * _distance_table(shape)[row, column], 0, 1)[..., None]
        region = picture[top:bottom, left:right]
        region += cover * (_COLOR_VALUES.get(color, color) - region)
    picture += noise
    return np.clip(picture, 0, 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _backdrop(seed: int) -> tuple[np.ndarray, np.float32]:
    """
    A background float32 (FRAME_SIZE, FRAME_SIZE, 3), and the strength of its noise: dull middle tones, from which every
    color stands out.
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : FRAME_SIZE * 1j, 0 : 1 : FRAME_SIZE * 1j].astype(np.float32)
    turn, frequency, phase = rng.uniform(0, 2 * math.pi), rng.uniform(2, 16), rng.uniform(0, 2 * math.pi)
    along = math.cos(turn) * (x - 0.5) + math.sin(turn) * (y - 0.5)
    wave = np.sin(frequency * along + phase)
    blobs = wave * np.cos(frequency * (y - x) + phase)
    stripes = (wave > 0).astype(np.float32)
    mix = (0.5 + along * 0.7, 0.5 + 0.5 * wave, 0.5 + 0.5 * blobs, stripes)[rng.integers(4)]
    light, dark = (rng.uniform(70, 165) + rng.uniform(-22, 22, 3) for _ in range(2))
    picture = (dark + np.clip(mix, 0, 1)[..., None] * 0.6 * (light - dark)).astype(np.float32)
    return picture, np.float32(rng.uniform(0, 6))


@lru_cache
def _noise(frames: int = 16) -> np.ndarray:
    """Standard normal float32 (frames, FRAME_SIZE, FRAME_SIZE, 3), which videos repeat."""
    return np.random.default_rng(0).standard_normal((frames, FRAME_SIZE, FRAME_SIZE, 3), dtype=np.float32)


def _table_index(values: np.ndarray) -> np.ndarray:
    """Coordinates in radii -> cells of a table."""
    return np.clip((values + _TABLE_REACH) * (_TABLE_SIZE / (2 * _TABLE_REACH)), 0, _TABLE_SIZE - 1).astype(np.int32)


@lru_cache
def _distance_table(shape: str) -> np.ndarray:
    """Signed distance to the outline, in radii, negative inside: float32 (_TABLE_SIZE, _TABLE_SIZE)."""
    points = (np.arange(_TABLE_SIZE, dtype=np.float32) + 0.5) * (2 * _TABLE_REACH / _TABLE_SIZE) - _TABLE_REACH
    x, y = np.meshgrid(points, points)
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.25
    return _distance_to_polygon(x, y, np.array(_OUTLINES[shape], np.float32))


def _distance_to_polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Signed distance of points (x, y) to the polygon with `corners` (n, 2), negative inside; of the shape of `x`."""
    distance, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - along * dx, y - ay - along * dy))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / dy * dx)
    return np.where(inside, -distance, distance)


def _turned(radii: Sequence[float], first: float = -math.pi / 2) -> list[Point]:
    """Corners at the given radii and at equal angles from `first` on; y points down."""
    turns = [first + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in zip(radii, turns)]


def _arc(center: float, radius: float, first: float, last: float) -> list[Point]:
    """Points of a circle around (center, 0), between two angles."""
    return [(center + radius * math.cos(turn), radius * math.sin(turn)) for turn in np.linspace(first, last, 24)]


def _quarter_turns(corners: list[Point], turns: int) -> list[Point]:
    for _ in range(turns):
        corners = [(-y, x) for x, y in corners]
    return corners


def _heart_corner(t: float) -> Point:
    y = 0.88 * math.cos(t) - 0.34 * math.cos(2 * t) - 0.14 * math.cos(3 * t) - 0.07 * math.cos(4 * t)
    return 1.1 * math.sin(t) ** 3, -y


_CROSS_ARM = [(-0.36, -0.36), (-0.36, -1.1), (0.36, -1.1)]
_OUTLINES = {
    "square": _turned([1.2] * 4, math.pi / 4),
    "triangle": [(x, y + 0.2) for x, y in _turned([1.25] * 3)],
    "star": _turned([1.2, 0.5] * 5),
    "cross": [corner for turns in range(4) for corner in _quarter_turns(_CROSS_ARM, turns)],
    "heart": [_heart_corner(t) for t in np.linspace(0, 2 * math.pi, 48, endpoint=False)],
    "diamond": [(0, -1.25), (0.8, 0), (0, 1.25), (-0.8, 0)],
    # The full disc's left side, and back along a second disc that covers its right side
    "moon": _arc(0.25, 1.1, 0.25 * math.pi, 1.75 * math.pi) + _arc(0.75, 0.83, -0.68 * math.pi, -1.32 * math.pi),
    "arrow": [(-1.15, -0.35), (0.05, -0.35), (0.05, -0.95), (1.2, 0), (0.05, 0.95), (0.05, 0.35), (-1.15, 0.35)],
}
