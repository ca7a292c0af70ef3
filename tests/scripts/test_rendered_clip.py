import numpy as np
import pytest

import rendered_clip as backbone
from modeling_diffusionvmr.synthetic.rendered_world import SEEN_PAIRS, plan_stills, plan_video


def test_every_word_of_the_world_is_one_token_and_every_sentence_has_tokens():
    tokenizer = backbone.build_tokenizer()
    plans = [plan_video(seed, unseen_pairs) for seed in range(60) for unseen_pairs in (False, True)]
    for text in (query.text for plan in plans for query in plan.queries):
        assert len(tokenizer(text).input_ids) == len(text.split()) + 2
    assert tokenizer.unk_token_id not in tokenizer("Über 3 жёлтых xylophones, 漢字!").input_ids[1:-1]


def test_truth_of_a_batch_agrees_with_each_statement():
    frames, stills = backbone.render_frames(3, 64), plan_stills(3, 64)
    statements, truth, numbers = backbone._draw_statements(frames, np.random.default_rng(0))
    assert len(statements) == sum(numbers) == truth.shape[1] and numbers[0] == len(SEEN_PAIRS) and numbers[2] > 10
    assert truth.tolist() == [[statement.holds(still.tracks) for statement in statements] for still in stills]


def test_clip_trains_saves_and_is_measured(tmp_path):
    calls = []
    clip, tokenizer, processor = backbone.train_rendered_clip(
        seed=1, steps=2, batch_size=16, pool_size=32, progress=lambda *call: calls.append(call)
    )
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)]
    assert all(np.isfinite(loss) for loss in calls[-1][2].values())
    for part in (clip, tokenizer, processor):
        part.save_pretrained(tmp_path)
    reloaded, *parts = (type(part).from_pretrained(tmp_path) for part in (clip, tokenizer, processor))
    plans = [plan_video(seed) for seed in range(2)]
    table = backbone.measure_clip(reloaded, *parts, plans)
    assert table == backbone.measure_clip(reloaded, tokenizer, processor, plans) and 0 < table["all"]["auc"] < 1


def test_ranking_figures():
    truth = np.array([True, False, True, False])
    assert backbone._ranking(np.array([4.0, 3, 2, 1]), truth) == pytest.approx((0.75, (1 + 2 / 3) / 2, 0.8))
    assert backbone._ranking(np.array([4.0, 1, 3, 2]), truth) == pytest.approx((1, 1, 1))
