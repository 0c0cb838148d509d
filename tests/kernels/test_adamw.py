"""One AdamW step on 8-bit state: backends against each other, and against AdamW in float64."""

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels import AdamW, Moments, Quantized, Rounding, Weight, adamw, backend
from qft_hf.kernels.adamw import ROOT_TINY, UNIT, exact_sqrt, stored_root
from tests.tolerances import FP32_EPS, assert_same_bits
from tests.values import values64

BACKENDS = ["reference", "cpu"]
SHAPES = [(1, 1), (3, 5), (7, 33), (13, 257), (40, 600), (130, 1025)]
# No neutral values: nonzero decay and stream, and an odd seed above 32 bits.
RULE = AdamW(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
ROUNDING = Rounding(seed=0x1234_5678_9ABC_DEF1, step=1, stream=3)
# Upper bound of Adam's |m| / sqrt(v), by the Cauchy-Schwarz inequality.
BOUND = 0.1 / sqrt(0.001) / sqrt(1 - 0.81 / 0.999)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_weight(shape: tuple[int, int], group_size: int | None, n_outliers: int = 0) -> Weight:
    rows, columns = shape
    draw = generator(rows * columns)
    codes = torch.randint(-127, 128, shape, generator=draw, dtype=torch.int8)
    order = torch.rand(shape, generator=draw).argsort(1)[:, :n_outliers].short().contiguous()
    codes.scatter_(1, order.long(), 0)
    scales = torch.rand(rows, -(-columns // (group_size or columns)), generator=draw) * 1e-2 + 1e-4
    values = torch.randn(rows, order.shape[1], generator=draw)
    return Weight(codes, scales, values, order, group_size)


def make_moments(shape: tuple[int, int], group_size: int = 256) -> Moments:
    groups = (shape[0], -(-shape[1] // group_size))
    return Moments(
        torch.zeros(shape, dtype=torch.int8),
        torch.ones(groups),
        torch.zeros(shape, dtype=torch.uint8),
        torch.full(groups, ROOT_TINY),
        group_size,
    )


def coded(x: Tensor, group_size: int = 256) -> Quantized:
    return Quantized(*kernels.quantize(x, group_size=group_size), group_size)


class Directions:
    """Steps a weight that has only outliers, which are FP32, so that its moves are exact."""

    def __init__(self, shape: tuple[int, int], **rule: Any) -> None:
        columns = torch.arange(shape[1], dtype=torch.int16).repeat(shape[0], 1)
        codes = torch.zeros(shape, dtype=torch.int8)
        self.weight = Weight(codes, torch.ones(shape[0], 1), torch.zeros(shape), columns, None)
        self.moments = make_moments(shape)
        self.rule = RULE._replace(**{"lr": 1.0, "weight_decay": 0.0, **rule})
        self.n_steps = 0

    def step(self, gradient: Quantized, **rounding: Any) -> Tensor:
        self.n_steps += 1
        self.weight.outlier_values.zero_()
        kernels.adamw_step_(
            self.weight, self.moments, gradient, rule=self.rule,
            rounding=ROUNDING._replace(step=self.n_steps, **rounding),
        )  # fmt: skip
        return -self.weight.outlier_values


# --- backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"stochastic": False}], ids=str)
@pytest.mark.parametrize("n_outliers", [0, 3])
@pytest.mark.parametrize("group_size", [None, 3, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_reference_bit_for_bit(shape, group_size, n_outliers, changes, n_threads):
    """Gradients of all magnitudes, zeros included; steps of up to many quanta change scales."""
    states = {}
    for name in BACKENDS:
        weight, moments = make_weight(shape, group_size, n_outliers), make_moments(shape)
        with backend.use(name):
            for step, size in enumerate([1e-4, 1e-20, 1e3, 1e-6, 1e20, 0.0, 1e-4], start=1):
                draw = generator(step)
                x = torch.randn(shape, generator=draw)
                x *= size * torch.exp(3 * torch.randn(shape, generator=draw))
                kernels.adamw_step_(
                    weight, moments, coded(x),
                    rule=RULE._replace(
                        lr=[1e-3, 0.3][step % 2], maximize=changes.get("maximize", False)
                    ),
                    rounding=ROUNDING._replace(
                        step=step, first_row=2, stochastic=changes.get("stochastic", True)
                    ),
                )  # fmt: skip
        states[name] = (*weight.tensors, *moments.tensors)
    for actual, expected in zip(states["cpu"], states["reference"], strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_rows_in_parts_get_the_bits_of_the_whole(name, monkeypatch):
    """A weight may be stepped in tiles, and the reference may take any number of rows at a time."""
    states = []
    for chunk, parts in ((2**16, [slice(0, 40)]), (1000, [slice(0, 13), slice(13, 40)])):
        monkeypatch.setattr("qft_hf.kernels.weight.CHUNK_ELEMENTS", chunk)
        weight, moments = make_weight((40, 600), None, 3), make_moments((40, 600))
        for step in range(1, 5):
            gradient = coded(torch.randn(40, 600, generator=generator(step)) * 1e-3)
            for rows in parts:
                part = Moments(*(tensor[rows] for tensor in moments.tensors), 256)
                with backend.use(name):
                    kernels.adamw_step_(
                        weight.rows(rows), part, gradient.rows(rows), rule=RULE,
                        rounding=ROUNDING._replace(step=step, first_row=rows.start),
                    )  # fmt: skip
        states.append((*weight.tensors, *moments.tensors))
    for actual, expected in zip(*states, strict=True):
        assert_same_bits(actual, expected)


@pytest.mark.parametrize("name", BACKENDS)
def test_bits_do_not_depend_on_subnormal_numbers(name):
    """Some devices flush them to 0, as does a CPU after `set_flush_denormal`."""
    states = []
    for flush in (False, True):
        steps = Directions((4, 300))
        torch.set_flush_denormal(flush)
        try:
            with backend.use(name):
                for step in range(1, 31):
                    draw = generator(step)
                    x = torch.exp(2 * torch.randn(4, 300, generator=draw))
                    x *= torch.randn(4, 300, generator=draw)
                    # One thread, since only the calling thread flushes.
                    steps.step(coded(x * [1e-20, 1e-24, 1e-30, 1e-6, 1e-38, 0.0][step % 6]))
        finally:
            torch.set_flush_denormal(False)
        states.append(steps.moments.tensors)
    for actual, expected in zip(*states, strict=True):
        assert_same_bits(actual, expected)


def test_the_root_is_correctly_rounded():
    """`Tensor.sqrt` on a CPU is not: a fifth of its results differ from numpy's."""
    x = torch.rand(100_000, generator=generator(0)) * 1e-3
    exact = torch.from_numpy(np.sqrt(x.double().numpy()).astype(np.float32))
    assert_same_bits(exact_sqrt(x), exact)


# --- against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(("size", "eps"), [(1e-7, 1e-8), (1e-12, 1e-13), (1e9, 1e8)])
def test_the_first_step_is_exact(size, eps, maximize):
    """Without moments the direction is g / (|g| + eps), up to FP32 rounding."""
    gradient = coded(torch.randn(5, 600, generator=generator(0)) * size)
    gradient.scales.clamp_(max=2.0**24)  # the step clamps larger scales to this one
    g = values64(gradient).numpy()

    direction = Directions((5, 600), maximize=maximize, eps=eps).step(gradient).double().numpy()

    exact = (-g if maximize else g) / (np.abs(g) + eps)
    # About ten operations, and the least stored v, at most 1e-11 of the smallest v here.
    assert (np.abs(direction - exact) <= 16 * FP32_EPS * np.abs(exact)).all()
    assert np.abs(exact[g != 0]).max() < 0.999  # eps matters


@pytest.mark.parametrize(("spread", "error"), [(0.5, 0.08), (1.5, 0.12), (2.5, 0.14)])
def test_directions_stay_those_of_float64_adamw(spread, error):
    """Directions stay close over hundreds of steps; log sizes in a row have deviation `spread`.

    `error` is a relative root mean square. Errors do not add up, since rounding has no bias.
    """
    shape = (8, 512)
    draw = generator(1)
    size = torch.exp(spread * torch.randn(shape, generator=draw)) * 1e-4
    steps = Directions(shape)
    m = v = np.zeros(shape)
    squares = np.zeros(2)
    bias, moved = 0.0, 0.0
    for t in range(1, 601):
        gradient = coded(size * (torch.randn(shape, generator=draw) + 0.1))
        g = values64(gradient).numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        exact = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        direction = steps.step(gradient).double().numpy()
        assert np.abs(direction).max() < BOUND
        if t > 200:
            squares += [np.square(direction - exact).mean(), np.square(exact).mean()]
            bias, moved = bias + direction.sum() - exact.sum(), moved + exact.sum()
    assert sqrt(squares[0] / squares[1]) < error
    assert abs(bias / moved) < 0.01
    root = stored_root(steps.moments.root_codes, steps.moments.root_scales, 256).double() / UNIT
    live = v > 0
    assert abs(np.median(root.numpy()[live] / np.sqrt(v[live])) - 1) < 0.02


def test_small_elements_beside_large_ones_step_as_far():
    """For elements fifty times smaller, codes of v itself would be 0, and codes of m at most 3."""
    shape = (4, 256)
    size = torch.where(torch.arange(256) % 2 == 0, 1.0, 0.02) * 1e-3
    steps = Directions(shape)
    for _ in range(100):
        direction = steps.step(coded(size * torch.ones(shape)))
    # With a constant gradient, m is g and v is g^2.
    small, large = direction[:, 1::2].double(), direction[:, ::2].double()
    assert abs(small.mean() - 1) < 0.05
    assert abs(large.mean() - 1) < 0.05


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-12, 1e-6, 1.0, 1e9, 1e20, 1e33])
def test_directions_are_finite_and_bounded_at_all_sizes(name, size):
    steps = Directions((4, 300))
    draw = generator(2)
    with backend.use(name):
        for _ in range(40):
            spread = torch.exp(3 * torch.randn(4, 300, generator=draw))
            direction = steps.step(coded(torch.randn(4, 300, generator=draw) * spread * size))
            assert (direction.abs() < BOUND).all()  # and not NaN
    assert all(bool(tensor.isfinite().all()) for tensor in steps.moments.tensors)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_code_of_the_second_moment_means_zero(name):
    """Rare gradients of 1e-8 of their neighbors': v has its lowest codes."""
    steps = Directions((4, 256), eps=1e-30)
    with backend.use(name):
        for t in range(60):
            x = torch.zeros(4, 256)
            x[:, 0] = 1.0
            if t % 10 == 0:
                x[0, 0], x[0, 1:] = 1e-8, 1e-8  # alone in their group: all codes are large
            direction = steps.step(coded(x))
            assert (direction.abs() < BOUND).all()


# --- rounding -------------------------------------------------------------------------------------


def test_roots_and_ratios_are_rounded_without_bias():
    """The mean of 4000 roundings is within five standard errors, of at most half a code each."""
    n = 4000
    draw = generator(3)
    root_v = torch.exp(1.5 * torch.randn(1, 256, generator=draw)) * 1e-3 * UNIT
    ratio = torch.randn(1, 256, generator=draw)
    of_roots, of_ratios = torch.zeros(1, 256).double(), torch.zeros(1, 256).double()
    for step in range(n):
        uniforms = adamw._moment_uniforms(ratio, ROUNDING._replace(step=step))
        codes, root_scale = adamw._quantized_root(root_v, uniforms[0], 256)
        of_roots += codes.double() + 0.5
        codes, ratio_scale = adamw._quantized_ratio(ratio.clone(), uniforms[1], 256)
        of_ratios += codes.double()
    error = 5 * 0.5 / sqrt(n)
    assert (of_roots / n - root_v.double() ** 0.25 / root_scale).abs().max() < error
    assert (of_ratios / n - ratio.double() / ratio_scale).abs().max() < error


def test_weight_root_and_ratio_are_rounded_by_independent_numbers():
    """All three are bits of one word; correlations are within five standard errors of zero."""
    words = Rounding(1, 2, 3).words(slice(0, 100), 1000, torch.device("cpu"))
    like = torch.empty(100, 1000)
    root, ratio = adamw._moment_uniforms(like, Rounding(1, 2, 3))
    weight = (words >> 8).double() / 2**24
    uniforms = torch.stack([weight.flatten(), root.flatten().double(), ratio.flatten().double()])
    assert (uniforms >= 0).all()
    assert (uniforms < 1).all()
    off_diagonal = torch.corrcoef(uniforms) - torch.eye(3)
    assert off_diagonal.abs().max() < 5 / sqrt(100_000) + 2**-8
    assert (uniforms.mean(1) - 0.5).abs().max() < 5 * sqrt(1 / 12 / 100_000)


@pytest.mark.parametrize("name", BACKENDS)
def test_nearest_needs_no_random_numbers(name):
    states = []
    for seed in (1, 2):
        steps = Directions((3, 300))
        with backend.use(name):
            for t in range(4):
                x = torch.randn(3, 300, generator=generator(t))
                steps.step(coded(x), seed=seed, stochastic=False)
        states.append(steps.moments.tensors)
    for actual, expected in zip(*states, strict=True):
        assert_same_bits(actual, expected)
    root = stored_root(*steps.moments.tensors[2:], 256)
    draws = Directions((3, 300))
    for t in range(4):
        draws.step(coded(torch.randn(3, 300, generator=generator(t))))
    assert (stored_root(*draws.moments.tensors[2:], 256) != root).any()


# --- elements that do not change ------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_without_gradient_moments_and_decay_nothing_changes(name):
    """Elements with zero gradients, in a row of their own or between active ones."""
    shape = (8, 600)
    weight, moments = make_weight(shape, None), make_moments(shape)
    weight.codes.clamp_(-100, 100)[:, 0] = 127  # scales stay
    before = weight.codes.clone()
    dead = torch.zeros(shape, dtype=torch.bool)
    dead[:, ::3] = True
    dead[0] = True
    with backend.use(name):
        for step in range(1, 60):
            x = torch.randn(shape, generator=generator(step)).masked_fill_(dead, 0.0)
            kernels.adamw_step_(
                weight, moments, coded(x), rule=RULE._replace(lr=3e-5, weight_decay=0.0),
                rounding=ROUNDING._replace(step=step),
            )  # fmt: skip
    assert_same_bits(weight.codes[dead], before[dead])
    assert (moments.ratio_codes[dead] == 0).all()
    assert (weight.codes[~dead] != before[~dead]).float().mean() > 0.1
    assert_same_bits(moments.root_scales[0], torch.full((3,), ROOT_TINY))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_weight_stops_after_its_gradient_has(name):
    """An input dies. Rounded to nearest, the ratio would stay at code 5 and keep moving weights."""
    steps = Directions((4, 512))
    draw = generator(4)
    with backend.use(name):
        for t in range(260):
            x = torch.randn(4, 512, generator=draw) + 1.0
            if t >= 60:
                x[:, ::2] = 0.0
            direction = steps.step(coded(x))
    assert (direction[:, ::2] == 0).all()
    assert (steps.moments.ratio_codes[:, ::2] == 0).all()
    assert (direction[:, 1::2] != 0).all()


# --- refusals -------------------------------------------------------------------------------------


def moments_with(**changes: Tensor) -> Moments:
    good = make_moments((6, 50))
    names = ("ratio_codes", "ratio_scales", "root_codes", "root_scales")
    return Moments(*(changes.get(name, getattr(good, name)) for name in names), 256)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"ratio_codes": torch.zeros(6, 50)}, TypeError, r"ratio codes must be torch\.int8"),
        ({"root_codes": torch.zeros(6, 50).char()}, TypeError, r"root codes must be torch\.uint8"),
        ({"root_codes": torch.zeros(6, 49).byte()}, ValueError, "root codes must have shape"),
        ({"ratio_scales": torch.ones(6, 2)}, ValueError, r"scales must be float32 of shape \(6, 1"),
        ({"root_scales": torch.ones(6, 1).half()}, ValueError, "scales must be float32 of shape"),
    ],
)
def test_moments_that_do_not_fit_are_refused(changes, error, match):
    with pytest.raises(error, match=match):
        moments_with(**changes)


@pytest.mark.parametrize(
    ("moments", "gradient", "match"),
    [
        ({"ratio_scales": float("nan")}, 1.0, "ratio scales must be finite"),
        ({"root_scales": float("inf")}, 1.0, "root scales must be finite"),
        ({"root_scales": 1e30}, 1.0, "root scales must be at most 256, .* reload the optimizer"),
        ({}, float("nan"), "gradient scales must be finite"),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_values_that_would_do_harm_are_refused_and_nothing_is_written(
    moments, gradient, match, name
):
    weight = make_weight((6, 50), None)
    state = moments_with(**{key: torch.full((6, 1), value) for key, value in moments.items()})
    codes = torch.ones(6, 50, dtype=torch.int8)
    before = [tensor.clone() for tensor in (*weight.tensors, *state.tensors)]

    with backend.use(name), pytest.raises(ValueError, match=match):
        kernels.adamw_step_(
            weight, state, Quantized(codes, torch.full((6, 1), gradient), 256), rule=RULE,
            rounding=ROUNDING,
        )  # fmt: skip

    for tensor, kept in zip((*weight.tensors, *state.tensors), before, strict=True):
        assert_same_bits(tensor, kept)


def test_arguments_that_do_not_fit_each_other_are_refused():
    weight, moments = make_weight((6, 50), None), make_moments((6, 50))
    gradient = coded(torch.ones(6, 50))
    arguments = {"rule": RULE, "rounding": ROUNDING}
    with pytest.raises(ValueError, match="gradient codes must have shape"):
        kernels.adamw_step_(weight, moments, gradient.rows(slice(0, 5)), **arguments)
    with pytest.raises(ValueError, match="ratio codes must have shape"):
        kernels.adamw_step_(weight, make_moments((5, 50)), gradient, **arguments)
    other = Quantized(gradient.codes, gradient.scales, 64)
    with pytest.raises(ValueError, match="the gradient's groups, got 256 columns for groups of 64"):
        kernels.adamw_step_(weight, moments, other, **arguments)
