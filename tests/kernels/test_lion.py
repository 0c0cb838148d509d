"""One Lion step on INT8 state: backends against each other, and against Lion in float64."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import cpu, reference
from qft_hf.kernels.backend import backend_for
from qft_hf.kernels.checks import check_matrix
from tests.kernels.states import (
    ARGUMENTS,
    LionState,
    guarded,
    guards_are_intact,
    make_state,
    spread,
    values64,
)
from tests.tolerances import (
    assert_same_bits,
    float_update_bound,
    rounding_bound,
    sign_is_decided,
    stochastic_bound,
)

BACKENDS = [reference, cpu]
reference_weight = importlib.import_module("qft_hf.kernels.reference.weight")

SHAPES = [(1, 1), (3, 5), (7, 33), (13, 257), (40, 600), (5, 1025)]
GROUP_SIZES = [None, 3, 32, 100, 5000]  # odd, a power of two, ragged, longer than any row
OUTLIER_FRACTIONS = [0.0, 0.03]


def run(backend: Any, state: LionState, group_size: int | None, **changes: Any) -> None:
    arguments = {"state_group_size": 256, **ARGUMENTS, **changes}
    backend.lion_step_(*state.arguments(), group_size=group_size, **arguments)


def new_gradient(state: LionState, step: int, state_group_size: int = 256) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    gradient = torch.randn(state.codes.shape, generator=generator) * 3e-3
    gradient[0] = 0.0  # a row whose elements only decay
    state.set_gradient(gradient, state_group_size)


def assert_same_state(actual: LionState, expected: LionState) -> None:
    for name, tensor in actual.tensors().items():
        torch.testing.assert_close(
            tensor, getattr(expected, name), rtol=0, atol=0, msg=lambda text, n=name: f"{n}: {text}"
        )


# --- backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"stochastic": False}], ids=str)
@pytest.mark.parametrize("outlier_fraction", OUTLIER_FRACTIONS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_reference_bit_for_bit(
    shape, group_size, outlier_fraction, changes, momentum_bits
):
    """Five steps with steps of 2 to 300 quanta: scales stick, grow and shrink on the way."""
    expected = make_state(
        shape,
        group_size=group_size,
        outlier_fraction=outlier_fraction,
        momentum_bits=momentum_bits,
    )
    actual = expected.clone()

    for step, lr in enumerate([3e-4, 1e-3, 0.05, 3e-4, 0.0], start=1):
        new_gradient(expected, step)
        new_gradient(actual, step)
        run(reference, expected, group_size, **{"step": step, "lr": lr, **changes})
        run(cpu, actual, group_size, **{"step": step, "lr": lr, **changes})
        # Zero tolerance: every operation of both is correctly rounded, and in the same order.
        assert_same_state(actual, expected)


@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("state_group_size", [1, 7, 64, 2000])
def test_cpu_equals_reference_for_other_state_groups(state_group_size, index_dtype):
    expected = make_state(
        (11, 150),
        group_size=48,
        state_group_size=state_group_size,
        outlier_fraction=0.01,
        index_dtype=index_dtype,
    )
    actual = expected.clone()

    for step in (1, 2, 3):
        for state in (expected, actual):
            new_gradient(state, step, state_group_size)
        run(reference, expected, 48, step=step, state_group_size=state_group_size)
        run(cpu, actual, 48, step=step, state_group_size=state_group_size)
        assert_same_state(actual, expected)


@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16])
def test_rows_of_zeros_give_the_same_bits(group_size, momentum_bits):
    """A weight of zeros, which leaves the least scale, and a momentum of zeros, which gets it."""
    expected = make_state((4, 40), group_size=group_size, momentum_bits=momentum_bits)
    codes, scales = reference.quantize(torch.zeros(1, 40), group_size)
    expected.codes[1], expected.scales[1] = codes[0], scales[0]
    expected.momentum_codes[1:] = 0
    expected.gradient_codes[2] = 0
    actual = expected.clone()

    for step in (1, 2, 3):
        for backend, state in ((cpu, actual), (reference, expected)):
            run(backend, state, group_size, lr=1e-5, step=step)
        assert_same_state(actual, expected)
    assert (actual.scales[1] > 1e-8).all()
    assert (actual.momentum_scales[2] == np.float32(1e-30)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_designed_row_gives_the_same_bits(backend):
    """Ramps in codes, momentum and gradient: reading one column or group aside shows."""
    state = make_state((4, 70), group_size=16, state_group_size=20, outlier_fraction=0.03)
    ramp = (torch.arange(280) % 127).view(4, 70).to(torch.int8)
    state.codes.copy_(ramp)
    state.codes.scatter_(1, state.outlier_columns.long(), 0)
    state.momentum_codes.copy_(-ramp)
    state.gradient_codes.copy_(ramp.flip(1))
    state.scales.copy_(torch.linspace(1e-4, 2e-3, state.scales.numel()).view_as(state.scales))
    state.momentum_scales.copy_(torch.linspace(1e-6, 1e-4, 16).view(4, 4))
    state.gradient_scales.copy_(torch.linspace(1e-4, 1e-5, 16).view(4, 4))
    before = state.clone()

    run(backend, state, 16, state_group_size=20)

    assert_is_a_lion_step(before, state, group_size=16, state_group_size=20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 3, 32])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 259)], ids=str)
def test_nothing_outside_the_tensors_is_written(backend, shape, group_size, momentum_bits):
    state = make_state(
        shape, group_size=group_size, outlier_fraction=0.03, momentum_bits=momentum_bits
    )
    pairs = {name: guarded(tensor) for name, tensor in state.tensors().items()}
    inside = LionState(**{name: inner for name, (inner, _) in pairs.items()})

    for step, lr in [(1, 3e-4), (2, 0.1)]:  # both branches
        run(backend, inside, group_size, step=step, lr=lr)
        run(backend, state, group_size, step=step, lr=lr)

    assert_same_state(inside, state)
    for name, (_, buffer) in pairs.items():
        assert guards_are_intact(buffer), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_and_outlier_columns_are_only_read(backend):
    state = make_state((9, 40), group_size=8, outlier_fraction=0.05)
    before = state.clone()

    run(backend, state, 8)

    for name in ("gradient_codes", "gradient_scales", "outlier_columns"):
        assert_same_bits(getattr(state, name), getattr(before, name))


@pytest.mark.parametrize("chunk_elements", [1, 300, 2**10, 2**20])
def test_result_does_not_depend_on_the_chunk_size(monkeypatch, chunk_elements):
    expected = make_state((40, 150), group_size=40, outlier_fraction=0.02)
    actual = expected.clone()
    run(reference, expected, 40, lr=2e-3)

    monkeypatch.setattr(reference_weight, "CHUNK_ELEMENTS", chunk_elements)
    run(reference, actual, 40, lr=2e-3)

    assert_same_state(actual, expected)


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_result_does_not_depend_on_the_number_of_threads(n_threads):
    """Large enough to be cut, and in 8 ranges of 101 rows none is equal to another."""
    expected = make_state((101, 2600), group_size=100, outlier_fraction=0.01)
    actual = expected.clone()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run(cpu, expected, 100)
        torch.set_num_threads(n_threads)
        run(cpu, actual, 100)
    finally:
        torch.set_num_threads(before)

    assert_same_state(actual, expected)


# --- float64 --------------------------------------------------------------------------------------


def assert_is_a_lion_step(
    before: LionState,
    after: LionState,
    *,
    group_size: int | None,
    state_group_size: int = 256,
    quantum: float = 1.0,
    **changes: Any,
) -> None:
    """Compare one step with Lion (Chen et al. 2023, algorithm 2) in float64, element by element.

    Args:
        before: The state that went in.
        after: The state that came out.
        group_size: Columns per weight scale.
        state_group_size: Columns per momentum and gradient scale.
        quantum: How far rounding may move a weight, in units of its scale.
        changes: What differs from `ARGUMENTS`.
    """
    arguments = {**ARGUMENTS, **changes}
    lr, weight_decay = arguments["lr"], arguments["weight_decay"]
    beta1, beta2 = arguments["beta1"], arguments["beta2"]
    columns = before.codes.shape[1]
    weight = values64(before.codes, before.scales, group_size)
    outliers = before.outlier_mask()
    index = before.outlier_columns.long().numpy()
    np.put_along_axis(weight, index, before.outlier_values.double().numpy(), axis=1)
    momentum = values64(before.momentum_codes, before.momentum_scales, state_group_size)
    gradient = values64(before.gradient_codes, before.gradient_scales, state_group_size)
    if arguments["maximize"]:
        gradient = -gradient

    old, new = beta1 * momentum, (1 - beta1) * gradient
    decided = sign_is_decided(old, new)
    assert decided.mean() > 0.99  # else the comparison below says little
    exact = weight - lr * (np.sign(old + new) + weight_decay * weight)
    stored = values64(after.codes, after.scales, group_size)
    bound = quantum * stochastic_bound(spread(after.scales, columns, group_size))
    error = np.abs(stored - exact)
    assert (error <= bound)[decided & ~outliers].all()
    # Where the sign is a coin toss, the other side and the middle are right too.
    assert (error <= bound + 2 * lr)[~outliers].all()
    assert after.codes.abs().max() <= 127
    assert (after.codes.numpy()[outliers] == 0).all()

    kept = np.take_along_axis(exact, index, axis=1)
    error = np.abs(after.outlier_values.double().numpy() - kept)
    fits = error <= float_update_bound(before.outlier_values.numpy(), lr, weight_decay)
    assert fits[np.take_along_axis(decided, index, axis=1)].all()

    old, new = beta2 * momentum, (1 - beta2) * gradient
    error = np.abs(
        values64(after.momentum_codes, after.momentum_scales, state_group_size) - old - new
    )
    scale = spread(after.momentum_scales, columns, state_group_size)
    assert (error <= rounding_bound(np.abs(old) + np.abs(new), scale)).all()
    # A fresh absmax scale uses the whole range.
    assert after.momentum_codes.abs().amax(dim=1).eq(127).all() or not momentum.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"beta1": 0.7, "beta2": 0.8}], ids=str)
@pytest.mark.parametrize("lr", [1e-5, 3e-4, 2e-2])  # far below, near and far above a quantum
@pytest.mark.parametrize(
    ("shape", "group_size", "outlier_fraction"),
    [((7, 33), None, 0.0), ((13, 257), 100, 0.03), ((40, 600), 32, 0.01)],
    ids=str,
)
def test_equals_float64_lion_within_one_quantum(
    backend, shape, group_size, outlier_fraction, lr, changes
):
    state = make_state(shape, group_size=group_size, outlier_fraction=outlier_fraction)
    for step in (1, 2, 3):  # from the second step on, the momentum comes from the step before
        new_gradient(state, step)
        state.gradient_codes[0] = 1  # no all-zero row: its momentum has no range to fill
        before = state.clone()
        run(backend, state, group_size, lr=lr, step=step, **changes)
        assert_is_a_lion_step(before, state, group_size=group_size, lr=lr, **changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_moves_a_weight_by_half_a_quantum_at_most(backend):
    state = make_state((13, 257), group_size=100, outlier_fraction=0.03)
    for step, lr in [(1, 3e-4), (2, 2e-2)]:
        before = state.clone()
        run(backend, state, 100, lr=lr, step=step, stochastic=False)
        assert_is_a_lion_step(before, state, group_size=100, quantum=0.5, lr=lr, stochastic=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_beta_has_its_place(backend):
    """beta1 weighs the momentum in the direction, beta2 decays it; numbers worked out by hand."""
    state = make_state((3, 40), group_size=None)
    state.momentum_codes.zero_()
    state.momentum_scales.fill_(1.0)
    state.set_gradient(torch.full((3, 40), 2e-3), 256)
    run(backend, state, None, beta1=0.3, beta2=0.75)

    momentum = values64(state.momentum_codes, state.momentum_scales, 256)
    np.testing.assert_allclose(momentum, 0.25 * 2e-3, rtol=1e-6)  # all are code 127

    # 0.3 * 5e-4 - 0.7 * 4e-4 < 0: up. With beta2 in its place 0.75 * 5e-4 - 0.25 * 4e-4 > 0: down.
    state.set_gradient(torch.full((3, 40), -4e-4), 256)
    before = values64(state.codes, state.scales, None)
    run(backend, state, None, beta1=0.3, beta2=0.75, step=8, lr=0.01, weight_decay=0.0)

    moved = values64(state.codes, state.scales, None) - before
    assert (np.abs(moved - 0.01) <= stochastic_bound(spread(state.scales, 40, None))).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_runs_every_backend_by_name(backend, monkeypatch):
    """The public operator with its checks gives what the backend gives."""
    monkeypatch.setenv("QFT_BACKEND", backend.__name__.rpartition(".")[2])
    backend_for.cache_clear()
    try:
        actual = make_state((7, 50), group_size=16, outlier_fraction=0.02)
        expected = actual.clone()
        run(backend, expected, 16)
        run(kernels, actual, 16)
        assert backend_for(torch.device("cpu")) is backend
    finally:
        backend_for.cache_clear()
    assert_same_state(actual, expected)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "error", "match"),
    [
        (
            "codes",
            lambda t: t.int(),
            TypeError,
            r"weight codes must be torch\.int8, got torch\.int32",
        ),
        (
            "codes",
            lambda t: t.t(),
            ValueError,
            r"weight codes must be contiguous.*\.contiguous\(\)",
        ),
        (
            "codes",
            lambda t: t[0],
            ValueError,
            r"non-empty \[rows, columns\].*\.view\(-1, columns\)",
        ),
        ("scales", lambda t: t.double(), ValueError, "weight scales must be float32 of shape"),
        ("scales", lambda t: t[:, :-1], ValueError, r"shape \(6, 4\), one per row and group of 16"),
        ("scales", lambda t: t.t().contiguous().t(), ValueError, "must be contiguous and on cpu"),
        (
            "momentum_codes",
            lambda t: t[:, :-1].contiguous(),
            ValueError,
            "momentum codes must have",
        ),
        ("momentum_scales", lambda t: t[:-1], ValueError, "momentum scales must be float32"),
        ("gradient_codes", lambda t: t[:-1], ValueError, "gradient scales must be float32"),
        ("gradient_codes", lambda t: t.float(), TypeError, "gradient codes must be torch.int8"),
        (
            "gradient_scales",
            lambda t: t.to("meta"),
            ValueError,
            "gradient scales must be contiguous and on cpu like the codes, got .* on meta",
        ),
        (
            "momentum_codes",
            lambda t: t.t().contiguous().t(),
            ValueError,
            r"momentum codes must be contiguous.*\.contiguous\(\) first",
        ),
        (
            "outlier_values",
            lambda t: t.to("meta"),
            ValueError,
            "outlier columns must have shape .* on meta, got .* on cpu",
        ),
        (
            "outlier_values",
            lambda t: t.bfloat16(),
            TypeError,
            "outlier values must be torch.float32",
        ),
        ("outlier_values", lambda t: t[:, :-1], ValueError, "outlier columns must have shape"),
        ("outlier_columns", lambda t: t.long(), TypeError, r"torch\.int16 or torch\.int32"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(name, change, error, match):
    state = make_state((6, 50), group_size=16, outlier_fraction=0.03)
    setattr(state, name, change(getattr(state, name)))
    before = state.clone()

    with pytest.raises(error, match=match):
        run(kernels, state, 16)

    assert_same_state(state, before)


@pytest.mark.parametrize(
    ("name", "change", "match"),
    [
        (
            "momentum_codes",
            lambda t: t[:, :-1].contiguous(),
            r"shapes \(\(6, 26\), \(6, 1\)\), got",
        ),
        ("momentum_scales", lambda t: t[:-1], r"got \(6, 26\) and torch.float32 of \(5, 1\)"),
        ("momentum_scales", lambda t: t.double(), "got .* and torch.float64"),
        ("momentum_codes", lambda t: t.t().contiguous().t(), "momentum codes must be contiguous"),
    ],
)
def test_a_packed_momentum_that_does_not_fit_is_refused(name, change, match):
    state = make_state((6, 51), group_size=16, momentum_bits=4)
    setattr(state, name, change(getattr(state, name)))
    before = state.clone()

    with pytest.raises(ValueError, match=match):
        run(kernels, state, 16)

    assert_same_state(state, before)


@pytest.mark.parametrize(
    ("name", "bad", "match"),
    [
        ("scales", float("nan"), "weight scales must be finite and positive, got 1 of 24 .* nan"),
        ("scales", float("inf"), "weight scales must be finite and positive, got 1 of 24 .* inf"),
        ("scales", 0.0, "weight scales must be finite and positive, got 1 of 24 .* first 0.0"),
        ("scales", -1e-3, "weight scales must be finite and positive, got 1 of 24 .* -0.001"),
        ("momentum_scales", float("nan"), "momentum scales must be finite, got 1 of 6 .* nan"),
        ("momentum_scales", -float("inf"), "momentum scales must be finite, got 1 of 6 .* -inf"),
        ("gradient_scales", float("nan"), "gradient scales must be finite, got 1 of 6 .*reload"),
        ("gradient_scales", float("inf"), "gradient scales must be finite, got 1 of 6 .*reload"),
        ("outlier_columns", -1, r"outlier columns must be in \[0, 50\), got -1.*reload"),
        ("outlier_columns", 50, r"outlier columns must be in \[0, 50\), got 50.*reload"),
    ],
)
def test_values_that_would_do_harm_are_refused_before_anything_is_written(name, bad, match):
    state = make_state((6, 50), group_size=16, outlier_fraction=0.03)
    getattr(state, name)[4, -1] = bad
    before = state.clone()

    with pytest.raises(ValueError, match=match):
        run(kernels, state, 16)

    for field, tensor in state.tensors().items():
        assert_same_bits(tensor, getattr(before, field))


def test_a_gradient_may_have_scales_of_zero_or_below():
    """Clipping to nothing and a negative factor make them."""
    state = make_state((6, 50), group_size=16)
    state.gradient_scales[0], state.gradient_scales[1] = 0.0, -1e-3
    expected = state.clone()

    run(kernels, state, 16)

    run(reference, expected, 16)
    assert_same_state(state, expected)


def test_a_packed_momentum_needs_gradient_groups_that_hold_its_own():
    state = make_state((6, 150), group_size=16, momentum_bits=4, state_group_size=100)

    with pytest.raises(ValueError, match="multiples of its 64 columns, got state_group_size=100"):
        run(kernels, state, 16, state_group_size=100)


def test_outliers_for_another_number_of_rows_are_refused():
    """Compiled code does not check bounds: too few rows of outliers wrote beyond the tensor."""
    state = make_state((6, 50), group_size=16, outlier_fraction=0.03)
    state.outlier_values = state.outlier_values[:-1].contiguous()
    state.outlier_columns = state.outlier_columns[:-1].contiguous()

    with pytest.raises(ValueError, match="one row for each of the 6 rows"):
        run(kernels, state, 16)


def test_a_matrix_with_too_many_elements_is_refused():
    with pytest.raises(ValueError, match="Split the matrix into several row blocks"):
        check_matrix("x", torch.empty(2**16, 2**15, dtype=torch.int8, device="meta"), (torch.int8,))
    check_matrix("x", torch.empty(2**16 - 1, 2**15, dtype=torch.int8, device="meta"), (torch.int8,))
