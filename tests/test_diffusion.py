"""The diffusion process against the DDIM scheduler of diffusers."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy import stats

from modeling_diffusionvmr.diffusion import (
    DiffusionSchedule,
    cosine_alphas_cumprod,
    fixed_noise,
    sampling_timesteps,
    signal_to_spans,
    spans_to_signal,
)
from modeling_diffusionvmr.spans import span_to_window

NUM_STEPS, SCALE = 1000, 2.0


def reference(num_steps: int = NUM_STEPS, scale: float = SCALE) -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=num_steps,
        beta_schedule="squaredcos_cap_v2",
        timestep_spacing="trailing",
        prediction_type="sample",
        clip_sample=True,
        clip_sample_range=scale,
        set_alpha_to_one=True,
    )


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_steps", [10, 100, 1000])
def test_alphas(num_steps):
    alphas = cosine_alphas_cumprod(num_steps)
    assert alphas.dtype == torch.float64 and alphas.shape == (num_steps,)
    assert (alphas.diff() < 0).all() and 0 < alphas[-1] < alphas[0] < 1
    # The products of diffusers are float32 throughout
    torch.testing.assert_close(alphas.float(), reference(num_steps).alphas_cumprod, rtol=1e-4, atol=1e-7)


def test_add_noise():
    signal, noise = draw(5, 7, 2), draw(5, 7, 2, seed=1)
    timesteps = torch.tensor([0, 1, 250, 998, 999])
    expected = reference().add_noise(signal, noise, timesteps)
    result = DiffusionSchedule(NUM_STEPS, SCALE).add_noise(signal, noise, timesteps)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    # At the ends nearly the signal and nearly the noise
    torch.testing.assert_close(result[0], signal[0], rtol=0, atol=0.05)
    torch.testing.assert_close(result[-1], noise[-1], rtol=0, atol=0.001)


@pytest.mark.parametrize("num_sampling_steps", [1, 2, 3, 4, 5, 7, 8, 10, 50, 64, 250, 1000])
def test_sampling_timesteps(num_sampling_steps):
    scheduler = reference()
    scheduler.set_timesteps(num_sampling_steps)
    visited = sampling_timesteps(torch.tensor([NUM_STEPS - 1]), num_sampling_steps)
    assert visited.dtype == torch.long and visited.shape == (num_sampling_steps + 1, 1)
    # That of diffusers leaves out the end
    assert visited[:-1, 0].tolist() == scheduler.timesteps.tolist()
    assert visited[-1] == -1


def test_sampling_timesteps_from_a_step_of_each_sample():
    visited = sampling_timesteps(torch.tensor([999, 399, 7]), 4)
    assert visited.tolist() == [[999, 399, 7], [749, 299, 5], [499, 199, 3], [249, 99, 1], [-1, -1, -1]]


@pytest.mark.parametrize(("start", "num_sampling_steps"), [(0, 1), (0, 5), (3, 4), (3, 50), (999, 1000)])
def test_more_steps_than_are_left(start, num_sampling_steps):
    """The network is asked for real steps only, and the sampler stays finite."""
    schedule = DiffusionSchedule(NUM_STEPS, SCALE)
    visited = sampling_timesteps(torch.tensor([start]), num_sampling_steps)
    assert (visited[:-1] >= 0).all() and (visited.diff(dim=0) <= 0).all() and visited[-1] == -1
    signal = draw(1, 6, 2)
    for timesteps, following in itertools.pairwise(visited):
        signal = schedule.ddim_step(signal, 0.9 * draw(1, 6, 2, seed=1), timesteps, following)
    torch.testing.assert_close(signal, (0.9 * draw(1, 6, 2, seed=1)).clamp(-SCALE, SCALE))


def network(noisy: torch.Tensor, timestep: int) -> torch.Tensor:
    """Some function of X_t and t, which leaves the range of the signal."""
    return 3 * torch.sin(2 * noisy + timestep / 100)


@pytest.mark.parametrize("num_sampling_steps", [1, 2, 5, 50, 200])
def test_sampler(num_sampling_steps):
    scheduler = reference()
    scheduler.set_timesteps(num_sampling_steps)
    expected = draw(3, 6, 2)
    for timestep in scheduler.timesteps:
        predicted = network(expected, timestep.item())
        # The noise that belongs to the clipped prediction, as in DiffusionDet
        step = scheduler.step(predicted, timestep, expected, eta=0.0, use_clipped_model_output=True)
        expected = step.prev_sample

    schedule = DiffusionSchedule(NUM_STEPS, SCALE)
    noisy = draw(3, 6, 2)
    visited = sampling_timesteps(torch.full((3,), NUM_STEPS - 1), num_sampling_steps)
    for timesteps, following in itertools.pairwise(visited):
        noisy = schedule.ddim_step(noisy, network(noisy, timesteps[0].item()), timesteps, following)
    torch.testing.assert_close(noisy, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("timestep", "following"), [(999, 799), (999, -1), (500, 499), (40, 0), (1, -1)])
def test_one_step(timestep, following):
    scheduler = reference()
    scheduler.num_inference_steps = NUM_STEPS // (timestep - following)
    noisy, predicted = draw(2, 6, 2), 2 * draw(2, 6, 2, seed=1)
    if timestep - following in (200, 1000, 1):  # only steps that divide T can be asked of diffusers
        step = scheduler.step(predicted, timestep, noisy, eta=0.0, use_clipped_model_output=True)
        expected = step.prev_sample
    else:
        alphas = [1.0 if t < 0 else scheduler.alphas_cumprod[t].item() for t in (timestep, following)]
        clean = predicted.clamp(-SCALE, SCALE)
        noise = (noisy - math.sqrt(alphas[0]) * clean) / math.sqrt(1 - alphas[0])
        expected = math.sqrt(alphas[1]) * clean + math.sqrt(1 - alphas[1]) * noise
    schedule = DiffusionSchedule(NUM_STEPS, SCALE)
    result = schedule.ddim_step(noisy, predicted, torch.full((2,), timestep), torch.full((2,), following))
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_samples_step_on_their_own():
    schedule = DiffusionSchedule(NUM_STEPS, SCALE)
    noisy, predicted = draw(3, 6, 2), draw(3, 6, 2, seed=1)
    timesteps, following = torch.tensor([999, 500, 20]), torch.tensor([499, -1, 10])
    together = schedule.ddim_step(noisy, predicted, timesteps, following)
    for row in range(3):
        each = slice(row, row + 1)
        alone = schedule.ddim_step(noisy[each], predicted[each], timesteps[each], following[each])
        torch.testing.assert_close(together[each], alone)


def test_the_true_signal_leads_back_to_itself():
    """A network that knows the answer arrives there from any noise, over any number of steps."""
    schedule = DiffusionSchedule(NUM_STEPS, SCALE)
    clean = draw(2, 5, 2, seed=1).clamp(-SCALE, SCALE)
    start = torch.tensor([999, 600])
    noise = draw(2, 5, 2)
    for num_sampling_steps in (1, 4):
        noisy = schedule.add_noise(clean, noise, start)
        visited = sampling_timesteps(start, num_sampling_steps)
        for timesteps, following in itertools.pairwise(visited):
            noisy = schedule.ddim_step(noisy, clean, timesteps, following)
            expected = clean if following[0] < 0 else schedule.add_noise(clean, noise, following)
            torch.testing.assert_close(noisy, expected, rtol=1e-4, atol=1e-4)


def test_signals_and_spans():
    spans = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    signal = torch.tensor([[-2.0, -1.0], [0.0, 2.0]])
    torch.testing.assert_close(spans_to_signal(spans, SCALE), signal)
    torch.testing.assert_close(signal_to_spans(signal, SCALE), spans)
    torch.testing.assert_close(signal_to_spans(torch.tensor([-9.0, 9.0]), SCALE), torch.tensor([0.0, 1.0]))


def test_fixed_noise_is_a_prefix_of_itself():
    schedule = DiffusionSchedule(NUM_STEPS, SCALE)
    longest = schedule.initial_noise(3000)
    assert longest.dtype == torch.float32 and longest.shape == (3000, 2)
    for num_proposals in (1, 5, 20, 1023, 1024, 1025):  # around the table's size
        assert torch.equal(schedule.initial_noise(num_proposals), longest[:num_proposals])
    assert torch.equal(fixed_noise(3000), longest)


@pytest.mark.parametrize("num_proposals", [20, 100, 1000])
def test_fixed_noise_is_gaussian(num_proposals):
    noise = fixed_noise(num_proposals).double().numpy()
    assert np.isfinite(noise).all() and len(np.unique(noise, axis=0)) == num_proposals
    for column in noise.T:
        assert stats.kstest(column, "norm").pvalue > 0.05
        # Two standard errors of independent draws
        assert abs(column.mean()) < 2 / num_proposals**0.5 and abs(column.std() - 1) < 2 / (2 * num_proposals) ** 0.5
    assert abs(np.corrcoef(noise.T)[0, 1]) < 2 / num_proposals**0.5
    # It leaves smaller gaps than independent draws do
    independent = [np.random.default_rng(seed).random(noise.shape) for seed in range(20)]
    typical = np.mean([stats.qmc.discrepancy(draws) for draws in independent])
    assert stats.qmc.discrepancy(stats.norm.cdf(noise)) < 0.7 * typical
    # Both numbers of a row together: the squared radius of two normal numbers is exponential, the angle uniform
    assert stats.kstest((noise**2).sum(1), "expon", args=(0, 2)).pvalue > 0.05
    assert stats.kstest(np.arctan2(*noise.T), "uniform", args=(-np.pi, 2 * np.pi)).pvalue > 0.05


def test_tables_stay_float32_and_are_not_saved():
    schedule = DiffusionSchedule(NUM_STEPS, SCALE)
    tables = schedule.tables()
    assert not schedule.state_dict()
    for move in (schedule.to, schedule.half, schedule.bfloat16, schedule.double):
        moved = move(torch.bfloat16) if move == schedule.to else move()
        for name, table in moved.named_buffers():
            assert table.dtype == torch.float32
            assert torch.equal(table, tables[name])
    assert schedule.to("meta").alphas_cumprod.device.type == "meta"


class Uncorrupted(DiffusionSchedule):
    """Keeps what the forward process is given."""

    def add_noise(self, signal, noise, timesteps):
        self.given = signal, noise, timesteps
        return super().add_noise(signal, noise, timesteps)


def corrupt(spans, counts, num_proposals, seed=0):
    """The clean spans, the noise and the steps that `corrupt` drew, and what it made of them."""
    schedule = Uncorrupted(NUM_STEPS, SCALE)
    torch.manual_seed(seed)
    draws = schedule.draw(*spans.shape[:2], num_proposals)
    result = schedule.corrupt(spans, counts, draws)
    signal, noise, timesteps = schedule.given
    assert torch.equal(result[1], timesteps)
    torch.testing.assert_close(result[0], reference().add_noise(signal, noise, timesteps), rtol=1e-4, atol=1e-5)
    return signal_to_spans(signal, SCALE), noise, timesteps


def test_true_spans_come_first():
    spans = torch.tensor(
        [[[0.1, 0.05], [0.2, 0.06], [0.3, 0.07]], [[0.4, 0.08], [9.0, 9.0], [9.0, 9.0]], [[9.0, 9.0]] * 3]
    )
    counts = torch.tensor([3, 1, 0])
    orders = set()
    for seed in range(20):
        for num_proposals in (1, 2, 3, 8):
            clean, _, _ = corrupt(spans, counts, num_proposals, seed)
            assert clean.shape == (3, num_proposals, 2)
            kept = min(num_proposals, 3)
            first = {tuple(row) for row in clean[0, :kept].mul(100).round().long().tolist()}
            assert len(first) == kept and first <= {(10, 5), (20, 6), (30, 7)}
            torch.testing.assert_close(clean[1, 0], spans[1, 0])
            assert (clean <= 1).all() and (clean >= 0).all()
        orders.add(tuple(clean[0, :3, 0].mul(10).round().long().tolist()))
    assert len(orders) > 3  # of 6


def test_draws_of_the_forward_process():
    clean, noise, timesteps = corrupt(torch.zeros(4000, 0, 2), torch.zeros(4000, dtype=torch.long), 5)
    # Padding: between two independent points of the video
    assert stats.kstest(span_to_window(clean).flatten().double().numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(clean[..., 1].flatten().double().numpy(), stats.beta(1, 2).cdf).pvalue > 0.01
    assert stats.kstest(noise.flatten().double().numpy(), "norm").pvalue > 0.01
    assert timesteps.dtype == torch.long and timesteps.min() >= 0 and timesteps.max() < NUM_STEPS
    assert stats.kstest(timesteps.double().numpy() + 0.5, "uniform", args=(0, NUM_STEPS)).pvalue > 0.01
    # Steps are drawn per sample rather than per batch, and noise per proposal
    assert len(timesteps.unique()) > 900 and len(noise.unique()) > 0.99 * noise.numel()


def test_draws_can_be_repeated():
    arguments = (torch.rand(2, 3, 2), torch.tensor([3, 2]), 6)
    for first, second in zip(corrupt(*arguments, seed=1), corrupt(*arguments, seed=1), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(corrupt(*arguments, seed=1)[1], corrupt(*arguments, seed=2)[1])
