"""
A small rendered world: mp4 videos of colored shapes, sentences about them, and the exact windows in which each sentence
is true.

Everything is a function of a seed. Times are in seconds; positions, radii and gaps are fractions of the frame's width.
An object is a `Track`: one colored shape that is visible during [start, end). A sentence says that an object is visible
("a red circle"), that two of a kind are ("two red circles"), or that two objects are next to each other ("a red circle
next to a blue star"). "A red circle" is also true while two red circles are visible.

Each sentence has distractors in its video: objects that share a word with it, often with the words swapped (a red star
and a blue circle for "a red circle" or "a red circle next to a blue star"). Ten of the hundred color-shape pairs,
`UNSEEN_PAIRS`, appear only on request. A model trained on the other ninety can be tested on these combinations.

A long video consists of such videos, its scenes, one after the other, some of them in slow motion.
"""

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
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
# Every color and every shape is in exactly one of these pairs
UNSEEN_PAIRS = frozenset((color, SHAPES[(3 * i + 5) % len(SHAPES)]) for i, color in enumerate(COLORS))
SEEN_PAIRS = tuple(pair for pair in PAIRS if pair not in UNSEEN_PAIRS)

TEMPLATES = {
    "single": ("{0}", "there is {0}", "{0} appears"),
    "count": ("two {0}", "there are two {0}", "two {0} appear"),
    "relation": ("{0} next to {1}", "{0} beside {1}"),
}

RADII = (0.11, 0.145)  # smallest and largest
NEXT_TO_GAP = 0.03  # largest gap between two objects that are next to each other
APART_GAP = 0.09  # smallest gap between any other two, so that the difference is plain to see
DRIFT = 0.015  # how far an object moves from its place

SHORTEST_WINDOW = 4.0
SHORTEST_PAUSE = 2.0  # between two windows of one sentence
MAX_WINDOWS = 5  # per sentence

ASKED_SCENES = 10  # of a long video: the largest number of scenes with sentences
SLOW_SCENE_EVERY = 3  # of these, one is in slow motion
LONGEST_WINDOWS = (60.0, 300.0)  # of a scene in slow motion: the shortest and the longest one
SCENE_SEEDS = (2**32, 2**33)  # of the scenes of long videos: those of other videos are smaller

Pair = tuple[str | tuple[float, float, float], str]  # (color, shape); a color without a name is (r, g, b) in [0, 255]
Window = tuple[float, float]  # (start, end) in seconds
Point = tuple[float, float]  # (x, y) in frame widths or in radii


@dataclass(frozen=True)
class Track:
    """An object that is visible during [start, end) seconds and drifts slowly around its place."""

    pair: Pair
    start: float
    end: float
    place: Point  # of its center, in frame widths
    radius: float  # in frame widths
    angle: float = 0.0  # radians
    phase: float = 0.0  # of the drift, radians

    def center(self, time: float) -> Point:
        """Return the center at `time` seconds, in frame widths. It moves on a small circle around the place."""
        turn = self.phase + 0.4 * time
        return self.place[0] + DRIFT * math.cos(turn), self.place[1] + DRIFT * math.sin(turn)


@dataclass(frozen=True)
class Statement:
    """What a sentence claims about one pair or, for a relation, about two pairs in either order."""

    kind: str  # "single", "count" or "relation"
    pairs: tuple[Pair, ...]

    def text(self, template: int = 0) -> str:
        """Return the sentence in one of the wordings of its kind: `template` modulo their number."""
        templates = TEMPLATES[self.kind]
        name = _plural if self.kind == "count" else _singular
        return templates[template % len(templates)].format(*map(name, self.pairs))

    def holds(self, tracks: Sequence[Track]) -> bool:
        """Return whether the statement is true of the objects visible at one time."""
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
    windows: tuple[Window, ...]  # by ascending start
    unseen: bool  # whether it names a pair of UNSEEN_PAIRS
    swapped: bool  # whether the video shows the sentence's words in other combinations while the sentence is false

    @property
    def kind(self) -> str:
        """The kind of its statement."""
        return self.statement.kind


@dataclass(frozen=True)
class VideoPlan:
    """The content of a video, and the sentences about it."""

    vid: str
    duration: float  # seconds
    tracks: tuple[Track, ...]
    scenery: tuple[tuple[float, int], ...]  # (start in seconds, seed of the background), the first at 0
    queries: tuple[Query, ...] = ()
    scenes: tuple[float, ...] = (0.0,)  # start of each scene in seconds

    def visible(self, time: float) -> list[Track]:
        """Return the objects visible at `time` seconds."""
        return [track for track in self.tracks if track.start <= time < track.end]


def gap(a: Track, b: Track) -> float:
    """Return the distance between the outlines of two objects at their places, in frame widths."""
    return math.dist(a.place, b.place) - a.radius - b.radius


def next_to(a: Track, b: Track) -> bool:
    """Return whether two objects are next to each other. The limit lies between `NEXT_TO_GAP` and `APART_GAP`."""
    return gap(a, b) < (NEXT_TO_GAP + APART_GAP) / 2


def true_windows(statement: Statement, tracks: Sequence[Track]) -> tuple[Window, ...]:
    """Return the maximal windows in which the statement is true."""
    # Nothing changes between two times at which an object appears or disappears
    borders = sorted({time for track in tracks for time in (track.start, track.end)})
    windows: list[Window] = []
    for start, end in zip(borders, borders[1:]):
        if statement.holds([track for track in tracks if track.start <= start < track.end]):
            if windows and windows[-1][1] == start:
                start = windows.pop()[0]
            windows.append((start, end))
    return tuple(windows)


def plan_video(seed: int, unseen_pairs: bool = False) -> VideoPlan:
    """
    Draw the content of one video of 30 to 150 s, with 3 to 6 sentences.

    Args:
        seed: identifies the video. The same seed gives the same plan.
        unseen_pairs: whether the video shows pairs of `UNSEEN_PAIRS` and its sentences ask for them.
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


def plan_long_video(seed: int, duration: float, unseen_pairs: bool = False) -> VideoPlan:
    """
    Draw a video of several scenes, of which up to `ASKED_SCENES` have sentences. Each sentence is true in one scene
    only. Some of these scenes are in slow motion, in which a window lasts up to 5 minutes.

    Args:
        seed: identifies the video. The same arguments give the same plan.
        duration: in seconds, at least 150.
        unseen_pairs: as in `plan_video`, for every scene.

    Raises:
        ValueError: if the video is too short for any scene.
    """
    if duration < 150:
        raise ValueError(f"a long video must last at least 150 s, got {duration!r}")
    rng = np.random.default_rng([seed, 7])
    asked = _draw_asked_scenes(rng, duration, unseen_pairs)
    statements = [query.statement for scene in asked for query in scene.queries]
    scenes, filled = list(asked), sum(scene.duration for scene in asked)
    while filled < duration:
        other = replace(_draw_scene(rng, unseen_pairs), queries=())
        if not any(_is_shown(statement, other) for statement in statements):
            scenes.append(_cut(other, 0.0, min(duration - filled, other.duration)))
            filled += scenes[-1].duration
    # Ask only sentences that no other scene shows
    for i, scene in enumerate(asked):
        others = [other for other in asked if other is not scene]
        queries = [q for q in scene.queries if not any(_is_shown(q.statement, other) for other in others)]
        scenes[i] = replace(scene, queries=tuple(queries))
    vid = f"rendered_{'unseen_' if unseen_pairs else ''}{seed:06d}_{duration:g}s"
    return _joined(vid, [scenes[i] for i in rng.permutation(len(scenes))])


def plan_stills(
    seed: int, count: int, unseen_pairs: bool = False, nameless: bool = False, family: int = 4
) -> list[VideoPlan]:
    """
    Draw scenes of a single frame, at time 0, without sentences.

    Args:
        seed: seed of the random draws, for all scenes together.
        count: number of scenes.
        unseen_pairs: whether they show pairs of `UNSEEN_PAIRS`.
        nameless: whether objects have colors between the named ones, to learn shapes independently of color. The color
            of such a pair is (r, g, b) in [0, 255].
        family: number of consecutive scenes that share their cast and background, which makes them hard to tell apart.
    """
    rng = np.random.default_rng([seed, 2 + int(unseen_pairs) + 2 * int(nameless)])
    stills = []
    for i in range(count):
        if i % family == 0:
            cast, background = _draw_cast(rng, unseen_pairs), int(rng.integers(2**31))
            if nameless:
                cast = _draw_nameless(rng, cast)
        tracks: list[Track] = []
        for _ in range(rng.choice(4, p=(0.05, 0.35, 0.45, 0.15))):
            tracks += _place_tracks(rng, *_draw_appearance(rng, cast), 0.0, 1.0, tracks)
        stills.append(VideoPlan(f"still_{seed}_{i}", 1.0, tuple(tracks), ((0.0, background),)))
    return stills


def annotation_rows(plan: VideoPlan) -> list[dict[str, Any]]:
    """Return one row per sentence in the QVHighlights format, plus the fields `kind`, `unseen` and `swapped`."""
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


def absent_queries(plan: VideoPlan, seed: int, recombined: bool) -> tuple[Query, ...]:
    """
    Draw sentences that are true at no time in a video: one for each of its sentences, of the same kind if possible.

    Args:
        plan: the video.
        seed: of the random draws.
        recombined: whether the video shows every color and every shape that a sentence names, but not as it says. If
            possible, the sentence names an object that the video never shows: "a blue circle", if there are a red
            circle and a blue star. Otherwise it says that objects of the video are next to each other, or that there
            are two of them. If no such sentence is false, the tuple is shorter. If not `recombined`, the sentence names
            an object whose color or shape the video never shows.
    """
    rng = np.random.default_rng([seed, 7, int(recombined)])
    shown = {track.pair for track in plan.tracks}
    words = {word for pair in shown for word in pair}
    allowed = PAIRS if any(query.unseen for query in plan.queries) else SEEN_PAIRS
    pairs = [pair for pair in allowed if words.issuperset(pair)] if recombined else allowed
    queries: list[Query] = []
    for present in plan.queries:
        asked = {(query.kind, frozenset(query.statement.pairs)) for query in queries}
        for all_shown, kind in itertools.product((False, True), (present.kind, "relation", "count", "single")):
            choices = list(itertools.permutations(pairs, 2 if kind == "relation" else 1))
            statements = (Statement(kind, choices[i]) for i in rng.permutation(len(choices)))
            fitting = (
                statement
                for statement in statements
                if words.issuperset(itertools.chain(*statement.pairs)) == recombined
                and shown.issuperset(statement.pairs) == all_shown
                and (kind, frozenset(statement.pairs)) not in asked
                and not true_windows(statement, plan.tracks)
            )
            if statement := next(fitting, None):
                text = statement.text(int(rng.integers(6)))
                unseen = not UNSEEN_PAIRS.isdisjoint(statement.pairs)
                queries.append(Query(text, statement, (), unseen, _has_swap(statement, plan.tracks)))
                break
    return tuple(queries)


def render_frame(plan: VideoPlan, time: float) -> np.ndarray:
    """Render the frame at `time` seconds: uint8 (FRAME_SIZE, FRAME_SIZE, 3)."""
    background = [seed for start, seed in plan.scenery if start <= time][-1]
    backdrop, strength = _backdrop(background)
    noise = _noise()[(background + int(time * FRAME_RATE)) % len(_noise())]
    return _draw_picture(plan.visible(time), time, backdrop, strength * noise)


def clip_frames(plan: VideoPlan, clip_seconds: float) -> tuple[np.ndarray, float]:
    """
    Render only the frames that a backbone reads, one per clip: the last one before the center of the clip, as FFmpeg
    takes it from a file. Return them, uint8 (clips, FRAME_SIZE, FRAME_SIZE, 3), and their number per second.
    """
    count = max(1, int(plan.duration / clip_seconds + 0.5))
    numbers = np.ceil((np.arange(count) + 0.5) * clip_seconds * FRAME_RATE) - 1
    times = np.minimum(numbers / FRAME_RATE, plan.duration - 1 / FRAME_RATE)
    return np.stack([render_frame(plan, time) for time in times.tolist()]), 1 / clip_seconds


def write_video(plan: VideoPlan, path: str | os.PathLike) -> None:
    """Render the plan to an H.264 mp4 file, atomically."""
    import av  # an optional dependency

    with atomic_write(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAME_RATE, options={"preset": "ultrafast", "crf": "20"})
        stream.width = stream.height = FRAME_SIZE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # such small frames gain nothing from threads
        for i in range(round(plan.duration * FRAME_RATE)):
            frame = av.VideoFrame.from_ndarray(render_frame(plan, i / FRAME_RATE), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# Drawing the content of a video. The order of the random draws determines what a seed gives: do not change it


def _pick(rng: np.random.Generator, options: Sequence) -> Any:
    # `rng.choice` would convert the options to an array
    return options[int(rng.integers(len(options)))]


def _draw_cast(rng: np.random.Generator, unseen_pairs: bool) -> list[Pair]:
    """
    Draw the pairs that a video shows: two that differ in color and shape, the same two with their shapes swapped, and
    up to two others.
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
    """Replace each color of a cast by a color without a name."""
    shapes = {shape for _, shape in cast}
    paint = {color: _draw_nameless_color(rng, shapes) for color in sorted({color for color, _ in cast})}
    return [(paint[color], shape) for color, shape in cast]


def _draw_nameless_color(rng: np.random.Generator, shapes: Iterable[str]) -> tuple[float, float, float]:
    """
    Draw (r, g, b) in [0, 255] far from every named color. The color is strong, because the backgrounds are dull, and
    does not make any of `shapes` look like an unseen pair.
    """
    while True:
        color = rng.uniform(0, 255, 3)
        nearest = min(COLORS, key=lambda name: math.dist(color, COLORS[name]))
        strong = np.ptp(color) > 100
        between = math.dist(color, COLORS[nearest]) > 60
        if strong and between and UNSEEN_PAIRS.isdisjoint((nearest, shape) for shape in shapes):
            return tuple(color.tolist())


def _draw_tracks(rng: np.random.Generator, duration: float, cast: Sequence[Pair]) -> tuple[Track, ...]:
    """Draw two independent sequences of appearances. Return all tracks by ascending start."""
    tracks: list[Track] = []
    for _ in range(2):
        time = rng.uniform(0, 8)
        while time < duration - 5:
            end = min(time + rng.uniform(4.5, 20), duration)
            appearance = _draw_appearance(rng, cast)
            tracks += _place_tracks(rng, *appearance, round(float(time), 2), round(float(end), 2), tracks)
            time = end + rng.uniform(*_pick(rng, ((0.3, 2), (2, 9))))
    return tuple(sorted(tracks, key=lambda track: track.start))


def _draw_scene(rng: np.random.Generator, unseen_pairs: bool) -> VideoPlan:
    """Draw one scene of a long video."""
    return plan_video(int(rng.integers(*SCENE_SEEDS)), unseen_pairs)


def _draw_asked_scenes(rng: np.random.Generator, duration: float, unseen_pairs: bool) -> list[VideoPlan]:
    """Draw the scenes with sentences of a video of `duration` seconds: at least one, at most `ASKED_SCENES`."""
    scenes: list[VideoPlan] = []
    left = duration
    while len(scenes) < ASKED_SCENES:
        is_slow = len(scenes) % SLOW_SCENE_EVERY == 0
        scene = _draw_slow_scene(rng, unseen_pairs) if is_slow else _draw_scene(rng, unseen_pairs)
        if scene.duration <= left:
            scenes.append(scene)
            left -= scene.duration
        elif scenes:
            break
    return scenes


def _draw_slow_scene(rng: np.random.Generator, unseen_pairs: bool) -> VideoPlan:
    """Draw a scene in slow motion: the part of a scene that has its longest window in the middle."""
    while True:
        scene = _draw_scene(rng, unseen_pairs)
        start, end = _longest_window(scene)
        margin = (end - start) / 3
        part = _cut(scene, max(0.0, start - margin), min(end + margin, scene.duration))
        slow = _slowed(part, rng.uniform(*LONGEST_WINDOWS) / (end - start))
        # The sentence may have lost its lookalike, or be true for too large a share of the part
        if slow.queries and np.ptp(_longest_window(slow)) >= LONGEST_WINDOWS[0]:
            return slow


def _longest_window(plan: VideoPlan) -> Window:
    windows = (window for query in plan.queries for window in query.windows)
    return max(windows, key=lambda window: window[1] - window[0])


def _slowed(plan: VideoPlan, tempo: float) -> VideoPlan:
    """Return the plan with all times multiplied by `tempo`. Objects drift as fast as before."""
    return _retimed(
        plan,
        math.ceil(tempo * plan.duration * FRAME_RATE) / FRAME_RATE,
        [replace(track, start=tempo * track.start, end=tempo * track.end) for track in plan.tracks],
        [(tempo * start, background) for start, background in plan.scenery],
    )


def _cut(plan: VideoPlan, start: float, end: float) -> VideoPlan:
    """Return the plan from `start` to `end` seconds."""
    return _retimed(
        plan,
        end - start,
        [
            replace(track, start=max(track.start, start) - start, end=min(track.end, end) - start)
            for track in plan.tracks
            if track.start < end and start < track.end
        ],
        [(max(begin - start, 0.0), background) for begin, background in plan.scenery if begin < end],
    )


def _retimed(
    plan: VideoPlan, duration: float, tracks: Sequence[Track], scenery: Sequence[tuple[float, int]]
) -> VideoPlan:
    """Return the plan with other times, and those of its sentences that can still be asked."""
    queries = [
        replace(query, windows=windows, swapped=_has_swap(query.statement, tracks))
        for query in plan.queries
        if (windows := _windows_to_ask(query.statement, tracks, duration))
    ]
    return replace(plan, duration=duration, tracks=tuple(tracks), scenery=tuple(scenery), queries=tuple(queries))


def _is_shown(statement: Statement, plan: VideoPlan) -> bool:
    """Return whether a statement is true at any time of a video."""
    shown = {track.pair for track in plan.tracks}
    return shown.issuperset(statement.pairs) and bool(true_windows(statement, plan.tracks))


def _joined(vid: str, plans: Sequence[VideoPlan]) -> VideoPlan:
    """Return one video of several, one after the other."""
    starts = [float(start) for start in np.cumsum([0.0, *(plan.duration for plan in plans)]).round(6)]

    def shifted(window: Window, start: float) -> Window:
        return window[0] + start, window[1] + start

    parts = list(zip(starts, plans))
    return VideoPlan(
        vid,
        starts[-1],
        tuple(replace(t, start=t.start + start, end=t.end + start) for start, plan in parts for t in plan.tracks),
        tuple((begin + start, background) for start, plan in parts for begin, background in plan.scenery),
        tuple(
            replace(query, windows=tuple(shifted(window, start) for window in query.windows))
            for start, plan in parts
            for query in plan.queries
        ),
        tuple(starts[:-1]),
    )


def _draw_appearance(rng: np.random.Generator, cast: Sequence[Pair]) -> tuple[list[Pair], bool]:
    """Draw pairs that appear together, and whether they are next to each other."""
    first, second, first_swap, second_swap = cast[:4]
    a, b = (cast[i] for i in rng.permutation(len(cast))[:2])
    alone = [a], False
    twins = [a, a], False
    neighbors = [a, b], True
    # Swaps are frequent because a bag of words cannot tell them apart
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
    Return new tracks for `pairs`, next to each other if `together`, and apart from all `tracks` visible at the same
    time. The list is empty if there is no room, or if three objects of one pair would be visible.
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
    """Draw a place for each of the pairs, without checking that there is room."""
    new: list[Track] = []
    # Neighbors drift in phase, so their gap does not change
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
    """Return whether new objects lie inside the frame and apart from all objects that they are not next to."""
    clearance = APART_GAP + 2 * DRIFT
    inside = all(track.radius + DRIFT <= edge <= 1 - track.radius - DRIFT for track in new for edge in track.place)
    clear = all(gap(a, b) >= clearance for a in new for b in company)
    return inside and clear and (together or len(new) == 1 or gap(*new) >= clearance)


def _draw_queries(
    rng: np.random.Generator, tracks: Sequence[Track], duration: float, unseen_pairs: bool
) -> tuple[Query, ...]:
    """Draw up to six sentences of alternating kinds; fewer than three if too little happens in the video."""
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
        drawn = [_draw_query(rng, statement, tracks, duration) for statement in statements]
        queries = [query for i in rng.permutation(len(drawn)) if (query := drawn[i])]
        if unseen_pairs:
            queries.sort(key=lambda query: not query.unseen)
        for rank, query in enumerate(queries):
            # Ranking within each kind makes the kinds alternate
            ranked.append((unseen_pairs and not query.unseen, rank + (0.3 if kind == "count" else 0), query))
    ranked.sort(key=lambda entry: entry[:2])
    return tuple(query for *_, query in ranked[: rng.integers(3, 7)])


def _draw_query(
    rng: np.random.Generator, statement: Statement, tracks: Sequence[Track], duration: float
) -> Query | None:
    """Put a statement into words. Return `None` if it cannot be asked, see `_windows_to_ask`."""
    windows = _windows_to_ask(statement, tracks, duration)
    if not windows:
        return None
    unseen = not UNSEEN_PAIRS.isdisjoint(statement.pairs)
    return Query(statement.text(int(rng.integers(6))), statement, windows, unseen, _has_swap(statement, tracks))


def _windows_to_ask(statement: Statement, tracks: Sequence[Track], duration: float) -> tuple[Window, ...]:
    """
    Return the windows in which a statement is true. Return none if they are too short, too close to each other, too
    many or nearly the whole video, or if no other object in the video shares a word with it.
    """
    windows = true_windows(statement, tracks)
    durations = [end - start for start, end in windows]
    lasting = windows and min(durations) >= SHORTEST_WINDOW and sum(durations) < 0.7 * duration
    distinct = all(after[0] - before[1] >= SHORTEST_PAUSE for before, after in zip(windows, windows[1:]))
    if not lasting or not distinct or len(windows) > MAX_WINDOWS or not _has_lookalike(statement, tracks):
        return ()
    return windows


def _has_lookalike(statement: Statement, tracks: Sequence[Track]) -> bool:
    """Return whether an object of another pair shares its color or shape with one that the sentence names."""
    words = {word for pair in statement.pairs for word in pair}
    return any(track.pair not in statement.pairs and not words.isdisjoint(track.pair) for track in tracks)


def _has_swap(statement: Statement, tracks: Sequence[Track]) -> bool:
    """Return whether all words of the sentence are visible at one time in other combinations, while it is false."""
    if statement.kind == "count":
        return False
    if statement.kind == "relation":
        (color_a, shape_a), (color_b, shape_b) = statement.pairs
        swap = Statement("relation", ((color_a, shape_b), (color_b, shape_a)))
        return color_a != color_b and shape_a != shape_b and bool(true_windows(swap, tracks))
    color, shape = statement.pairs[0]
    for time in {track.start for track in tracks}:
        visible = {track.pair for track in tracks if track.start <= time < track.end}
        recombined = any(c == color for c, _ in visible) and any(s == shape for _, s in visible)
        if statement.pairs[0] not in visible and recombined:
            return True
    return False


def _singular(pair: Pair) -> str:
    return f"{'an' if pair[0] == 'orange' else 'a'} {pair[0]} {pair[1]}"


def _plural(pair: Pair) -> str:
    return f"{pair[0]} {pair[1]}{'es' if pair[1].endswith('s') else 's'}"


# Drawing frames. Distances to a shape's outline come from a table, which is much faster than computing them

_TABLE_SIZE = 160  # cells per side
_TABLE_REACH = 1.35  # a table spans [-reach, reach] radii
_COLOR_VALUES = {name: np.array(value, np.float32) for name, value in COLORS.items()}


def _draw_picture(tracks: Sequence[Track], time: float, backdrop: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Draw objects on a backdrop and add noise: float32 to uint8, all (FRAME_SIZE, FRAME_SIZE, 3)."""
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
        # Anti-aliasing: blend over one pixel along the outline
        cover = np.clip(0.5 - radius * _distance_table(shape)[row, column], 0, 1)[..., None]
        region = picture[top:bottom, left:right]
        value = _COLOR_VALUES[color] if isinstance(color, str) else color
        region += cover * (value - region)
    picture += noise
    return np.clip(picture, 0, 255).astype(np.uint8)


@lru_cache(maxsize=8)
def _backdrop(seed: int) -> tuple[np.ndarray, np.float32]:
    """
    Draw a background, float32 (FRAME_SIZE, FRAME_SIZE, 3), and the strength of its noise. The background has dull
    middle tones, so every named color stands out.
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
    """Return standard normal noise, float32 (frames, FRAME_SIZE, FRAME_SIZE, 3). Videos cycle through it."""
    return np.random.default_rng(0).standard_normal((frames, FRAME_SIZE, FRAME_SIZE, 3), dtype=np.float32)


def _table_index(values: np.ndarray) -> np.ndarray:
    """Convert coordinates in radii to indices of a table's cells."""
    return np.clip((values + _TABLE_REACH) * (_TABLE_SIZE / (2 * _TABLE_REACH)), 0, _TABLE_SIZE - 1).astype(np.int32)


@lru_cache
def _distance_table(shape: str) -> np.ndarray:
    """Return signed distances to the outline, in radii, negative inside: float32 (_TABLE_SIZE, _TABLE_SIZE)."""
    points = (np.arange(_TABLE_SIZE, dtype=np.float32) + 0.5) * (2 * _TABLE_REACH / _TABLE_SIZE) - _TABLE_REACH
    x, y = np.meshgrid(points, points)
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.75) - 0.25
    return _distance_to_polygon(x, y, np.array(_OUTLINES[shape], np.float32))


def _distance_to_polygon(x: np.ndarray, y: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Return signed distances of points (x, y) to a polygon with `corners` (n, 2), negative inside, shaped like `x`."""
    distance, inside = np.full_like(x, np.inf), np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0)):
        dx, dy = bx - ax, by - ay
        along = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx**2 + dy**2), 0, 1)
        distance = np.minimum(distance, np.hypot(x - ax - along * dx, y - ay - along * dy))
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / dy * dx)
    return np.where(inside, -distance, distance)


def _turned(radii: Sequence[float], first: float = -math.pi / 2) -> list[Point]:
    """Return corners at the given radii and equally spaced angles, starting at `first`. The y axis points down."""
    turns = [first + 2 * math.pi * i / len(radii) for i in range(len(radii))]
    return [(radius * math.cos(turn), radius * math.sin(turn)) for radius, turn in zip(radii, turns)]


def _arc(center: float, radius: float, first: float, last: float) -> list[Point]:
    """Return points on a circle around (center, 0) between two angles."""
    return [(center + radius * math.cos(turn), radius * math.sin(turn)) for turn in np.linspace(first, last, 24)]


def _quarter_turns(corners: list[Point], turns: int) -> list[Point]:
    """Rotate corners around (0, 0) by a number of quarter turns."""
    for _ in range(turns):
        corners = [(-y, x) for x, y in corners]
    return corners


def _heart_corner(t: float) -> Point:
    """Return the point of the heart curve at parameter `t` in [0, 2 pi)."""
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
    # Along the left side of a disc, and back along a second disc that covers its right side
    "moon": _arc(0.25, 1.1, 0.25 * math.pi, 1.75 * math.pi) + _arc(0.75, 0.83, -0.68 * math.pi, -1.32 * math.pi),
    "arrow": [(-1.15, -0.35), (0.05, -0.35), (0.05, -0.95), (1.2, 0), (0.05, 0.95), (0.05, 0.35), (-1.15, 0.35)],
}
