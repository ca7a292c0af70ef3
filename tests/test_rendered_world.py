import itertools

import numpy as np
import pytest

from modeling_diffusionvmr import rendered_world as world

SEEN = [world.plan_video(seed) for seed in range(60)]
UNSEEN = [world.plan_video(seed, unseen_pairs=True) for seed in range(60)]
EVERY = [(plan, query) for plan in SEEN + UNSEEN for query in plan.queries]


def test_a_plan_is_a_function_of_its_seed():
    assert world.plan_video(7) == world.plan_video(7) != world.plan_video(8)
    assert np.array_equal(world.render_frame(SEEN[0], 12.3), world.render_frame(world.plan_video(0), 12.3))


def test_videos_and_sentences_keep_their_bounds():
    for plan in SEEN + UNSEEN:
        assert 30 <= plan.duration <= 150 and 3 <= len(plan.queries) <= 6
        assert len({query.text for query in plan.queries}) == len(plan.queries)
    for plan, query in EVERY:
        starts, ends = zip(*query.windows)
        assert 0 <= starts[0] and ends[-1] <= plan.duration and len(query.windows) <= world.MOST_WINDOWS
        assert min(end - start for start, end in query.windows) >= world.SHORTEST_WINDOW
        assert all(start - end >= world.SHORTEST_PAUSE for start, end in zip(starts[1:], ends))


def test_the_world_is_varied():
    several = np.mean([len(query.windows) > 1 for _, query in EVERY])
    assert 0.25 < several < 0.5
    for kind in ("single", "relation", "count"):
        assert np.mean([query.kind == kind for _, query in EVERY]) > 0.2
    assert np.mean([query.swapped for _, query in EVERY]) > 0.3


def test_windows_are_exactly_when_the_sentence_is_true():
    # An account of truth of its own: it reads the words of the sentence, and looks at every tenth of a second.
    for plan, query in EVERY:
        words = query.text.replace("hearts", "heart").split()
        named = [(a, next(s for s in world.SHAPES if b in (s, s + "s", s + "es"))) for a, b in zip(words, words[1:]) if a in world.COLOURS]
        for time in np.arange(0, plan.duration, 0.5) + 0.123:
            visible = plan.visible(time)
            if "next" in words or "beside" in words:
                true = any({a.pair, b.pair} == set(named) and world.gap(a, b) < 0.05 for a, b in itertools.combinations(visible, 2))
            else:
                true = sum(track.pair == named[0] for track in visible) >= (2 if "two" in words else 1)
            assert true == any(start <= time < end for start, end in query.windows)


def test_what_is_next_to_each_other_and_what_is_not_is_plain_to_see():
    for plan in SEEN + UNSEEN:
        for time in np.arange(0, plan.duration, 2.0):
            visible = plan.visible(time)
            for a, b in itertools.combinations(visible, 2):
                apart = np.hypot(*np.subtract(a.centre(time), b.centre(time))) - a.radius - b.radius
                assert apart <= world.NEXT_TO_GAP + 1e-6 or apart >= world.APART_GAP - 1e-6
            for pair in world.PAIRS:
                assert sum(track.pair == pair for track in visible) <= 2


def test_every_sentence_has_a_lookalike_in_its_video():
    for plan, query in EVERY:
        words = {word for pair in query.statement.pairs for word in pair}
        assert any(track.pair not in query.statement.pairs and words & set(track.pair) for track in plan.tracks)


def test_swapped_sentences_see_their_words_bound_the_other_way():
    for plan, query in EVERY:
        if not query.swapped:
            continue
        pairs = query.statement.pairs
        moments = [plan.visible(track.start) for track in plan.tracks]
        if query.kind == "single":
            (colour, shape), = pairs
            shown = [{track.pair for track in visible} for visible in moments]
            assert any(pairs[0] not in v and any(p[0] == colour for p in v) and any(p[1] == shape for p in v) for v in shown)
        else:
            swap = {(pairs[0][0], pairs[1][1]), (pairs[1][0], pairs[0][1])}
            assert any({a.pair, b.pair} == swap and world.gap(a, b) < 0.05 for v in moments for a, b in itertools.combinations(v, 2))


def test_unseen_pairs_appear_only_where_asked_for():
    shown = {track.pair for plan in SEEN + world.plan_stills(0, 400) for track in plan.tracks}
    assert shown <= set(world.SEEN_PAIRS) and len(world.SEEN_PAIRS) == 90
    assert not any(query.unseen for plan in SEEN for query in plan.queries)
    assert np.mean([query.unseen for plan in UNSEEN for query in plan.queries]) > 0.4
    for words in zip(*world.UNSEEN_PAIRS):
        assert len(set(words)) == len(words)


def test_annotation_rows_have_the_qvhighlights_shape():
    (plan, query), row = EVERY[0], world.annotation_rows(SEEN[0])[0]
    assert row["query"] == query.text and row["vid"] == plan.vid and row["relevant_windows"] == [list(window) for window in query.windows]
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
    monkeypatch.setattr(world, "render_frame", lambda plan, time: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.write_video(SEEN[0], tmp_path / "video.mp4")
    assert not list(tmp_path.iterdir())


def test_stills_in_nameless_colours_show_no_unseen_pair():
    stills = world.plan_stills(1, 200, nameless=True)
    shown = {track.pair for still in stills for track in still.tracks}
    nearest = {(min(world.COLOURS, key=lambda name: np.hypot.reduce(np.subtract(colour, world.COLOURS[name]))), shape) for colour, shape in shown}
    assert len(nearest) > 50 and nearest.isdisjoint(world.UNSEEN_PAIRS)
    assert world.render_frame(stills[0], 0.0).shape == (world.FRAME_SIZE, world.FRAME_SIZE, 3)


@pytest.fixture(scope="module")
def backbone():
    from modeling_diffusionvmr import rendered_backbone

    return rendered_backbone


def test_every_word_of_the_world_is_one_token_and_every_sentence_has_tokens(backbone):
    tokenizer = backbone.build_tokenizer()
    for _, query in EVERY:
        assert len(tokenizer(query.text).input_ids) == len(query.text.split()) + 2
    assert tokenizer.unk_token_id not in tokenizer("Über 3 жёлтых xylophones, 漢字!").input_ids[1:-1]


def test_truth_of_a_batch_agrees_with_each_statement(backbone):
    frames, stills = backbone.render_frames(3, 64), world.plan_stills(3, 64)
    statements, truth, sizes = backbone._statements_for(frames, np.random.default_rng(0))
    assert len(statements) == sum(sizes) == truth.shape[1] and sizes[0] == len(world.SEEN_PAIRS) and sizes[2] > 10
    assert truth.tolist() == [[statement.holds(still.tracks) for statement in statements] for still in stills]


def test_clip_trains_saves_and_is_measured(backbone, tmp_path):
    terms = []
    arguments = dict(seed=1, steps=2, batch_size=16, pool_size=32)
    clip, tokenizer, processor = backbone.train_rendered_clip(**arguments, progress=lambda step, steps, losses: terms.append((step, steps, losses)))
    assert [entry[:2] for entry in terms] == [(1, 2), (2, 2)] and all(np.isfinite(value) for value in terms[-1][2].values())
    for part in (clip, tokenizer, processor):
        part.save_pretrained(tmp_path)
    reloaded = type(clip).from_pretrained(tmp_path)
    table = backbone.measure_clip(reloaded, type(tokenizer).from_pretrained(tmp_path), type(processor).from_pretrained(tmp_path), SEEN[:2])
    assert table == backbone.measure_clip(reloaded, tokenizer, processor, SEEN[:2]) and 0 < table["all"]["auc"] < 1


def test_ranking_figures(backbone):
    truth = np.array([True, False, True, False])
    assert backbone._ranking(np.array([4.0, 3, 2, 1]), truth) == pytest.approx((0.75, (1 + 2 / 3) / 2, 0.8))
    assert backbone._ranking(np.array([4.0, 1, 3, 2]), truth) == pytest.approx((1, 1, 1))
