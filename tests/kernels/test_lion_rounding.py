"""Stochastic rounding is unbiased against the stored scale, and scales are sticky."""

from math import sqrt

import numpy as np
import pytest
import torch

from tests.kernels.backends import cpu, reference
from tests.kernels.states import LionState, lion_step_, make_state, stored64
from tests.tolerances import FP32_EPS, assert_same_bits, mean_error

BACKENDS = [reference, cpu]
SCALE = 3.1e-3  # not a power of two


def uniform_state(shape: tuple[int, int], *, code: int, top: int = 127) -> LionState:
    """Codes are `code`, but `top` first in each row; zero momentum, gradient +1 everywhere."""
    state = make_state(shape, group_size=None)
    state.weight.codes.fill_(code)
    state.weight.codes[:, 0] = top
    state.weight.scales.fill_(SCALE)
    state.momentum.codes.zero_()
    state.gradient.codes.fill_(1)
    return state


# --- unbiased -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quanta", [1e-3, 0.01, 0.3, 0.5, 0.9, 1.25])
@pytest.mark.parametrize("code", [40, -40])
def test_mean_of_100000_roundings_against_a_sticky_scale(backend, code, quanta):
    """An update of `quanta` codes moves the mean by exactly that, within five standard errors."""
    state = uniform_state((100, 1001), code=code)

    lion_step_(backend, state, lr=quanta * SCALE, weight_decay=0.0)

    assert (state.weight.scales == torch.tensor(SCALE)).all()
    mean = state.weight.codes[:, 1:].double().mean().item()
    assert abs(mean - (code - quanta)) <= 5 * mean_error(quanta % 1, 100_000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("code", [40, -40, 3])
@pytest.mark.parametrize("quanta", [-0.3, -20.2, -200.0])  # upwards: beyond 127, a new scale
def test_mean_of_100000_roundings_against_a_new_scale(backend, code, quanta):
    state = uniform_state((100, 1001), code=code)
    old_scale = torch.tensor(SCALE).double().item()
    lr = abs(quanta) * SCALE

    lion_step_(backend, state, lr=lr, weight_decay=0.0, maximize=quanta < 0)

    new_scale = state.weight.scales[0, 0].double().item()
    assert new_scale > old_scale
    assert state.weight.codes[:, 0].eq(120).all()
    exact = (code * old_scale + lr) / new_scale
    mean = state.weight.codes[:, 1:].double().mean().item()
    # The exact quotient is known to FP32 noise of four operations on a value below 128.
    noise = 4 * 128 * FP32_EPS
    assert abs(mean - exact) <= 5 * mean_error(exact % 1, 100_000) + noise
    assert set(state.weight.codes[:, 1:].unique().tolist()) <= {np.floor(exact), np.ceil(exact)}


@pytest.mark.parametrize("quanta", [1e-3, 0.4 * 2.0**-16])
def test_tiny_steps_are_unbiased(quanta):
    """Weight decay moves a weight by 1e-3 quanta or less.

    Eight random bits would move it by 4e-3 or not at all; sixteen could not tell 0.4 * 2**-16 from
    2**-16. Only the fast backend runs this, as it takes eight million draws.
    """
    state = uniform_state((2000, 4097), code=50)

    lion_step_(cpu, state, lr=quanta * SCALE, weight_decay=0.0)

    n_moved = int((state.weight.codes[:, 1:] == 49).sum())
    assert n_moved == int((state.weight.codes[:, 1:] != 50).sum())
    assert abs(n_moved / 8_192_000 - quanta) <= 5 * mean_error(quanta, 8_192_000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decay_is_unbiased_for_every_code(backend):
    """Decay of 1e-2: all codes from -127 to 127 shrink by 1 %, in the mean over 2000 rows."""
    codes = torch.arange(-127, 128, dtype=torch.int8).repeat(2000, 1)
    state = make_state(tuple(codes.shape), group_size=None)
    state.weight.codes.copy_(codes)
    state.weight.scales.fill_(SCALE)
    state.momentum.codes.zero_()
    state.gradient.codes.zero_()

    lion_step_(backend, state, lr=0.1, weight_decay=0.1)

    exact = codes[0].double() * 0.99
    mean = state.weight.codes.double().mean(dim=0)
    part = exact - exact.floor()
    error = (part * (1 - part) / 2000).sqrt()
    # Five standard errors for each value: one of 255 exceeds them once in 7,000 seeds.
    assert ((mean - exact).abs() <= 5 * error + 1e-9).all()
    # The sum shows a bias that is too small for the means of single values.
    total = (exact.sign() * (mean - exact)).sum()
    assert abs(total) <= 5 * sqrt(float(error.square().sum()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_round_independently(backend):
    """Compare draws at four lags and in the next row, and under another stream and seed."""
    first = uniform_state((100, 1001), code=0)
    lion_step_(backend, first, lr=0.5 * SCALE, weight_decay=0.0)
    a = first.weight.codes[:, 1:].double() + 0.5  # +-1/2 with equal probability
    others = [a.roll(lag, dims=1) for lag in (1, 2, 3, 4)] + [a.roll(1, dims=0)]
    for change in ({"stream": 4}, {"seed": 1}):
        other = uniform_state((100, 1001), code=0)
        lion_step_(backend, other, lr=0.5 * SCALE, weight_decay=0.0, **change)
        others.append(other.weight.codes[:, 1:].double() + 0.5)

    for b in others:
        # Each product is +-1/4: the standard error of the mean is 1/4 / sqrt(n).
        assert abs((a * b).mean().item()) <= 5 * 0.25 / sqrt(100_000)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quanta", [0.003, 0.03, 0.2])
def test_roundings_of_an_element_add_up_over_steps(backend, quanta):
    """After 300 equal steps every code is within 4 of the exact value.

    With independent roundings the error of a code has a standard deviation of 2.9 at 0.03 quanta,
    and the largest of 2,000 errors is about 10.
    """
    state = uniform_state((20, 101), code=100)

    for step in range(1, 301):
        lion_step_(backend, state, lr=quanta * SCALE, weight_decay=0.0, step=step)

    error = state.weight.codes[:, 1:].double() - (100 - 300 * quanta)
    assert error.abs().max() <= 4
    # From element to element the errors are random: their mean is that of 2,000 numbers.
    assert abs(error.mean()) <= 5 * 4 / sqrt(2_000)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_loses_small_updates(backend):
    """Control for the tests above: rounding to nearest leaves every code where it was."""
    state = uniform_state((10, 101), code=40)

    lion_step_(backend, state, lr=0.4 * SCALE, weight_decay=0.0, stochastic=False)

    assert (state.weight.codes[:, 1:] == 40).all()


# --- sticky ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "changes",
    [{"weight_decay": 0.0}, {"lr": 0.0}],
    ids=["zero gradient, momentum and decay", "zero learning rate"],
)
def test_1000_updates_by_nothing_change_no_code(backend, changes):
    state = make_state((5, 70), group_size=32, outlier_fraction=0.03)
    if "lr" not in changes:
        state.momentum.codes.zero_()
        state.gradient.codes.zero_()
    before = state.clone()

    for step in range(1, 1001):
        lion_step_(backend, state, **changes, step=step)

    for tensor, wanted in zip(state.weight.tensors, before.weight.tensors, strict=True):
        assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_element_without_update_keeps_its_code_beside_others_that_move(backend):
    state = uniform_state((50, 201), code=40, top=100)
    state.gradient.codes[:, ::2] = 0

    for step in range(1, 20):
        lion_step_(backend, state, lr=0.3 * SCALE, weight_decay=0.0, step=step)
        state.momentum.codes[:, ::2] = 0

    assert (state.weight.codes[:, 2::2] == 40).all()
    assert (state.weight.codes[:, 1::2] != 40).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("top", "quanta", "new_top"),
    [
        (127, 0.0, None),  # fits: nothing changes
        (126, 1.0, None),  # moves to exactly the last code
        (61, -1.0, None),  # moves to exactly the lowest largest code
        (127, 0.01, 120),  # no longer fits
        (60, -0.01, 120),  # has shrunk below half the range
        (30, 0.5, 120),
        (127, 1000.0, 120),  # a step far beyond the range
    ],
)
def test_a_scale_changes_only_when_it_must(backend, top, quanta, new_top):
    """The largest code of each row moves up by `quanta`; `new_top` is its code in a new scale."""
    state = uniform_state((20, 33), code=0, top=top)
    state.gradient.codes[:, 0] = -1
    state.gradient.codes[:, 1:] = 0
    if quanta < 0:
        state.gradient.codes.neg_()
    before = state.clone()

    lion_step_(backend, state, lr=abs(quanta) * SCALE, weight_decay=0.0)

    if new_top is None:
        assert_same_bits(state.weight.scales, before.weight.scales)
        assert (state.weight.codes[:, 0] == round(top + quanta)).all()
    else:
        assert (state.weight.codes[:, 0] == new_top).all()
        expected = SCALE * (top + quanta) / 120
        np.testing.assert_allclose(state.weight.scales.double(), expected, rtol=6 * FP32_EPS)
    assert (state.weight.codes[:, 1:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_a_row_follow_their_own_range(backend):
    """One group overflows, one has shrunk, one sticks, and the short last one overflows."""
    state = make_state((3, 35), group_size=10)
    state.weight.codes.fill_(0)
    state.weight.codes[:, [0, 10, 20, 30]] = torch.tensor([127, 20, 90, -127], dtype=torch.int8)
    state.weight.scales.fill_(SCALE)
    state.momentum.codes.zero_()
    state.gradient.codes.zero_()
    state.gradient.codes[:, [0, 10, 20, 30]] = torch.tensor([-1, -1, -1, 1], dtype=torch.int8)

    lion_step_(backend, state, lr=4 * SCALE, weight_decay=0.0)

    np.testing.assert_allclose(
        state.weight.scales.double() / SCALE,
        np.array([[131 / 120, 24 / 120, 1, 131 / 120]] * 3),
        rtol=6 * FP32_EPS,
    )
    assert (state.weight.codes[:, [0, 10, 20, 30]] == torch.tensor([120, 120, 94, -120])).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("group_size", [None, 16])
@pytest.mark.parametrize("lr", [1e-5, 1e-2])
def test_a_row_of_zeros_starts_to_train(lr, group_size, backend):
    """It starts with the smallest scale; the first step finds the right one."""
    state = make_state((4, 40), group_size=group_size)
    codes, scales = backend.quantize(torch.zeros(1, 40), group_size=group_size)
    state.weight.codes[1], state.weight.scales[1] = codes[0], scales[0]
    state.momentum.codes.zero_()
    state.gradient.codes.fill_(5)
    state.gradient.codes[:, ::3] = -5
    state.gradient.codes[:, 1] = 0
    direction = -state.gradient.codes[1].sign().double().numpy()

    lion_step_(backend, state, lr=lr)

    np.testing.assert_allclose(stored64(state.weight)[1], lr * direction, rtol=1e-6)
    for step in range(2, 6):
        lion_step_(backend, state, lr=lr, weight_decay=0.0, step=step)
    np.testing.assert_allclose(
        stored64(state.weight)[1], 5 * lr * direction, rtol=1 / 60
    )  # one code at most of 60 or more


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_group_that_decays_to_nothing_stays_finite(backend):
    """With lr * weight_decay = 1 the weight is 0 at once; the scale must not become zero or NaN."""
    state = make_state((4, 40), group_size=None)
    state.momentum.codes.zero_()
    state.gradient.codes.zero_()

    for step in (1, 2):
        lion_step_(backend, state, lr=1.0, weight_decay=1.0, step=step)

    assert (state.weight.codes == 0).all()
    assert state.weight.scales.isfinite().all()
    assert (state.weight.scales > 0).all()
