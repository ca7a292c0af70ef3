import pytest

from modeling_diffusionvmr.data.benchmarks import BENCHMARKS, CHARADES_STA, QVHIGHLIGHTS, TACOS, Benchmark


def test_names():
    assert BENCHMARKS == {"qvhighlights": QVHIGHLIGHTS, "charades_sta": CHARADES_STA, "tacos": TACOS}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_gets_three_splits(name):
    benchmark = BENCHMARKS[name]
    held_out = set() if benchmark.hold_out is None else {"val"}
    assert {*benchmark.files, *held_out} == {"train", "val", "test"} and not held_out & set(benchmark.files)


def test_the_card_tells_of_the_held_out_share():
    assert f"{CHARADES_STA.hold_out:.0%} of its training videos are held out" in CHARADES_STA.about


def test_clips_share_the_duration_unless_stated():
    assert [benchmark.clip_seconds for benchmark in BENCHMARKS.values()] == [2.0, None, None]
    assert Benchmark(title="New-One", about="").name == "new_one"
