import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from modeling_diffusionvmr import evaluate_predictions, load_annotations
from modeling_diffusionvmr.data.features import open_features
from modeling_diffusionvmr.data.files import save_jsonl
from modeling_diffusionvmr.synthetic.simulated_features import (
    CLIP_SIZE,
    FUNCTION_WORDS,
    NOISE_LEVELS,
    SimulatedFeatures,
    content_words,
    strength_of,
    words_of,
)

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate_features.py"
VERBS, COLOURS = ["walks", "cooks", "sings", "swims", "paints"], ["red", "green", "blue", "white"]
THINGS = ["dog", "kitchen", "guitar", "mountain", "bicycle", "lamp"]


def make_rows(count=60, seed=0):
    """A video a row of 60 s, with one moment of 20 s."""
    draw, rows = np.random.default_rng(seed), []
    for i in range(count):
        query = f"A {draw.choice(COLOURS)} {draw.choice(THINGS)} {draw.choice(VERBS)} with the {draw.choice(THINGS)}"
        start = 2 * float(draw.integers(0, 20))
        windows = [[start, start + 20.0]]
        rows.append({"qid": i, "query": query, "vid": f"v{i}", "duration": 60, "relevant_windows": windows})
    return rows


ROWS = make_rows()


def inside(row, length, clip_seconds=2.0):
    times, ((start, end),) = (np.arange(length) + 0.5) * clip_seconds, row["relevant_windows"]
    return (start <= times) & (times < end)


def unit(array):
    array = array.astype(np.float64)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def mean_auc(simulation, rows=ROWS, centred=False):
    """How well the cosine of a sentence's end and a clip ranks clips inside a moment before those outside."""
    found = []
    for row in rows:
        clips = unit(simulation.video(row["vid"]))
        cosine = (clips - clips.mean(0) * centred) @ unit(simulation.text(row["qid"])[-1])
        relevant = inside(row, len(clips))
        found.append(np.mean(cosine[relevant, None] > cosine[~relevant]))
    return np.mean(found)


def test_words():
    assert words_of("It's a Dog, sitting (still)!") == ["it's", "a", "dog", "sitting", "still"]
    assert content_words("It's a Dog, sitting (still)!") == ["dog", "sitting", "still"]
    assert content_words("there it is") == ["there", "it", "is"]  # nothing else to show
    assert words_of(" ?! ") == ["?!"] and words_of("犬が走る") == ["犬が走る"]
    assert all(word == word.lower() for word in FUNCTION_WORDS)


@pytest.mark.parametrize("noise", NOISE_LEVELS)
def test_layout_and_size(noise):
    simulation = SimulatedFeatures(ROWS, 0, noise)
    clips, tokens = simulation.video("v3"), simulation.text(3)
    assert clips.shape == (30, CLIP_SIZE) and clips.dtype == np.float16
    assert tokens.shape == (len(words_of(ROWS[3]["query"])) + 2, CLIP_SIZE) and tokens.dtype == np.float16
    assert np.isfinite(clips).all() and np.isfinite(tokens).all()
    assert simulation.video("v3", "slowfast", 24).shape == (30, 24)
    assert SimulatedFeatures(ROWS, 0, noise, 1.5, 16).video("v3").shape == (40, 16)
    short = [{**ROWS[0], "duration": 0.3, "relevant_windows": [[0, 0.3]]}, ROWS[1]]
    assert SimulatedFeatures(short, 0, noise).video("v0").shape == (1, CLIP_SIZE)


def test_what_features_depend_on():
    rows = [{**row, "query": "a dog walks"} for row in ROWS[:2]] + ROWS[2:]
    one, other = SimulatedFeatures(rows, 7), SimulatedFeatures(rows[::-1], 7)
    np.testing.assert_array_equal(one.video("v1"), other.video("v1"))
    np.testing.assert_array_equal(one.text(1), other.text("1"))
    # Of other rows, the sentence depends on nothing, and the video on distractors only
    alone = SimulatedFeatures(rows[1:2], 7)
    np.testing.assert_array_equal(alone.text(1), one.text(1))
    assert not alone.distractors("v1") and not np.array_equal(alone.video("v1"), one.video("v1"))
    for seed in (8, -1):
        another = SimulatedFeatures(rows, seed)
        assert not np.array_equal(another.text(1), one.text(1))
        assert not np.array_equal(another.video("v1"), one.video("v1"))
    # The same sentence again is phrased a little differently
    first, second = unit(one.text(0)), unit(one.text(1))
    assert not np.array_equal(first, second) and np.min(np.sum(first * second, axis=1)) > 0.8


@pytest.mark.parametrize("seed", range(4))
def test_words_of_a_stem_are_alike(seed):
    rows = [{**ROWS[0], "qid": i, "query": word} for i, word in enumerate(["cleaning", "cleans", "kitchen"])]
    simulation = SimulatedFeatures(rows, seed, replace(NOISE_LEVELS["real"], text_offset=0.0))
    cleaning, cleans, kitchen = (unit(simulation.text(i)[-1]) for i in range(3))
    assert cleaning @ cleans > cleaning @ kitchen + 0.3


@pytest.mark.parametrize("noise", NOISE_LEVELS)
def test_a_moment_is_closer_to_its_sentence(noise):
    simulation = SimulatedFeatures(ROWS, 0, noise)
    assert 0.6 < mean_auc(simulation) < 0.95  # says something, and leaves something to learn
    strangers = [{**row, "qid": other["qid"]} for row, other in zip(ROWS, ROWS[7:] + ROWS[:7])]
    assert mean_auc(simulation, strangers) < mean_auc(simulation) - 0.05


def test_unseen_moments_are_visible_but_not_like_their_sentence():
    level = replace(NOISE_LEVELS["easy"], background=0.0, lasting=0.0, fleeting=0.0, distractors=0)
    seen, unseen = (SimulatedFeatures(ROWS, 0, replace(level, unseen=share)) for share in (0.0, 1.0))
    assert mean_auc(seen) > 0.9 and 0.35 < mean_auc(unseen) < 0.65
    for row in ROWS:
        clips, relevant = unseen.video(row["vid"]), inside(row, 30)
        assert np.linalg.norm(clips - clips[~relevant].mean(0), axis=1)[relevant].mean() > 0.5


def test_real_is_noisier_than_easy():
    real, easy = (SimulatedFeatures(ROWS, 0, noise) for noise in ("real", "easy"))
    assert mean_auc(real) < mean_auc(easy) - 0.03
    for vid in ("v0", "v1"):
        assert not np.array_equal(real.video(vid), easy.video(vid))


def test_how_hard_real_is(shared):
    """Highlights by cosine alone, on the real annotations."""
    rows = load_annotations(shared / "annotations" / "qvhighlights" / "highlight_val_release.jsonl")
    simulation, predictions = SimulatedFeatures(rows, 0, "real"), []
    for row in rows[::3]:
        cosine = unit(simulation.video(row["vid"])) @ unit(simulation.text(row["qid"])[-1])
        predictions.append(
            {
                **{name: row[name] for name in ("qid", "query", "vid")},
                "pred_relevant_windows": [[0, row["duration"], 1]],
                "pred_saliency_scores": cosine.tolist(),
            }
        )
    scores = evaluate_predictions(predictions, rows[::3])["brief"]
    assert scores["HL-min-VeryGood-mAP"] == pytest.approx(31, abs=3)
    assert scores["HL-min-VeryGood-Hit1"] == pytest.approx(57, abs=4)


def test_sentences_and_pictures_keep_an_offset():
    simulation = SimulatedFeatures(ROWS, 0)
    clips = unit(np.stack([simulation.video(row["vid"]).mean(0) for row in ROWS]))
    ends = unit(np.stack([simulation.text(row["qid"])[-1] for row in ROWS]))
    across = ~np.eye(len(ROWS), dtype=bool)
    assert (clips @ clips.T)[across].mean() > 0.4 and (ends @ ends.T)[across].mean() > 0.4
    assert abs((clips @ ends.T)[across].mean()) < 0.3


def test_distractors_are_shown():
    simulation = SimulatedFeatures(ROWS, 0, "easy")
    shared, towards = 0, []
    for row in ROWS:
        found = simulation.distractors(row["vid"])
        assert len(found) == NOISE_LEVELS["easy"].distractors
        words = set(content_words(row["query"]))
        for distractor in found:
            assert distractor["vid"] != row["vid"] and not words <= set(content_words(distractor["query"]))
            shared += bool(words & set(content_words(distractor["query"])))
        # Some clip outside the moment is closer to a distractor's sentence than clips are to a stranger's
        clips = unit(simulation.video(row["vid"]))
        outside = (clips - clips.mean(0))[~inside(row, len(clips))]
        stranger = ROWS[(ROWS.index(row) + 31) % len(ROWS)]
        of_distractor, of_stranger = (
            np.max(outside @ unit(simulation.text(lender["qid"])[-1])) for lender in (found[0], stranger)
        )
        towards.append(of_distractor - of_stranger)
    assert shared > 0.5 * len(ROWS) * NOISE_LEVELS["easy"].distractors
    assert np.mean(towards) > 0


def test_strength_follows_saliency():
    level, times = replace(NOISE_LEVELS["real"], graded=1.0), np.arange(75) * 2 + 1.0
    row = {"duration": 150, "relevant_windows": [[20, 60], [100, 110]]}
    uniform = strength_of(row, times, level, np.random.default_rng(0))
    assert uniform[20] == uniform[52] == 0.75 and uniform[0] == uniform[40] == 0
    clips = list(range(10, 30)) + list(range(50, 55))
    scores = [[4, 4, 4]] * 10 + [[1, 1, 1]] * 10 + [[2, 3, 1]] * 5
    scored = {**row, "relevant_clip_ids": clips, "saliency_scores": scores}
    strength = strength_of(scored, times, level, np.random.default_rng(0))
    assert strength[15] == 1 and strength[25] == 0.25 and strength[52] == 0.5 and strength[40] == 0
    graded = strength_of(scored, times, replace(level, graded=0.4), np.random.default_rng(0))
    np.testing.assert_allclose(graded, 0.4 * strength + 0.6 * uniform)
    shuffled = {**scored, "relevant_clip_ids": clips[::-1], "saliency_scores": scores[::-1]}
    np.testing.assert_array_equal(strength_of(shuffled, times, level, np.random.default_rng(0)), strength)
    fading = strength_of(row, np.arange(0, 150, 0.1), level, np.random.default_rng(0))
    assert np.sum((fading > 0) & (fading < 0.7)) > 4 * 5  # of four edges


def test_rows_without_windows():
    """They have a sentence; their video shows its background and distractors only."""
    row = {"qid": "test", "query": "a dog walks", "vid": "hidden", "duration": 60}
    simulation = SimulatedFeatures([*ROWS, row, {**row, "qid": "b", "vid": "w", "relevant_windows": []}], 0)
    assert simulation.text("test").shape == (5, CLIP_SIZE) and simulation.video("hidden").shape == (30, CLIP_SIZE)
    assert all(lender in ROWS for vid in ("hidden", "w") for lender in simulation.distractors(vid))
    alone = SimulatedFeatures([row], 0)
    assert not alone.distractors("hidden") and np.isfinite(alone.video("hidden")).all()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="`noise` must be one of real, easy, got 'none'"):
        SimulatedFeatures(ROWS, 0, "none")
    with pytest.raises(ValueError, match="`qid` 3 is used twice"):
        SimulatedFeatures([*ROWS, {**ROWS[4], "qid": 3}], 0)
    with pytest.raises(ValueError, match="`clip_seconds` must be a positive number"):
        SimulatedFeatures(ROWS, 0, clip_seconds=0)
    with pytest.raises(ValueError, match="`size` must be at least 1"):
        SimulatedFeatures(ROWS, 0, size=0)


@pytest.fixture
def simulate(monkeypatch, capsys):
    """Runs the script in this process, and gives what it printed to stderr."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import simulate_features as script

    def run(*arguments):
        capsys.readouterr()
        script.main(script.parse_arguments([str(argument) for argument in arguments]))
        return capsys.readouterr().err

    return run


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_script(tmp_path, simulate):
    train, val = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    save_jsonl(ROWS[:8], train)
    save_jsonl(ROWS[8:12], val)
    options = ["--annotations", train, val, "--seed", 3, "--noise", "easy", "--size", 32, "--motion_size", 40]
    for name, workers in (("one", 1), ("two", 2)):
        printed = simulate(*options, "--output_dir", tmp_path / name, "--workers", workers)
        assert "36 files made, 0 were there" in printed and "simulating: 100%" in printed
    made = contents(tmp_path / "one")
    assert made == contents(tmp_path / "two") and len(made) == 39

    simulation = SimulatedFeatures(ROWS[:12], 3, "easy", size=32)
    clips, text, motion = (open_features(tmp_path / "one" / name) for name in ("clip", "clip_text", "slowfast"))
    assert set(clips) == set(motion) == {f"v{i}" for i in range(12)} and set(text) == {str(i) for i in range(12)}
    np.testing.assert_array_equal(clips["v5"], simulation.video("v5"))
    np.testing.assert_array_equal(text[5], simulation.text(5))
    np.testing.assert_array_equal(motion["v5"], simulation.video("v5", "slowfast", 40))
    with np.load(tmp_path / "one" / "clip_text" / "qid5.npz") as file:
        assert file.files == ["last_hidden_state"]
    assert json.loads(made["simulation.json"])["simulated"] is True
    assert clips.clip_seconds == motion.clip_seconds == 2.0

    # What is missing or broken is made again, and nothing else is touched
    (tmp_path / "one" / "clip" / "v2.npz").unlink()
    (tmp_path / "one" / "clip_text" / "qid2.npz").write_bytes(made["clip_text/qid2.npz"][:100])
    assert "2 files made, 34 were there" in simulate(*options, "--output_dir", tmp_path / "one")
    assert contents(tmp_path / "one") == made
    with pytest.raises(ValueError, match="made with other settings"):
        simulate(*options, "--output_dir", tmp_path / "one", "--seed", 4)
    assert contents(tmp_path / "one") == made


def test_script_refuses_bad_input(tmp_path, simulate):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out"
    save_jsonl(ROWS[:2], rows)
    for arguments, message in (
        ([rows, rows], "`qid` 0 is used twice"),
        ([rows, "--workers", 0], "--workers must be at least 1"),
        ([rows, "--motion_size", 0], "--motion_size must be at least 1"),
        ([rows, "--clip_seconds", "nan"], "`clip_seconds` must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            simulate("--output_dir", output, "--annotations", *arguments)
    command = [sys.executable, SCRIPT, "--annotations", tmp_path / "nowhere.jsonl", "--output_dir", output]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ") and "nowhere.jsonl" in done.stderr
    assert not output.exists()
