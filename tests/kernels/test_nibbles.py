"""4-bit codes: their levels, their place in a byte, and unbiased rounding."""

import numpy as np
import pytest
import torch

from qft_hf.kernels.nibbles import load_nibbles, round_to_nibbles
from qft_hf.kernels.philox import MOMENTUM, WEIGHT, rounding_words
from tests.kernels.backends import cpu, reference
from tests.kernels.states import (
    NIBBLE_UNITS,
    arguments,
    assert_same_state,
    make_state,
    momentum64,
    spread,
    stored64,
)
from tests.tolerances import FP32_EPS, assert_same_bits, mean_error

BACKENDS = [reference, cpu]
LEVELS = torch.tensor(sorted(NIBBLE_UNITS[np.arange(16) != 8]))
SCALE = 3.1e-3  # not a power of two


def words_for(rows: int, columns: int, seed: int = 5) -> torch.Tensor:
    return rounding_words(
        slice(0, rows), -(-columns // 2), seed=seed, step=7, stream=3, purpose=MOMENTUM,
        device=torch.device("cpu"),
    )  # fmt: skip


def test_columns_share_a_byte_low_half_first():
    packed = torch.tensor([[0x17, 0x9F, 0x05]], dtype=torch.uint8)

    values = load_nibbles(packed, torch.tensor([[0.5]]), 5)

    assert values.tolist() == [[35.0, 2.0, -2.0, -35.0, 20.0]]


def test_each_group_of_64_columns_has_its_scale():
    packed = torch.full((2, 65), 0x11, dtype=torch.uint8)  # 4 units everywhere
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])

    values = load_nibbles(packed, scales, 129)

    assert (values.double().numpy() == 4 * spread(scales, 129, 64)).all()


@pytest.mark.parametrize("words", ["random", "lowest", "highest"])
@pytest.mark.parametrize("columns", [1, 15, 64, 100])
def test_what_lies_on_a_level_stays(columns, words):
    """For any random number, as FP32 noise of the quotient is less than its distance from 0."""
    rows = 50
    generator = torch.Generator().manual_seed(0)
    units = LEVELS[torch.randint(15, (rows, columns), generator=generator)].float()
    units[:, ::64] = 70.0
    scales = torch.rand(rows, -(-columns // 64), generator=generator) * 1e-3 + 1e-6
    values = units * torch.from_numpy(spread(scales, columns, 64)).float()
    drawn = {
        "random": words_for(rows, columns),
        "lowest": torch.zeros(rows, -(-columns // 2), dtype=torch.int64),
        "highest": torch.full((rows, -(-columns // 2)), 2**32 - 1),
    }[words]

    packed, new_scales = round_to_nibbles(values, drawn)

    back = load_nibbles(packed, new_scales, columns)
    np.testing.assert_allclose(back, values, rtol=8 * FP32_EPS, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("units", [0.02, 1.0, 3.9, 4.1, 13.0, 69.0, -0.5, -47.0])
def test_mean_of_100000_roundings_is_the_value(backend, units):
    """Values between levels: five standard errors, and 2**-17 of a gap for 16 random bits.

    A momentum of zeros becomes `0.25 * g`; the first column of each group of 64 sets the scale.
    """
    state = make_state((200, 512), group_size=None, momentum_bits=4)
    state.momentum.codes.zero_()
    gradient = torch.full((200, 512), units * SCALE * 4)
    gradient[:, ::64] = 70 * SCALE * 4
    state.set_gradient(gradient)
    # The gradient as 8 bits store it, so that only the rounding of the momentum is measured.
    exact = state.gradient.codes[0, 1].double() * state.gradient.scales[0, 0].double() * 0.25
    exact /= state.momentum.scales.new_tensor(SCALE).double()

    backend.lion_step_(*state.arguments(), **arguments(beta2=0.75))

    np.testing.assert_allclose(state.momentum.scales, SCALE, rtol=8 * FP32_EPS)
    found = np.delete(momentum64(state), np.s_[::64], axis=1) / SCALE
    above = LEVELS[LEVELS > exact].min().item()
    below = LEVELS[LEVELS <= exact].max().item()
    assert set(np.round(found, 3).ravel()) <= {below, above}
    gap = above - below
    noise = gap * mean_error((exact.item() - below) / gap, found.size)
    assert abs(found.mean() - exact.item()) <= 5 * noise + gap * 2.0**-17 + 70 * 8 * FP32_EPS


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_moves_the_scale_and_no_code(backend):
    """The largest value keeps the largest code, so values that only decay keep their level."""
    state = make_state((1000, 16), group_size=None, momentum_bits=4)
    codes = torch.tensor([7, *range(-7, 8)]) & 15
    state.momentum.codes[:] = (codes[::2] | codes[1::2] << 4).to(torch.uint8)
    state.momentum.scales.fill_(SCALE)
    state.gradient.codes.zero_()
    before = state.clone()

    backend.lion_step_(*state.arguments(), **arguments())

    assert_same_bits(state.momentum.codes, before.momentum.codes)
    np.testing.assert_allclose(state.momentum.scales, 0.99 * SCALE, rtol=8 * FP32_EPS)


def test_nearest_takes_the_nearer_level():
    """Control: without random numbers most small steps are lost."""
    values = torch.tensor([[70.0, 1.9, 2.1, -46.9, -47.1]])

    packed, scales = round_to_nibbles(values, None)

    assert load_nibbles(packed, scales, 5).tolist() == [[70.0, 0.0, 4.0, -40.0, -54.0]]


def test_zeros_have_the_least_scale_and_the_rest_of_a_byte_stays_empty():
    packed, scales = round_to_nibbles(torch.zeros(3, 65), words_for(3, 65))
    assert (packed == 0).all()
    assert (scales == np.float32(1e-30)).all()

    packed, _ = round_to_nibbles(torch.full((3, 65), -2.0), words_for(3, 65))
    assert (packed[:, :-1] == 0x99).all()
    assert (packed[:, -1] == 0x09).all()


def test_weight_and_momentum_draw_different_numbers():
    drawn = {
        purpose: rounding_words(
            slice(0, 100), 100, seed=5, step=7, stream=3, purpose=purpose,
            device=torch.device("cpu"),
        ).double() / 2**32 - 0.5
        for purpose in (WEIGHT, MOMENTUM)
    }  # fmt: skip
    product = (drawn[WEIGHT] * drawn[MOMENTUM]).mean().item()
    assert abs(product) <= 5 / 12 / 100  # a product has deviation 1/12, and there are 10,000


def test_neighbours_and_seeds_round_independently():
    values = torch.full((100, 1000), 2.0)  # half-way between levels 0 and 4
    values[:, ::40] = 70.0  # at least one in each group of 64
    is_free = torch.arange(1000) % 40 > 0
    first, other = (
        torch.where(load_nibbles(*round_to_nibbles(values, words), 1000) > 2, 0.5, -0.5).double()
        for words in (words_for(100, 1000), words_for(100, 1000, seed=8))
    )
    for lagged in [first.roll(lag, dims=1) for lag in (1, 2, 3, 8)] + [other]:
        free = is_free & is_free.roll(1) & is_free.roll(2) & is_free.roll(3) & is_free.roll(8)
        product = (first * lagged)[:, free]
        assert abs(product.mean().item()) <= 5 * 0.25 / np.sqrt(product.numel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_moves_by_one_level_at_most_beyond_its_exact_value(backend):
    """Compare with Lion in float64 on ragged shapes, over steps that raise and lower scales."""
    state = make_state((13, 257), group_size=100, outlier_fraction=0.03, momentum_bits=4)
    for step, size in enumerate([3e-3, 3e-2, 1e-4], start=1):
        gradient = torch.randn(13, 257, generator=torch.Generator().manual_seed(step)) * size
        state.set_gradient(gradient)
        exact = 0.99 * momentum64(state) + 0.01 * stored64(state.gradient)

        backend.lion_step_(*state.arguments(), **arguments(step=step))

        scale = spread(state.momentum.scales, 257, 64)
        units, found = exact / scale, momentum64(state) / scale
        place = np.clip(np.searchsorted(LEVELS.numpy(), units), 1, 14)
        gap = LEVELS.numpy()[place] - LEVELS.numpy()[place - 1]
        assert (np.abs(found - units) <= gap * (1 + 1e-5)).all()
        assert (np.abs(found).max(axis=1) > 69.9).all()


def test_stochastic_off_uses_no_random_numbers():
    states = [make_state((5, 130), group_size=None, momentum_bits=4) for _ in range(2)]
    for state, seed in zip(states, (1, 2), strict=True):
        reference.lion_step_(*state.arguments(), **arguments(stochastic=False, seed=seed))
    assert_same_state(*states)
