import itertools

import numpy as np
import pytest

from modeling_diffusionvmr.synthetic import rendered_world as world

SEEN = [world.plan_video(seed) for seed in range(60)]
UNSEEN = [world.plan_video(seed, unseen_pairs=True) for seed in range(60)]
EVERY = [(plan, query) for plan in SEEN + UNSEEN for query in plan.queries]


def named_pairs(text: str) -> list[tuple[str, str]]:
    """Read the (color, shape) pairs that a sentence names from its words."""
    singular = {form: shape for shape in world.SHAPES for form in (shape, f"{shape}s", f"{shape}es")}
    words = text.split()
    return [(color, singular[shape]) for color, shape in zip(words, words[1:]) if color in world.COLORS]


def are_neighbors(tracks: list[world.Track], pairs: set[tuple[str, str]]) -> bool:
    """Return whether two objects of these pairs are close together."""
    return any({a.pair, b.pair} == pairs and world.gap(a, b) < 0.05 for a, b in itertools.combinations(tracks, 2))


def test_a_plan_is_a_function_of_its_seed():
    assert world.plan_video(7) == world.plan_video(7) != world.plan_video(8)
    assert np.array_equal(world.render_frame(SEEN[0], 12.3), world.render_frame(world.plan_video(0), 12.3))


def test_videos_and_sentences_keep_their_bounds():
    for plan in SEEN + UNSEEN:
        assert 30 <= plan.duration <= 150 and 3 <= len(plan.queries) <= 6
        assert len({query.text for query in plan.queries}) == len(plan.queries)
    for plan, query in EVERY:
        starts, ends = zip(*query.windows)
        assert 0 <= starts[0] and ends[-1] <= plan.duration and len(query.windows) <= world.MAX_WINDOWS
        assert min(end - start for start, end in query.windows) >= world.SHORTEST_WINDOW
        assert all(start - end >= world.SHORTEST_PAUSE for start, end in zip(starts[1:], ends))


def test_the_world_is_varied():
    several = np.mean([len(query.windows) > 1 for _, query in EVERY])
    assert 0.25 < several < 0.5
    for kind in ("single", "relation", "count"):
        assert np.mean([query.kind == kind for _, query in EVERY]) > 0.2
    assert np.mean([query.swapped for _, query in EVERY]) > 0.3


def test_windows_are_exactly_when_the_sentence_is_true():
    # Truth is computed independently here: from the words of the sentence, twice per second
    for plan, query in EVERY:
        named, words = named_pairs(query.text), query.text.split()
        for time in np.arange(0, plan.duration, 0.5) + 0.123:
            visible = plan.visible(time)
            if "next" in words or "beside" in words:
                true = are_neighbors(visible, set(named))
            else:
                true = sum(track.pair == named[0] for track in visible) >= (2 if "two" in words else 1)
            assert true == any(start <= time < end for start, end in query.windows)


@pytest.mark.parametrize("recombined", [True, False])
def test_absent_sentences_are_true_at_no_time(recombined):
    # As above, from the words of the sentence and twice per second
    drawn = renamed = 0
    for seed, plan in enumerate(SEEN + UNSEEN):
        queries = world.absent_queries(plan, seed, recombined)
        assert queries == world.absent_queries(plan, seed, recombined)
        assert len(queries) < 3 or queries != world.absent_queries(plan, seed + 1, recombined)
        assert len(queries) <= len(plan.queries)
        assert recombined or [query.kind for query in queries] == [query.kind for query in plan.queries]
        assert len({query.statement for query in queries}) == len(queries)
        drawn += len(queries)
        objects = {track.pair for track in plan.tracks}
        words = {word for pair in objects for word in pair}
        for query in queries:
            named = named_pairs(query.text)
            assert query.windows == () and tuple(named) == query.statement.pairs
            if recombined:
                assert words.issuperset(itertools.chain(*named))
                renamed += not objects.issuperset(named)
            else:
                assert not objects.issuperset(named) and not words.issuperset(itertools.chain(*named))
            assert query.unseen == (not world.UNSEEN_PAIRS.isdisjoint(named))
            for time in np.arange(0, plan.duration, 0.5) + 0.123:
                visible = plan.visible(time)
                if query.kind == "relation":
                    assert not are_neighbors(visible, set(named))
                else:
                    needed = 2 if query.kind == "count" else 1
                    assert sum(track.pair == named[0] for track in visible) < needed
    assert drawn > 0.9 * sum(len(plan.queries) for plan in SEEN + UNSEEN)
    assert not recombined or renamed > 0.4 * drawn  # about half of the videos show each color in each shape
    for plan in SEEN:
        assert not any(query.unseen for query in world.absent_queries(plan, 0, recombined))


def test_objects_are_clearly_next_to_each_other_or_apart():
    for plan in SEEN + UNSEEN:
        for time in np.arange(0, plan.duration, 2.0):
            visible = plan.visible(time)
            for a, b in itertools.combinations(visible, 2):
                apart = np.hypot(*np.subtract(a.center(time), b.center(time))) - a.radius - b.radius
                assert apart <= world.NEXT_TO_GAP + 1e-6 or apart >= world.APART_GAP - 1e-6
            for pair in world.PAIRS:
                assert sum(track.pair == pair for track in visible) <= 2


def test_every_sentence_has_a_lookalike_in_its_video():
    for plan, query in EVERY:
        words = {word for pair in query.statement.pairs for word in pair}
        assert any(track.pair not in query.statement.pairs and words & set(track.pair) for track in plan.tracks)


def test_swapped_sentences_see_their_words_in_other_combinations():
    for plan, query in EVERY:
        if not query.swapped:
            continue
        pairs = query.statement.pairs
        scenes = [plan.visible(track.start) for track in plan.tracks]
        if query.kind == "single":
            shown = [{track.pair for track in scene} for scene in scenes]
            elsewhere = [list(zip(*seen)) for seen in shown if pairs[0] not in seen]
            assert any(pairs[0][0] in colors and pairs[0][1] in shapes for colors, shapes in elsewhere)
        else:
            swap = {(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])}
            assert any(are_neighbors(scene, swap) for scene in scenes)


def test_unseen_pairs_appear_only_if_asked_for():
    shown = {track.pair for plan in SEEN + world.plan_stills(0, 400) for track in plan.tracks}
    assert shown <= set(world.SEEN_PAIRS) and len(world.SEEN_PAIRS) == 90
    assert not any(query.unseen for plan in SEEN for query in plan.queries)
    assert np.mean([query.unseen for plan in UNSEEN for query in plan.queries]) > 0.4
    for words in zip(*world.UNSEEN_PAIRS):
        assert len(set(words)) == len(words)


def test_annotation_rows_have_the_qvhighlights_shape():
    (plan, query), row = EVERY[0], world.annotation_rows(SEEN[0])[0]
    assert row["query"] == query.text and row["vid"] == plan.vid
    assert row["relevant_windows"] == [list(window) for window in query.windows]
    assert set(row) == {"qid", "query", "vid", "duration", "relevant_windows", "kind", "unseen", "swapped"}


def test_written_video_shows_what_was_rendered(tmp_path):
    av = pytest.importorskip("av")
    plan = min(SEEN, key=lambda plan: plan.duration)
    path = tmp_path / "video.mp4"
    world.write_video(plan, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["video.mp4"]
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    assert len(frames) == round(plan.duration * world.FRAME_RATE)
    for time, frame in frames[:: len(frames) // 5]:
        assert np.abs(frame.astype(float) - world.render_frame(plan, time)).mean() < 8


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("av")
    render = world.render_frame
    monkeypatch.setattr(world, "render_frame", lambda plan, time: render(plan, time) if time < 10 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.write_video(SEEN[0], tmp_path / "video.mp4")
    assert not list(tmp_path.iterdir())


def test_stills_in_nameless_colors_show_no_unseen_pair():
    def nearest_name(color):
        return min(world.COLORS, key=lambda name: np.hypot.reduce(np.subtract(color, world.COLORS[name])))

    stills = world.plan_stills(1, 200, nameless=True)
    nearest = {(nearest_name(track.pair[0]), track.pair[1]) for still in stills for track in still.tracks}
    assert len(nearest) > 50 and nearest.isdisjoint(world.UNSEEN_PAIRS)
    assert world.render_frame(stills[0], 0.0).shape == (world.FRAME_SIZE, world.FRAME_SIZE, 3)


LONG = [world.plan_long_video(seed, 600.0, unseen_pairs=seed % 2 == 1) for seed in range(6)]


def test_a_long_plan_is_a_function_of_its_seed():
    assert world.plan_long_video(0, 600.0) == LONG[0] != LONG[2]
    assert world.plan_long_video(0, 601.0).vid != LONG[0].vid != world.plan_long_video(0, 600.0, True).vid


@pytest.mark.parametrize("plan", [*LONG, world.plan_long_video(9, 3600.0), world.plan_long_video(9, 150.0)])
def test_each_sentence_of_a_long_video_is_true_in_one_scene_only(plan):
    assert plan.scenes[0] == plan.scenery[0][0] == 0 and list(plan.scenes) == sorted(plan.scenes)
    assert [start for start, _ in plan.scenery] == sorted(start for start, _ in plan.scenery)
    assert all(0 <= track.start < track.end <= plan.duration + 1e-6 for track in plan.tracks)
    assert len({query.text for query in plan.queries}) == len(plan.queries) > 0
    borders = [*plan.scenes, plan.duration]
    for query in plan.queries:
        # Among all objects of the video, and not only those of a scene
        windows = world.true_windows(query.statement, plan.tracks)
        assert np.allclose(windows, query.windows, atol=1e-6)
        scenes = np.searchsorted(borders, [sum(window) / 2 for window in windows])
        (scene,) = set(scenes.tolist())
        assert borders[scene - 1] - 1e-6 <= windows[0][0] and windows[-1][1] <= borders[scene] + 1e-6
        assert min(end - start for start, end in windows) >= world.SHORTEST_WINDOW
        assert world._has_lookalike(query.statement, plan.tracks)


def test_long_videos_have_short_and_long_moments():
    assert [plan.duration for plan in LONG] == [600.0] * 6 and min(len(plan.scenes) for plan in LONG) >= 2
    lengths = [end - start for plan in LONG for query in plan.queries for start, end in query.windows]
    assert min(lengths) < 10 and 150 < max(lengths) <= world.LONGEST_WINDOWS[1] + 1
    hour = world.plan_long_video(0, 3600.0)
    asked = {np.searchsorted(hour.scenes, sum(query.windows[0]) / 2) for query in hour.queries}
    assert len(hour.scenes) > 20 and 5 <= len(asked) <= world.ASKED_SCENES


def test_unseen_pairs_of_long_videos_appear_only_if_asked_for():
    for plan in LONG:
        shown = {track.pair for track in plan.tracks}
        assert shown.isdisjoint(world.UNSEEN_PAIRS) == (not any(query.unseen for query in plan.queries))
    assert [any(query.unseen for query in plan.queries) for plan in LONG] == [False, True] * 3


def test_a_long_video_must_hold_a_scene():
    with pytest.raises(ValueError, match=r"a long video must last at least 150 s, got 149\.0"):
        world.plan_long_video(0, 149.0)
