"""One Lion step on INT8 state: backends against each other, and against Lion in float64."""

from typing import Any

import numpy as np
import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import backend as backend_choice
from qft_hf.kernels import weight as weight_module
from qft_hf.kernels.checks import check_matrix
from tests.kernels.backends import cpu, reference
from tests.kernels.states import (
    LionState,
    arguments,
    assert_same_state,
    guards_are_intact,
    lion_step_,
    make_state,
    spread,
    stored64,
)
from tests.tolerances import (
    assert_same_bits,
    float_update_bound,
    rounding_bound,
    sign_is_decided,
    stochastic_bound,
)

BACKENDS = [reference, cpu]

SHAPES = [(1, 1), (3, 5), (7, 33), (13, 257), (40, 600), (5, 1025)]
GROUP_SIZES = [None, 3, 32, 100, 5000]  # odd, a power of two, ragged, longer than any row
OUTLIER_FRACTIONS = [0.0, 0.03]


def new_gradient(state: LionState, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    gradient = torch.randn(state.weight.codes.shape, generator=generator) * 3e-3
    gradient[0] = 0.0  # a row whose elements only decay
    state.set_gradient(gradient)


# --- backends -------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"stochastic": False}], ids=str)
@pytest.mark.parametrize("outlier_fraction", OUTLIER_FRACTIONS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cpu_equals_reference_bit_for_bit(
    shape, group_size, outlier_fraction, changes, momentum_bits
):
    """Five steps of up to 300 quanta, during which scales stay, grow and shrink."""
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
        lion_step_(reference, expected, **{"step": step, "lr": lr, **changes})
        lion_step_(cpu, actual, **{"step": step, "lr": lr, **changes})
        # Zero tolerance: both round every operation correctly, and in the same order.
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
            new_gradient(state, step)
        lion_step_(reference, expected, step=step)
        lion_step_(cpu, actual, step=step)
        assert_same_state(actual, expected)


@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16])
def test_rows_of_zeros_give_the_same_bits(group_size, momentum_bits):
    """A row of zeros in the weight leaves the smallest scale; one in the momentum gets it."""
    expected = make_state((4, 40), group_size=group_size, momentum_bits=momentum_bits)
    codes, scales = reference.quantize(torch.zeros(1, 40), group_size=group_size)
    expected.weight.codes[1], expected.weight.scales[1] = codes[0], scales[0]
    expected.momentum.codes[1:] = 0
    expected.gradient.codes[2] = 0
    actual = expected.clone()

    for step in (1, 2, 3):
        for backend, state in ((cpu, actual), (reference, expected)):
            lion_step_(backend, state, lr=1e-5, step=step)
        assert_same_state(actual, expected)
    assert (actual.weight.scales[1] > 1e-8).all()
    assert (actual.momentum.scales[2] == np.float32(1e-30)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_designed_row_gives_the_same_bits(backend):
    """Ramps in codes, momentum and gradient show the read of a neighboring column or group."""
    state = make_state((4, 70), group_size=16, state_group_size=20, outlier_fraction=0.03)
    weight, momentum, gradient = state.arguments()
    ramp = (torch.arange(280) % 127).view(4, 70).to(torch.int8)
    weight.codes.copy_(ramp)
    weight.codes.scatter_(1, weight.outlier_columns.long(), 0)
    momentum.codes.copy_(-ramp)
    gradient.codes.copy_(ramp.flip(1))
    weight.scales.copy_(torch.linspace(1e-4, 2e-3, weight.scales.numel()).view_as(weight.scales))
    momentum.scales.copy_(torch.linspace(1e-6, 1e-4, 16).view(4, 4))
    gradient.scales.copy_(torch.linspace(1e-4, 1e-5, 16).view(4, 4))
    before = state.clone()

    lion_step_(backend, state)

    assert_is_a_lion_step(before, state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 3, 32])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (5, 259)], ids=str)
def test_nothing_outside_the_tensors_is_written(backend, shape, group_size, momentum_bits):
    state = make_state(
        shape, group_size=group_size, outlier_fraction=0.03, momentum_bits=momentum_bits
    )
    inside, buffers = state.guarded()

    for step, lr in [(1, 3e-4), (2, 0.1)]:  # both branches
        lion_step_(backend, inside, step=step, lr=lr)
        lion_step_(backend, state, step=step, lr=lr)

    assert_same_state(inside, state)
    for name, buffer in buffers.items():
        assert guards_are_intact(buffer), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_and_outlier_columns_are_only_read(backend):
    state = make_state((9, 40), group_size=8, outlier_fraction=0.05)
    before = state.clone()

    lion_step_(backend, state)

    for name in ("gradient.codes", "gradient.scales", "weight.outlier_columns"):
        assert_same_bits(state.tensors()[name], before.tensors()[name])


@pytest.mark.parametrize("chunk_elements", [1, 300, 2**10, 2**20])
def test_result_does_not_depend_on_the_chunk_size(monkeypatch, chunk_elements):
    expected = make_state((40, 150), group_size=40, outlier_fraction=0.02)
    actual = expected.clone()
    lion_step_(reference, expected, lr=2e-3)

    monkeypatch.setattr(weight_module, "CHUNK_ELEMENTS", chunk_elements)
    lion_step_(reference, actual, lr=2e-3)

    assert_same_state(actual, expected)


@pytest.mark.parametrize("n_threads", [2, 3, 8])
def test_result_does_not_depend_on_the_number_of_threads(n_threads):
    """Large enough to be split; 101 rows do not divide evenly into 8 ranges."""
    expected = make_state((101, 2600), group_size=100, outlier_fraction=0.01)
    actual = expected.clone()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        lion_step_(cpu, expected)
        torch.set_num_threads(n_threads)
        lion_step_(cpu, actual)
    finally:
        torch.set_num_threads(before)

    assert_same_state(actual, expected)


# --- float64 --------------------------------------------------------------------------------------


def assert_is_a_lion_step(
    before: LionState,
    after: LionState,
    *,
    quantum: float = 1.0,
    **changes: Any,
) -> None:
    """Compare one step with Lion (Chen et al. 2023, algorithm 2) in float64, element by element.

    Args:
        before: The state that went in.
        after: The state that came out.
        quantum: How far rounding may move a weight, in units of its scale.
        changes: Fields that differ from `RULE` and `ROUNDING`.
    """
    lr, beta1, beta2, weight_decay, maximize = arguments(**changes)["rule"]
    columns, group_size = before.weight.codes.shape[1], before.weight.group_size
    weight = stored64(before.weight)
    outliers = before.outlier_mask()
    index = before.weight.outlier_columns.long().numpy()
    kept = before.weight.outlier_values.double().numpy()
    np.put_along_axis(weight, index, kept, axis=1)
    momentum, gradient = stored64(before.momentum), stored64(before.gradient)
    if maximize:
        gradient = -gradient

    old, new = beta1 * momentum, (1 - beta1) * gradient
    decided = sign_is_decided(old, new)
    assert decided.mean() > 0.99  # otherwise the comparison below says little
    exact = weight - lr * (np.sign(old + new) + weight_decay * weight)
    bound = quantum * stochastic_bound(spread(after.weight.scales, columns, group_size))
    error = np.abs(stored64(after.weight) - exact)
    assert (error <= bound)[decided & ~outliers].all()
    # If rounding decides the sign, the opposite sign and 0 are correct too.
    assert (error <= bound + 2 * lr)[~outliers].all()
    assert after.weight.codes.abs().max() <= 127
    assert (after.weight.codes.numpy()[outliers] == 0).all()

    stepped = np.take_along_axis(exact, index, axis=1)
    error = np.abs(after.weight.outlier_values.double().numpy() - stepped)
    fits = error <= float_update_bound(kept, lr, weight_decay)
    assert fits[np.take_along_axis(decided, index, axis=1)].all()

    old, new = beta2 * momentum, (1 - beta2) * gradient
    error = np.abs(stored64(after.momentum) - old - new)
    scale = spread(after.momentum.scales, columns, after.momentum.group_size)
    assert (error <= rounding_bound(np.abs(old) + np.abs(new), scale)).all()
    # A fresh absmax scale uses the whole range.
    assert after.momentum.codes.abs().amax(dim=1).eq(127).all() or not momentum.any()


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
        state.gradient.codes[0] = 1  # no all-zero row: its momentum has no range to fill
        before = state.clone()
        lion_step_(backend, state, lr=lr, step=step, **changes)
        assert_is_a_lion_step(before, state, lr=lr, **changes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_moves_a_weight_by_half_a_quantum_at_most(backend):
    state = make_state((13, 257), group_size=100, outlier_fraction=0.03)
    for step, lr in [(1, 3e-4), (2, 2e-2)]:
        before = state.clone()
        lion_step_(backend, state, lr=lr, step=step, stochastic=False)
        assert_is_a_lion_step(before, state, quantum=0.5, lr=lr, stochastic=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_beta_has_its_place(backend):
    """beta1 weighs the momentum in the direction, beta2 decays it; numbers worked out by hand."""
    state = make_state((3, 40), group_size=None)
    state.momentum.codes.zero_()
    state.momentum.scales.fill_(1.0)
    state.set_gradient(torch.full((3, 40), 2e-3))
    lion_step_(backend, state, beta1=0.3, beta2=0.75)

    np.testing.assert_allclose(stored64(state.momentum), 0.25 * 2e-3, rtol=1e-6)  # code 127

    # 0.3 * 5e-4 - 0.7 * 4e-4 < 0: up. With beta2 in its place 0.75 * 5e-4 - 0.25 * 4e-4 > 0: down.
    state.set_gradient(torch.full((3, 40), -4e-4))
    before = stored64(state.weight)
    lion_step_(backend, state, beta1=0.3, beta2=0.75, step=8, lr=0.01, weight_decay=0.0)

    moved = stored64(state.weight) - before
    assert (np.abs(moved - 0.01) <= stochastic_bound(spread(state.weight.scales, 40, None))).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_environment_chooses_what_the_operator_runs(backend, monkeypatch):
    actual = make_state((7, 50), group_size=16, outlier_fraction=0.02)
    expected = actual.clone()
    lion_step_(backend, expected)
    monkeypatch.setenv("QFT_BACKEND", backend.name)
    backend_choice.forget()
    try:
        lion_step_(kernels, actual)
        assert backend_choice.backend_for(torch.device("cpu")) == backend.name
    finally:
        monkeypatch.undo()
        backend_choice.forget()
    assert_same_state(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum_bits", [8, 4])
def test_a_step_in_parts_by_rows_has_the_bits_of_the_whole(backend, momentum_bits):
    whole = make_state((6, 150), group_size=40, momentum_bits=momentum_bits, outlier_fraction=0.02)
    parts = whole.clone()
    lion_step_(backend, whole, lr=2e-3, first_row=5)

    for rows in (slice(0, 1), slice(1, 5), slice(5, 6)):
        part = LionState(*(value.rows(rows) for value in parts.arguments()))
        lion_step_(backend, part, lr=2e-3, first_row=5 + rows.start)

    assert_same_state(parts, whole)


# --- refusals: values check themselves when they are made, see test_values.py -------------------


ON_META = r"codes must have shape \(6, 50\) on cpu, got shape \(6, 50\) on meta"


@pytest.mark.parametrize(
    ("name", "shape", "changes", "match"),
    [
        ("momentum", (6, 49), {}, "momentum codes must have"),
        ("momentum", (5, 50), {}, "momentum codes must have"),
        ("gradient", (6, 49), {}, "gradient codes must have"),
        ("gradient", (5, 50), {}, "gradient codes must have"),
        ("momentum", (6, 50), {"device": "meta"}, f"momentum {ON_META}"),
        ("gradient", (6, 50), {"device": "meta"}, f"gradient {ON_META}"),
        (
            "momentum",
            (6, 50),
            {"state_group_size": 20},
            "8-bit momentum must have the gradient's groups, got 20 columns for groups of 256",
        ),
        (
            "gradient",
            (6, 50),
            {"state_group_size": None},
            "8-bit momentum must have the gradient's groups, got 256 columns for groups of None",
        ),
        (
            "momentum",
            (6, 52),
            {"momentum_bits": 4},
            r"momentum of a \(6, 50\) weight must have codes of shape \(6, 25\).*got \(6, 26\)",
        ),
        (
            "momentum",
            (5, 50),
            {"momentum_bits": 4},
            r"codes of shape \(6, 25\) on cpu, got \(5, 25\) on cpu",
        ),
        (
            "momentum",
            (6, 50),
            {"momentum_bits": 4, "device": "meta"},
            r"codes of shape \(6, 25\) on cpu, got \(6, 25\) on meta",
        ),
    ],
)
@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_what_does_not_fit_is_refused_before_anything_is_written(
    backend, name, shape, changes, match
):
    state = make_state((6, 50), group_size=16, outlier_fraction=0.03)
    before = state.clone()
    device = torch.device(changes.get("device", "cpu"))
    options = {option: value for option, value in changes.items() if option != "device"}
    other = make_state(shape, group_size=16, **options).to(device)
    values = {"weight": state.weight, "momentum": state.momentum, "gradient": state.gradient}
    values[name] = getattr(other, name)

    with pytest.raises(ValueError, match=match):
        backend.lion_step_(*values.values(), **arguments())

    assert_same_state(state, before)


@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_a_gradient_of_4_bits_is_refused(backend):
    state = make_state((6, 50), group_size=16, momentum_bits=4)
    before = state.clone()

    with pytest.raises(TypeError, match="gradient must have codes of 8 bits, got 4"):
        backend.lion_step_(state.weight, state.momentum, state.momentum, **arguments())

    assert_same_state(state, before)


@pytest.mark.parametrize(
    ("name", "bad", "match"),
    [
        (
            "weight.scales",
            float("nan"),
            "weight scales must be finite and positive, got 1 of 24 .* nan",
        ),
        (
            "weight.scales",
            float("inf"),
            "weight scales must be finite and positive, got 1 of 24 .* inf",
        ),
        (
            "weight.scales",
            0.0,
            "weight scales must be finite and positive, got 1 of 24 .* first is 0.0",
        ),
        (
            "weight.scales",
            -1e-3,
            "weight scales must be finite and positive, got 1 of 24 .* -0.001",
        ),
        ("momentum.scales", float("nan"), "momentum scales must be finite, got 1 of 6 .* nan"),
        ("momentum.scales", -float("inf"), "momentum scales must be finite, got 1 of 6 .* -inf"),
        ("gradient.scales", float("nan"), "gradient scales must be finite, got 1 of 6 .*reload"),
        ("gradient.scales", float("inf"), "gradient scales must be finite, got 1 of 6 .*reload"),
        ("weight.outlier_columns", -1, r"outlier columns must be in \[0, 50\), got -1.*reload"),
        ("weight.outlier_columns", 50, r"outlier columns must be in \[0, 50\), got 50.*reload"),
    ],
)
@pytest.mark.parametrize("backend", [kernels, *BACKENDS])
def test_values_that_would_do_harm_are_refused_before_anything_is_written(
    backend, name, bad, match
):
    state = make_state((6, 50), group_size=16, outlier_fraction=0.03)
    state.tensors()[name][4, -1] = bad
    before = state.clone()

    with pytest.raises(ValueError, match=match):
        lion_step_(backend, state)

    assert_same_state(state, before)


def test_a_gradient_may_have_scales_of_zero_or_below():
    """Clipping to zero and a negative factor produce them."""
    state = make_state((6, 50), group_size=16)
    state.gradient.scales[0], state.gradient.scales[1] = 0.0, -1e-3
    expected = state.clone()

    lion_step_(kernels, state)

    lion_step_(reference, expected)
    assert_same_state(state, expected)


@pytest.mark.parametrize("state_group_size", [100, None])
def test_a_packed_momentum_needs_gradient_groups_that_hold_its_own(state_group_size):
    state = make_state((6, 150), group_size=16, momentum_bits=4, state_group_size=state_group_size)

    with pytest.raises(ValueError, match=f"multiples of its 64 columns, got {state_group_size}"):
        lion_step_(kernels, state)


@pytest.mark.parametrize(
    ("most", "more"), [((2**31 - 1, 1), (2**31, 1)), ((2**20, 2**14), (2**20, 2**14 + 1))]
)
def test_a_matrix_with_too_many_elements_is_refused(most, more):
    """More rows than programs of a launch, or more random numbers than the counter has."""
    check_matrix("x", torch.empty(most, dtype=torch.int8, device="meta"), (torch.int8,))
    with pytest.raises(ValueError, match="Split the matrix into several row blocks"):
        check_matrix("x", torch.empty(more, dtype=torch.int8, device="meta"), (torch.int8,))
