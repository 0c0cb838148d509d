"""Triton kernels against the reference, bit for bit: on a GPU, or in Triton's interpreter on CPU.

The interpreter is chosen when kernels are imported, so it needs a run of its own:
`TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py`.
"""

import importlib
from importlib.metadata import version
from typing import Any

import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import Input, Quantized, Weight
from qft_hf.kernels import backend as backend_choice
from qft_hf.kernels.operators import Operator
from tests.kernels.backends import reference
from tests.kernels.backends import triton as backend
from tests.kernels.devices import DEVICE, INTERPRETED, MARKS, capability
from tests.kernels.live_steps import NUMBERS, OTHERS, STEPS, in_memory
from tests.kernels.states import (
    GUARD,
    ROUNDING,
    LionState,
    arguments,
    assert_same_state,
    coded,
    float_arguments,
    guarded,
    guards_are_intact,
    lion_step_,
    make_product,
    make_state,
    ramp,
    random,
    step_arguments,
    step_float_arguments,
    ties,
)
from tests.kernels.test_int8_linear import make_case as make_output_case
from tests.kernels.test_int8_linear import terms as output_terms
from tests.tolerances import (
    assert_same_bits,
    assert_same_norms,
    dequantized_matmul_bound,
    int8_linear_bound,
)

pytestmark = MARKS

triton = importlib.import_module("triton")
tl = importlib.import_module("triton.language")
layer_input, nibbles = (
    importlib.import_module(f"qft_hf.kernels.triton.{name}") for name in ("layer_input", "nibbles")
)
tile_columns, tiling = (
    getattr(importlib.import_module("qft_hf.kernels.triton.tiling"), name)
    for name in ("tile_columns", "tiling")
)

OPERATORS = [value for value in vars(kernels).values() if isinstance(value, Operator)]

# One column; odd; one over a momentum group; several tiles of groups. The groups are whole rows,
# divide a row, leave a shorter last group, or are longer than a row.
GROUP_SIZES = {
    (1, 1): [None, 3],
    (3, 33): [None, 3, 32, 5000],
    (2, 257): [32, 100, 512],
    (3, 1100): [None, 3, 32, 100, 512],
}
SHAPES = list(GROUP_SIZES)
# Rows and groups that are longer than a tile of 8192 take two passes; a long row of many groups.
LONG = [((2, 8500), None), ((2, 8500), 5000), ((1, 8500), 100)]
CASES = [(shape, size) for shape, sizes in GROUP_SIZES.items() for size in sizes] + LONG
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INPUTS = [random, ramp, ties]


@pytest.fixture(autouse=True)
def _nobody_looks_at_values(monkeypatch):
    """Disable checks of values, as on a GPU, where each would wait for the device."""
    for operator in OPERATORS:
        monkeypatch.setattr(operator, "_check_values", None)


def stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round FP32 as a kernel stores it: to nearest, but the interpreter truncates to BF16."""
    if INTERPRETED and dtype == torch.bfloat16:
        value = (value.contiguous().view(torch.int32) & ~0xFFFF).view(torch.float32)
    return value.to(dtype)


def guarded_matrix(matrix: Quantized) -> tuple[Quantized, list[torch.Tensor]]:
    """Return a copy between guards, and the buffers around it."""
    pairs = [guarded(tensor) for tensor in matrix.tensors]
    return Quantized(*(inner for inner, _ in pairs), matrix.group_size), [b for _, b in pairs]


def assert_same_matrix(actual: Quantized, expected: Quantized) -> None:
    for tensor, wanted in zip(actual.tensors, expected.tensors, strict=True):
        assert_same_bits(tensor, wanted)


# --- quantize -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize(("shape", "group_size"), CASES, ids=str)
def test_quantize(shape, group_size, make_input):
    dtype = DTYPES[(shape[1] + (group_size or 0)) % 3]
    x = make_input(shape, group_size).to(DEVICE, dtype)

    codes, scales = backend.quantize(x, group_size=group_size)

    expected_codes, expected_scales = reference.quantize(x, group_size=group_size)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales, expected_scales)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("columns", "group_size"), [(10, 4), (10, None), (8500, None)])
def test_quantize_keeps_what_is_not_finite_visible(columns, group_size, bad):
    x = torch.linspace(-1, 1, 3 * columns, device=DEVICE).view(3, columns)
    x[1, columns - 2] = bad

    codes, scales = backend.quantize(x, group_size=group_size)

    expected_codes, expected_scales = reference.quantize(x, group_size=group_size)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales, expected_scales)
    assert not scales.isfinite().all()


@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-30, 1.2e-28, 1.3e-28, 1e30, 3e38])
def test_quantize_tiny_and_huge_values(magnitude):
    x = torch.tensor([[magnitude, -magnitude / 2, 0.0], [1.0, 2.0, 3.0]], device=DEVICE)

    codes, scales = backend.quantize(x, group_size=None)

    expected_codes, expected_scales = reference.quantize(x, group_size=None)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales, expected_scales)


@pytest.mark.parametrize("outlier_fraction", [0.0, 0.03])
@pytest.mark.parametrize(("shape", "group_size"), CASES, ids=str)
def test_dequantize(shape, group_size, outlier_fraction):
    dtype = DTYPES[(shape[1] + (group_size or 0)) % 3]
    index_dtype = torch.int32 if shape[1] % 2 else torch.int16
    state = make_state(
        shape, group_size=group_size, outlier_fraction=outlier_fraction, index_dtype=index_dtype
    )
    weight = state.to(DEVICE).weight

    x = backend.dequantize(weight, dtype=dtype)

    assert_same_bits(x, stored(reference.dequantize(weight), dtype))


@pytest.mark.parametrize("n_each", [1, 3])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("outlier_fraction", [0.0, 0.03])
@pytest.mark.parametrize(("columns", "group_size"), [(33, None), (33, 4), (1100, 256)], ids=str)
def test_dequantize_rows(columns, group_size, outlier_fraction, id_dtype, n_each):
    """Rows, or runs of them, in any order; invalid row numbers read nothing and give NaN."""
    shape = (7 * n_each, columns)
    state = make_state(shape, group_size=group_size, outlier_fraction=outlier_fraction)
    weight = state.to(DEVICE).weight
    rows = torch.tensor([6, 0, -1, 3, 6, 7, 2**31 - 1], device=DEVICE, dtype=id_dtype)

    x = backend.dequantize(weight, rows=rows, n_each=n_each)

    assert_same_bits(x, reference.dequantize(weight, rows=rows, n_each=n_each))
    exists = [True, True, False, True, True, False, False]
    assert (~x.isnan()).all(dim=1).view(7, n_each).all(dim=1).tolist() == exists
    again = backend.dequantize(weight, rows=rows[[1, 3]], n_each=n_each)  # by the same plan
    assert_same_bits(again, x.view(7, n_each, columns)[[1, 3]].flatten(0, 1))
    assert len(backend.dequantize(weight, rows=rows[:0])) == 0


def test_dequantize_as_many_rows_in_longer_runs():
    """A plan was found again by the number of rows, although their runs have another length.

    No test asked one weight for runs of two lengths.
    """
    weight = make_state((12, 33), group_size=4, outlier_fraction=0.03).to(DEVICE).weight
    for numbers, n_each in (([5, 2], 2), ([1], 4)):
        rows = torch.tensor(numbers, device=DEVICE)

        x = backend.dequantize(weight, rows=rows, n_each=n_each)

        assert_same_bits(x, reference.dequantize(weight, rows=rows, n_each=n_each))


# --- products with an expanded weight -------------------------------------------------------------

# One token, tokens in one program and several; rows in one program and several, the last not full.
N_TOKENS = [1, 3, 18]
PRODUCTS = [
    ((7, 33), None, 0.0),
    ((7, 33), 8, 0.03),
    ((18, 257), None, 0.03),
    ((3, 1100), 3, 0.0),
    ((5, 1100), 100, 0.03),
    ((17, 1100), None, 0.03),  # several steps of all warps, the last not full
    ((2, 2300), 1150, 0.03),  # several tiles of columns and of outliers
    ((1, 1), None, 0.0),
]


def product_cases() -> list[Any]:
    """Products in every dtype; the interpreter cannot multiply BF16 as matrix units do."""
    return [
        pytest.param(n_tokens, *case, dtype, id=f"{n_tokens}-{case}-{dtype}")
        for place, n_tokens in enumerate(N_TOKENS)
        for number, case in enumerate(PRODUCTS)
        for turn, dtype in enumerate(DTYPES[::2] if INTERPRETED and n_tokens > 1 else DTYPES)
        if not INTERPRETED or n_tokens == 1 or (place + number + turn) % 2  # each pair of two
    ]


@pytest.mark.parametrize(
    ("n_tokens", "shape", "group_size", "outlier_fraction", "dtype"), product_cases()
)
def test_dequantized_matmul(n_tokens, shape, group_size, outlier_fraction, dtype):
    """Sums agree within a bound, and in every bit if they are exact in any order."""
    index_dtype = torch.int32 if shape[1] % 2 else torch.int16
    for exact in (False, True):
        product = make_product(
            n_tokens, shape, group_size, dtype=dtype, outlier_fraction=outlier_fraction,
            index_dtype=index_dtype, exact=exact,
        ).to(DEVICE)  # fmt: skip
        weight = stored(product.expanded(reference, torch.float32), dtype)
        bias = stored(product.bias, dtype)
        sums = product.x.double() @ weight.double().t() + bias.double()

        y = product.run(backend)

        assert (y.dtype, y.shape) == (dtype, (n_tokens, shape[0]))
        if exact:
            assert_same_bits(y, sums.to(dtype))
        else:
            bound = dequantized_matmul_bound(product.x, weight, bias, cut=INTERPRETED)
            assert ((y.double() - sums).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 5])
def test_dequantized_matmul_stays_inside(n_tokens, dtype, monkeypatch):
    """Memory around the inputs is not read, and memory around the result is not written."""
    product = make_product(n_tokens, (7, 45), 8, dtype=dtype, outlier_fraction=0.05).to(DEVICE)
    product.bias = None
    expected = product.run(backend)
    buffers = []
    inside = []
    for tensor in (product.x, *product.weight.tensors):
        inner, buffer = guarded(tensor)
        # Around column numbers a 0 is harmless; elsewhere a code of 127 or a NaN would show.
        fill = {torch.int8: 127, torch.int16: 0}.get(buffer.dtype, float("nan"))
        buffer[:GUARD] = buffer[-GUARD:] = fill
        buffers.append((buffer, buffer.clone()))
        inside.append(inner)
    product.x, product.weight = inside[0], Weight(*inside[1:], 8)
    result, result_buffer = guarded(torch.zeros(n_tokens, 7, dtype=dtype, device=DEVICE))
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda x, *shape, **options: (
            result if shape == (n_tokens, 7) else new_empty(x, *shape, **options)
        ),
    )

    y = product.run(backend)

    assert y is result
    assert_same_bits(y, expected)
    assert guards_are_intact(result_buffer)
    for buffer, before in buffers:
        assert_same_bits(buffer, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_dequantized_matmul_rounds_the_weight_and_the_bias_first(dtype):
    """Each token selects one column, and a bias of minus that column leaves exactly 0."""
    product = make_product(1, (9, 45), 8, dtype=dtype, outlier_fraction=0.05)
    product.weight.scales /= 300
    weight = product.expanded(reference, dtype)

    for column in range(0, 45, 4):
        product.x = torch.zeros(2, 45, dtype=dtype)
        product.x[:, column] = 1024
        product.bias = -1024 * weight[:, column]
        for n_tokens in (1, 2):
            product.x = product.x[:n_tokens] if n_tokens == 1 else product.x.repeat(2, 1)
            assert (product.to(DEVICE).run(backend) == 0).all()


# --- embedding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_idx", [None, 4])
@pytest.mark.parametrize("n", [1, 6, 41])
@pytest.mark.parametrize(
    ("columns", "group_size"),
    [(1, 256), (33, 256), (257, 100), (1100, 256), (3000, 2999)],
    ids=str,
)
def test_embedding_gradient(columns, group_size, n, padding_idx):
    """Rows looked up once and often, invalid ids, long rows; guards around the table."""
    dtype = DTYPES[(columns + n) % 3]
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(0, 5, (n,), generator=generator) * 2
    if n > 4:
        ids[2:5] = torch.tensor([-100, 9, 8])
    ids = ids.to(DEVICE, torch.int32 if n % 2 else torch.int64)
    sizes = torch.logspace(-2, 2, n)[:, None]
    gradient = (torch.randn(n, columns, generator=generator) * sizes).to(DEVICE, dtype)
    expected = coded(random((9, columns), None).to(DEVICE), group_size)
    actual, buffers = guarded_matrix(expected)

    backend.embedding_gradient_(actual, ids, gradient, padding_idx=padding_idx)

    reference.embedding_gradient_(expected, ids, gradient, padding_idx=padding_idx)
    assert_same_matrix(actual, expected)
    assert all(guards_are_intact(buffer) for buffer in buffers)


def test_embedding_gradient_stops_at_the_last_token(monkeypatch):
    """Memory after the sorted tokens looks like another token of the last row."""
    sort = torch.Tensor.sort

    def sort_in_a_larger_buffer(tensor: torch.Tensor, **options: Any) -> list[torch.Tensor]:
        parts = sort(tensor, **options)
        return [torch.cat([part, part[-1:]])[:-1] for part in parts]

    monkeypatch.setattr(torch.Tensor, "sort", sort_in_a_larger_buffer)
    for n in (1, 4, 5):
        test_embedding_gradient(33, 256, n, None)


def test_embedding_gradient_of_no_tokens_and_of_ones_that_are_not_finite():
    expected, actual, before = (coded(random((9, 300), None).to(DEVICE), 256) for _ in range(3))
    ids = torch.tensor([3, 3, 5], device=DEVICE)
    gradient = torch.ones(3, 300, device=DEVICE)
    gradient[1, 280], gradient[2, 0] = float("nan"), float("inf")

    backend.embedding_gradient_(actual, ids[:0], gradient[:0])
    assert_same_matrix(actual, before)

    backend.embedding_gradient_(actual, ids, gradient)
    reference.embedding_gradient_(expected, ids, gradient)
    assert_same_matrix(actual, expected)


# --- gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1e-6, -0.01])
@pytest.mark.parametrize("group_size", [256, 30, 20000])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8500)], ids=str)
def test_accumulate(shape, group_size, factor):
    first = coded(random(shape, group_size).to(DEVICE), group_size)
    second = coded((ramp(shape, group_size) * factor).to(DEVICE), group_size)
    actual, buffers = guarded_matrix(first)

    backend.accumulate_(actual, second)

    reference.accumulate_(first, second)
    assert_same_matrix(actual, first)
    assert all(guards_are_intact(buffer) for buffer in buffers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", [0, 1])
def test_accumulate_keeps_what_is_not_finite_visible(bad, side):
    actual, expected = (
        [coded(random((3, 300), 256).to(DEVICE) * factor, 256) for factor in (1.0, -0.3)]
        for _ in range(2)
    )
    actual[side].scales[1, 1] = expected[side].scales[1, 1] = bad

    backend.accumulate_(*actual)

    reference.accumulate_(*expected)
    for matrix, wanted in zip(actual, expected, strict=True):
        assert_same_matrix(matrix, wanted)
    assert not actual[0].scales.isfinite().all()


@pytest.mark.parametrize("group_size", [256, 30])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_norms(shape, group_size):
    gradient = coded(ramp(shape, group_size).to(DEVICE) * 1e-4, group_size)

    norms = backend.squared_norms(gradient)

    assert_same_norms(norms, reference.squared_norms(gradient), gradient.scales.shape[1])


# --- lion -----------------------------------------------------------------------------------------


# Half of all combinations: every pair of a case, an outlier fraction and a momentum width occurs.
LION_CASES = [
    (*case, (0.0, 0.03)[(number + place) % 2], bits)
    for number, case in enumerate(CASES)
    for place, bits in enumerate((8, 4))
    if case not in LONG or number % 2 == place  # these take long: one momentum width each
]


@pytest.mark.parametrize(
    ("shape", "group_size", "outlier_fraction", "momentum_bits"), LION_CASES, ids=str
)
def test_lion_step(shape, group_size, outlier_fraction, momentum_bits):
    """Steps of 2 to 300 quanta: scales stay, grow and shrink; guards surround all tensors."""
    expected = make_state(
        shape,
        group_size=group_size,
        outlier_fraction=outlier_fraction,
        momentum_bits=momentum_bits,
    ).to(DEVICE)
    actual, buffers = expected.guarded()

    for step, (lr, changes) in enumerate(
        [(3e-4, {}), (0.05, {"maximize": True}), (3e-4, {"stochastic": False}), (0.0, {})], start=1
    ):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 3e-3
        gradient[1:2] = 0.0  # a row whose elements only decay, if there is more than one
        new = reference.quantize(gradient.to(DEVICE), group_size=256)
        for state in (actual, expected):
            for tensor, value in zip(state.gradient.tensors, new, strict=True):
                tensor.copy_(value)
        lion_step_(backend, actual, step=step, lr=lr, **changes)
        lion_step_(reference, expected, step=step, lr=lr, **changes)
        assert_same_state(actual, expected)
    for name, buffer in buffers.items():
        assert guards_are_intact(buffer), name


@triton.jit
def _count_bytes(counts_ptr, TILING: tl.constexpr):
    for group_tile in range(TILING.GROUP_TILES):
        for unit_tile in range(TILING.UNIT_TILES):
            start, exists, _, _ = tile_columns(
                group_tile * TILING.GROUPS, unit_tile * TILING.UNITS, TILING
            )
            place, mask = nibbles._bytes(start, exists, TILING.COLUMNS, TILING.UNIT)
            tl.atomic_add(counts_ptr + place, 1, mask=mask)


@pytest.mark.parametrize(("columns", "group_size"), [(1100, 192), (193, 192), (65, None), (7, 64)])
def test_each_byte_of_a_packed_row_is_written_once(columns, group_size):
    """Groups of three units fill tiles of four; the fourth unit belongs to the next group.

    Comparing results cannot show a double write if the right value happens to be written last.
    """
    counts, buffer = guarded(torch.zeros((columns + 1) // 2, dtype=torch.int32, device=DEVICE))

    _count_bytes[(1,)](counts, TILING=tiling(columns, group_size, 64))

    assert (counts == 1).all()
    assert guards_are_intact(buffer)


@pytest.mark.parametrize("outlier_fraction", [0.0, 0.03])
@pytest.mark.parametrize(("shape", "group_size"), CASES[::3] + LONG[:2], ids=str)
def test_step_weight(shape, group_size, outlier_fraction):
    """Steps of 0.1 to 100 quanta in guard regions, by Lion's kernel without momentum."""
    expected = make_state(shape, group_size=group_size, outlier_fraction=outlier_fraction)
    expected = expected.to(DEVICE)
    actual, buffers = expected.guarded()
    given = reference.dequantize(Weight.dense(expected.gradient))

    for step, (lr, sign, changes) in enumerate(
        [(0.1, 1, {}), (40.0, -1, {}), (0.1, 1, {"stochastic": False})], start=1
    ):
        direction, buffer = guarded(sign * given)
        before = buffer.clone()
        for package, state in ((backend, actual), (reference, expected)):
            options = step_arguments(step=step, lr=lr, **changes)
            package.step_weight_(state.weight, direction, **options)
        assert_same_state(actual, expected)
        assert_same_bits(buffer, before)
    for name, buffer in buffers.items():
        assert guards_are_intact(buffer), name


@pytest.mark.parametrize("state_group_size", [1, 7, 64, 2000])
@pytest.mark.parametrize(
    ("group_size", "index_dtype"), [(48, torch.int16), (None, torch.int32)], ids=str
)
def test_lion_step_with_other_momentum_groups(group_size, state_group_size, index_dtype):
    expected = make_state(
        (3, 2100),
        group_size=group_size,
        state_group_size=state_group_size,
        outlier_fraction=0.01,
        index_dtype=index_dtype,
    ).to(DEVICE)
    actual = expected.clone()

    for step in (1, 2):
        for package, state in ((backend, actual), (reference, expected)):
            lion_step_(package, state, step=step)
        assert_same_state(actual, expected)


@pytest.mark.parametrize(
    "counter", [{"step": 2**32 + 5}, {"stream": 2**31}, {"seed": 3}, {"first_row": 0}], ids=str
)
def test_lion_step_takes_any_counter(counter):
    """Integers of 32 and of 64 bits, which a launch passes as different types."""
    expected = make_state((3, 40), group_size=None).to(DEVICE)
    actual = expected.clone()

    lion_step_(backend, actual, **counter)

    lion_step_(reference, expected, **counter)
    assert_same_state(actual, expected)


@pytest.mark.parametrize("momentum_bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 16])
def test_lion_step_of_a_row_of_zeros(group_size, momentum_bits):
    """Weights grow from the smallest scale to that of a step of 1e-5, momentum from zero."""
    expected = make_state((4, 40), group_size=group_size, momentum_bits=momentum_bits).to(DEVICE)
    codes, scales = backend.quantize(torch.zeros(1, 40, device=DEVICE), group_size=group_size)
    expected.weight.codes[1], expected.weight.scales[1] = codes[0], scales[0]
    expected.momentum.codes[1:] = 0
    expected.gradient.codes[2] = 0
    actual = expected.clone()

    for step in (1, 2, 3):
        for package, state in ((backend, actual), (reference, expected)):
            lion_step_(package, state, lr=1e-5, step=step)
        assert_same_state(actual, expected)
    assert (actual.weight.scales[1] > 1e-8).all()


def test_lion_step_that_decays_to_nothing():
    expected = make_state((4, 40), group_size=None).to(DEVICE)
    expected.momentum.codes.zero_()
    expected.gradient.codes.zero_()
    actual = expected.clone()

    for step in (1, 2):
        for package, state in ((backend, actual), (reference, expected)):
            lion_step_(package, state, lr=1.0, weight_decay=1.0, step=step)
    assert_same_state(actual, expected)


def test_the_public_operators_run_these_kernels(monkeypatch):
    actual = make_state((7, 50), group_size=16, outlier_fraction=0.02).to(DEVICE)
    expected = actual.clone()
    ran = []
    kernel = kernels.lion_step_._implementations["triton"]

    def spy(*values: Any, **options: Any) -> None:
        ran.append(DEVICE)
        kernel(*values, **options)

    monkeypatch.setitem(kernels.lion_step_._implementations, "triton", spy)
    if DEVICE.type == "cpu":  # else the device chooses
        monkeypatch.setenv("QFT_BACKEND", "triton")
    else:
        monkeypatch.delenv("QFT_BACKEND", raising=False)
    backend_choice.forget()
    try:
        lion_step_(kernels, actual)
        assert backend_choice.backend_for(DEVICE) == "triton"
    finally:
        monkeypatch.undo()
        backend_choice.forget()
    assert ran == [DEVICE]
    lion_step_(reference, expected)
    assert_same_state(actual, expected)


def quantize_and_step_(
    backend: Any, state: LionState, gradient: torch.Tensor, *, group_size: int,
    factor: torch.Tensor | None = None, **changes: Any,
) -> torch.Tensor:  # fmt: skip
    return backend.quantize_and_lion_step_(
        state.weight, state.momentum, gradient, factor=factor, group_size=group_size,
        **arguments(**changes),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "group_size", "state_group_size", "momentum_bits"),
    [
        ((1, 1), None, 256, 8),
        ((7, 33), 3, 256, 8),
        ((7, 33), 3, 64, 4),
        ((2, 257), 100, 256, 8),
        ((2, 257), 100, 256, 4),
        ((3, 1100), None, 64, 8),
        ((3, 1100), 512, 256, 8),
        ((2, 8500), None, 256, 8),  # the row in two passes
        ((2, 8500), None, 256, 4),
        ((1, 8500), 100, 20000, 8),  # a gradient group in two passes
    ],
    ids=str,
)
def test_quantize_and_lion_step(shape, group_size, state_group_size, momentum_bits):
    """Gradients of each dtype; two steps, so that the second starts from the first's momentum."""
    dtype = DTYPES[(shape[1] + (group_size or 0)) % 3]
    outlier_fraction = 0.0 if group_size == 512 else 0.03
    expected = make_state(
        shape,
        group_size=group_size,
        state_group_size=state_group_size,
        momentum_bits=momentum_bits,
        outlier_fraction=outlier_fraction,
    ).to(DEVICE)
    actual, buffers = expected.guarded()

    changes: dict[str, Any]
    for step, changes in enumerate([{}, {"maximize": True, "lr": 0.05, "first_row": 0}], start=1):
        factor = None
        if step == 1:
            gradient = ((ramp(shape, None).flip(1) - 3.0) * 1e-3).to(DEVICE, dtype)
            gradient[0] = 0.0
        else:  # half-way between two codes
            gradient = ties(shape, state_group_size).to(DEVICE, dtype)
            factor = torch.tensor(0.37, device=DEVICE)
        norm, expected_norm = (
            quantize_and_step_(
                package, state, gradient, factor=factor, group_size=state_group_size, step=step,
                **changes,
            ).sum()
            for package, state in ((backend, actual), (reference, expected))
        )  # fmt: skip
        assert_same_state(actual, expected)
        # Positive terms, of groups and of rows, added in fp64 in two orders.
        bound = gradient.numel() * 2**-53
        assert abs(norm - expected_norm) <= 2 * bound * expected_norm
    for name, buffer in buffers.items():
        assert guards_are_intact(buffer), name


@pytest.mark.parametrize("name", STEPS)
def test_numbers_in_memory_are_read_when_the_kernel_runs(name):
    """The second step's numbers are written to the same memory, as before a graph's replay."""
    (expected, given), (actual, read) = STEPS[name](DEVICE), STEPS[name](DEVICE)
    live = in_memory(name, NUMBERS[0], DEVICE)
    for numbers in NUMBERS:
        live.copy_(in_memory(name, numbers, DEVICE))
        given(reference, **numbers)
        read(backend, live=live, **OTHERS)
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("columns", "group_size", "state_group_size"),
    [(600, None, 256), (600, 100, 64), (1100, 32, 2000), (5000, 256, 256)],
)
def test_quantize_and_lion_step_leaves_rows_that_are_not_finite(
    columns, group_size, state_group_size, bad
):
    expected = make_state(
        (5, columns),
        group_size=group_size,
        state_group_size=state_group_size,
        outlier_fraction=0.02,
    ).to(DEVICE)
    actual, before = expected.clone(), expected.clone()
    gradient = random((5, columns), None).to(DEVICE) * 1e-3
    gradient[1, columns - 1], gradient[3, 0] = bad, -bad

    norms = [
        quantize_and_step_(package, state, gradient, group_size=state_group_size).sum()
        for package, state in ((backend, actual), (reference, expected))
    ]

    assert_same_state(actual, expected)
    assert not any(norm.isfinite() for norm in norms)
    for name, tensor in actual.tensors().items():
        assert_same_bits(tensor[[1, 3]], before.tensors()[name][[1, 3]])
    assert (actual.momentum.codes[[0, 2, 4]] != before.momentum.codes[[0, 2, 4]]).any()


# --- INT8 products --------------------------------------------------------------------------------

int8_product = importlib.import_module("qft_hf.kernels.triton.int8_product")

# Only the loop over K, which is the number of tokens in one product, has a bound that is not a
# constant of the kernel: a constant would compile the kernel again for each batch.
loops = pytest.mark.skipif(
    INTERPRETED
    and tuple(int(part) for part in version("triton").split(".")[:2]) < (3, 9)
    and tuple(int(part) for part in version("numpy").split(".")[:2]) >= (2, 4),
    reason="triton before 3.9 does not interpret loops with run-time bounds under numpy 2.4",
)


@pytest.fixture
def buffers(monkeypatch):
    """Put guards around tensors that a launcher makes with `new_empty`; return the buffers."""
    made = []
    new_empty = torch.Tensor.new_empty

    def guarded_empty(self, *size, **options):
        plain = new_empty(self, *size, **options)
        if plain.numel() == 0:  # the interpreter makes empty tensors
            return plain
        inner, buffer = guarded(plain)
        made.append(buffer)
        return inner

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_empty)
    return made


def int8_operand(rows: int, columns: int, form: str) -> torch.Tensor:
    """Return codes `[rows, columns]`, stored in one of the forms that operands may have."""
    generator = torch.Generator().manual_seed(rows * 1009 + columns)
    x = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8).to(DEVICE)
    if form == "transposed":
        return x.t().contiguous().t()
    if form == "part":
        larger = torch.full((rows + 2, columns + 5), 127, dtype=torch.int8, device=DEVICE)
        larger[1:-1, 3:-2] = x
        return larger[1:-1, 3:-2]
    return x


# K of one and of several steps, aligned and not; one row of the result, and several tiles.
PRODUCTS = [(1, 1, 1), (1, 288, 3), (70, 33, 7), (130, 160, 270), (33, 1040, 65)]
FORMS = ["contiguous", "transposed", "part"]


@loops
@pytest.mark.parametrize("b_form", FORMS)
@pytest.mark.parametrize("a_form", FORMS)
@pytest.mark.parametrize("shape", PRODUCTS, ids=str)
def test_int8_matmul(shape, a_form, b_form, buffers):
    m, k, n = shape
    a, b = int8_operand(m, k, a_form), int8_operand(k, n, b_form)
    dtype = DTYPES[(k + len(a_form + b_form)) % 3]
    a_scales, b_scales = (
        (torch.rand(size, 1, generator=torch.Generator().manual_seed(size)) * 0.05).to(DEVICE)
        for size in (m, n)
    )
    bias = torch.linspace(-99, 99, n, device=DEVICE).bfloat16()
    scales = (a_scales, b_scales) if a_form != "part" else (None, b_scales / 100)
    options = {"bias": bias if a_form != b_form else None}

    out = backend.int8_matmul(a, b, *scales, **options, dtype=dtype)

    expected = reference.int8_matmul(a, b, *scales, **options, dtype=torch.float32)
    assert_same_bits(out, stored(expected, dtype))
    assert buffers
    assert all(guards_are_intact(buffer) for buffer in buffers)


@loops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_a_product_that_are_given(dtype):
    a, b = int8_operand(70, 33, "contiguous"), int8_operand(33, 300, "contiguous")
    scales = torch.rand(70, 1, device=DEVICE)
    columns = torch.tensor([299, 0, 7], device=DEVICE)
    values = torch.randn(3, 70, device=DEVICE).bfloat16().t()

    out = backend.int8_matmul(
        a, b, scales, None, bias=None, columns=columns, values=values, dtype=dtype
    )
    requantized = backend.requantized_matmul(
        a, b, scales, columns=columns, values=values, group_size=256
    )

    expected = reference.int8_matmul(a, b, scales, None, dtype=torch.float32)
    expected[:, columns] = values.float()
    assert_same_bits(out, stored(expected, dtype))
    for found, wanted in zip(
        requantized, reference.quantize(expected, group_size=256), strict=True
    ):
        assert_same_bits(found, wanted)


@loops
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 300, 256), (130, 33, 530)], ids=str)
def test_requantized_matmul(shape, dtype, buffers):
    """Groups in a tile, the last one short; with and without scales and given columns."""
    m, k, n = shape
    a, b = int8_operand(m, k, "contiguous"), int8_operand(k, n, "transposed")
    scales = torch.rand(m, 1, device=DEVICE) + 0.01
    columns = torch.tensor([n - 1, 0, 255, 256, 300], device=DEVICE)
    columns = columns[columns < n].unique()
    values = torch.randn(m, len(columns), device=DEVICE).to(dtype) * 1e4
    values[m // 2, -1] = float("nan")
    given = {"columns": columns, "values": values}
    for factors, options in ((scales, given), (None, {"columns": None, "values": None})):
        results = backend.requantized_matmul(a, b, factors, **options, group_size=256)

        expected = reference.requantized_matmul(a, b, factors, **options, group_size=256)
        for found, wanted in zip(results, expected, strict=True):
            assert_same_bits(found, wanted)
    assert all(guards_are_intact(buffer) for buffer in buffers)


@loops
def test_requantized_matmul_in_groups_that_no_tile_has():
    a, b = int8_operand(9, 33, "contiguous"), int8_operand(33, 70, "contiguous")

    results = backend.requantized_matmul(a, b, None, columns=None, values=None, group_size=7)

    for found, wanted in zip(
        results, reference.requantized_matmul(a, b, None, group_size=7), strict=True
    ):
        assert_same_bits(found, wanted)


@loops
@pytest.mark.parametrize("tile", sorted({t for ts in int8_product.TILES.values() for t in ts}))
def test_int8_matmul_in_each_tile(tile, monkeypatch, buffers):
    """Rows, columns and K that the tile does not divide; on a GPU, only tiles that it can use."""
    if not INTERPRETED and tile not in int8_product.TILES[capability()]:
        pytest.skip("a tile of another GPU")
    monkeypatch.setattr(int8_product, "choose_tile", lambda *_: tile)
    m, k, n = tile.rows + 3, 2 * tile.summed * tile.unrolled + 16, tile.columns + 5
    a, b = int8_operand(m, k, "contiguous"), int8_operand(k, n, "transposed")

    out = backend.int8_matmul(a, b, None, None, bias=None, dtype=torch.float32)

    assert len(buffers) == 1  # operands in order are not copied
    assert guards_are_intact(buffers[0])
    expected = reference.int8_matmul(a, b, None, None, bias=None, dtype=torch.float32)
    assert_same_bits(out, expected)


@loops
def test_int8_matmul_visits_every_tile_of_the_result(monkeypatch):
    """More rows of tiles than one group of programs covers, and not a multiple of it."""
    tile = int8_product.Tile(16, 16, 32, 1, 1, 2)
    monkeypatch.setattr(int8_product, "choose_tile", lambda *_: tile)
    rows = 16 * (int8_product.GROUP.value * 2 + 3)
    a, b = int8_operand(rows, 32, "contiguous"), int8_operand(32, 40, "contiguous")

    out = backend.int8_matmul(a, b, None, None, bias=None, dtype=torch.float32)

    assert_same_bits(out, reference.int8_matmul(a, b, None, None, bias=None, dtype=torch.float32))


# --- inputs for INT8 products ---------------------------------------------------------------------

# One by one; rows in one block and several, columns in one tile and several; in two passes.
INPUT_SHAPES = [((1, 1), 1), ((7, 33), 0), ((33, 257), 3), ((130, 130), 40), ((2, 8500), 300)]


@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize(("shape", "n_outliers"), INPUT_SHAPES, ids=str)
def test_quantize_input(shape, n_outliers, make_input, buffers, monkeypatch):
    monkeypatch.setattr(layer_input, "MAX_BLOCKS", 2)
    x = make_input(shape, None).to(DEVICE, DTYPES[shape[1] % 3])
    x[:, 5::7] *= 50

    results = backend.quantize_input(x, n_outliers=n_outliers)

    expected = reference.quantize_input(x, n_outliers=n_outliers)
    for tensor, wanted in zip(results, expected, strict=True):
        assert_same_bits(tensor, wanted)
        assert tensor.stride() == wanted.stride()
    assert all(guards_are_intact(buffer) for buffer in buffers)


@pytest.mark.parametrize(
    ("dtype", "counts"),
    [
        (torch.float32, (1, 12, 40)),
        (torch.bfloat16, (1, 3, 13)),
        (torch.float16, (2, 6, 20)),
    ],
    ids=str,
)
def test_quantize_input_keeps_the_first_of_equal_columns_and_what_is_not_finite(dtype, counts):
    x = torch.full((70, 40), 0.25, device=DEVICE, dtype=dtype)
    x[66, 3::4] = -2.0
    x[0, 7], x[69, 20], x[1, 30], x[2, 31] = -float("nan"), float("inf"), float("-inf"), 2.0
    if dtype == torch.float32:  # the largest integer that the bits of a magnitude may be
        x[0, 7] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(dtype)

    for n_outliers in counts:
        results = backend.quantize_input(x, n_outliers=n_outliers)

        expected = reference.quantize_input(x, n_outliers=n_outliers)
        for tensor, wanted in zip(results, expected, strict=True):
            assert_same_bits(tensor, wanted)


# --- outputs of INT8 products ---------------------------------------------------------------------


def output_cases() -> list[Any]:
    """Sizes in every dtype; the interpreter cannot multiply BF16 as matrix units do."""
    return [
        pytest.param(sizes, dtype, id=f"{sizes}-{dtype}")
        for sizes in [(1, 1, 1, 0, 0), (5, 7, 33, 1, 0), (5, 7, 32, 0, 2), (130, 70, 304, 20, 37)]
        for dtype in DTYPES
        if dtype != torch.bfloat16 or not INTERPRETED
    ]


@loops
@pytest.mark.parametrize(("sizes", "dtype"), output_cases())
def test_int8_linear(sizes, dtype, buffers):
    """Sums agree within a bound, and in every bit if they are exact in any order."""
    for exact in (True, False):
        x, floats, weight, bias = make_output_case(sizes, dtype, exact=exact)
        pairs = output_terms(x, floats, weight, bias, dtype)
        sums = sum(left @ right for left, right in pairs)
        x, floats = Input(*(tensor.to(DEVICE) for tensor in x)), floats.to(DEVICE)
        weight = Weight(*(tensor.to(DEVICE) for tensor in weight.tensors), None)
        for _ in range(2):  # with a new plan, then with the existing one
            y = backend.int8_linear(x, floats, weight, bias=bias.to(DEVICE), dtype=dtype)

            if exact:
                assert_same_bits(y.cpu(), sums.to(dtype))
            else:
                assert ((y.cpu() - sums).abs() <= int8_linear_bound(pairs, dtype)).all()
    assert buffers
    assert all(guards_are_intact(buffer) for buffer in buffers)


@loops
def test_int8_linear_of_other_tokens_and_biases_by_one_weight():
    """The plan bound to a weight is rebuilt for another number of tokens, and for no bias."""
    x, floats, weight, bias = make_output_case((40, 9, 32, 2, 3), torch.float32, exact=True)
    weight = Weight(*(tensor.to(DEVICE) for tensor in weight.tensors), None)
    for tokens, given in ((40, bias), (17, bias), (17, None), (40, 2 * bias)):
        part = Input(
            x.codes[:tokens], x.scales[:tokens], x.columns, x.values[:tokens].t().clone().t()
        )
        pairs = output_terms(part, floats[:tokens], weight, given, torch.float32)

        y = backend.int8_linear(
            Input(*(tensor.to(DEVICE) for tensor in part)), floats[:tokens].to(DEVICE), weight,
            bias=None if given is None else given.to(DEVICE), dtype=torch.float32,
        )  # fmt: skip

        assert_same_bits(y.cpu(), sum(left @ right for left, right in pairs).float())


# --- gradients for INT8 products ------------------------------------------------------------------


def gradient_factors(rows: int) -> torch.Tensor:
    return (torch.rand(rows, 1, generator=torch.Generator().manual_seed(rows)) + 0.1).to(DEVICE)


# Less than a tile, exactly one, ragged; several tiles in each dimension.
GRADIENTS = [(1, 1), (7, 33), (64, 64), (65, 130), (200, 67)]


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize("shape", GRADIENTS, ids=str)
def test_quantize_gradient(shape, make_input, stochastic, buffers):
    gradient = make_input(shape, None).to(DEVICE, DTYPES[shape[1] % 3])
    given = (gradient, gradient_factors(shape[1]), gradient_factors(shape[0]))
    options = {"stochastic": stochastic, "seed": ROUNDING.seed}

    results = backend.quantize_gradient(*given, **options)

    for tensor, expected in zip(
        results, reference.quantize_gradient(*given, **options), strict=True
    ):
        assert_same_bits(tensor, expected)
    assert all(guards_are_intact(buffer) for buffer in buffers)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_quantize_gradient_keeps_what_is_not_finite_visible(bad):
    gradient = random((70, 90), None).to(DEVICE)
    gradient[65, 3], gradient[2] = bad, 0.0
    gradient[:, 80], gradient[:, 81] = 1e-35, 1e-40  # the least scale; subnormal
    given = (gradient, gradient_factors(90), gradient_factors(70))

    for stochastic in (True, False):
        options = {"stochastic": stochastic, "seed": 5}
        results = backend.quantize_gradient(*given, **options)

        expected = reference.quantize_gradient(*given, **options)
        for tensor, wanted in zip(results, expected, strict=True):
            assert_same_bits(tensor, wanted)
        assert not results[1].isfinite().all()
        assert not results[3].isfinite().all()


@pytest.mark.parametrize("form", [0, 1])
def test_quantize_gradient_makes_one_form(form):
    gradient = random((70, 90), None).to(DEVICE)
    given = [gradient_factors(90), gradient_factors(70)]
    given[1 - form] = None

    results = backend.quantize_gradient(gradient, *given, stochastic=True, seed=5)

    expected = reference.quantize_gradient(gradient, *given, stochastic=True, seed=5)
    for tensor, wanted in zip(results, expected, strict=True):
        assert_same_bits(tensor, wanted)
    assert sum(tensor.numel() > 0 for tensor in results) == 2


# --- float ----------------------------------------------------------------------------------------


def floats(shapes: list[tuple[int, ...]]) -> tuple[list[torch.Tensor], ...]:
    """Parameters of both dtypes, momenta and gradients; one BF16 gradient of an FP32 parameter."""
    generator = torch.Generator().manual_seed(3)
    parameters, momenta, gradients = [], [], []
    for number, shape in enumerate(shapes):
        dtype = torch.bfloat16 if number % 2 else torch.float32
        parameter, momentum, gradient = (
            torch.randn(shape, generator=generator).to(DEVICE) * size for size in (1, 1e-3, 3e-3)
        )
        gradient.view(-1)[::3] = 0.0
        gradient.view(-1)[5::50] = float("nan")
        gradient.view(-1)[6::50] = -float("inf")
        parameters.append((parameter + 1).to(dtype))
        momenta.append(momentum)
        gradients.append(gradient.to(torch.bfloat16 if number == 0 else dtype))
    return parameters, momenta, gradients


# A scalar, an empty one, one of exactly a block, one over, several blocks; each in both dtypes.
FLOAT_SHAPES = [(), (), (7,), (7,), (0,), (0,), (1024,), (1024,), (5, 205), (5, 205), (2, 3, 401)]


@pytest.mark.parametrize("changes", [{}, {"maximize": True}, {"stochastic": False}], ids=str)
@pytest.mark.parametrize("shapes", [[(3, 5)], FLOAT_SHAPES], ids=["one", "many"])
def test_lion_step_floats(shapes, changes):
    """Each parameter has its own step and stream, and its neighbors in memory are guarded."""
    expected, momenta, gradients = floats(shapes)
    pairs = [[guarded(tensor) for tensor in tensors] for tensors in (expected, momenta)]
    inside = [[inner for inner, _ in tensors] for tensors in pairs]

    for step in (1, 2, 3):
        given = float_arguments(len(shapes), lr=0.01, step=step, **changes)
        backend.lion_step_floats_(*inside, gradients, **given)
        is_random = given["roundings"].stochastic
        values = expected if is_random else [value.float() for value in expected]
        reference.lion_step_floats_(values, momenta, gradients, **given)
        for value, parameter in zip(values, expected, strict=True):
            parameter.copy_(stored(value.float(), parameter.dtype))
        for tensors, wanted in zip(inside, (expected, momenta), strict=True):
            for tensor, other in zip(tensors, wanted, strict=True):
                assert_same_bits(tensor, other)
        gradients = [gradient.flip(0) if gradient.ndim else -gradient for gradient in gradients]
    assert all(guards_are_intact(buffer) for tensors in pairs for _, buffer in tensors)


@pytest.mark.parametrize(
    ("sign", "changes"), [(1, {}), (-1, {}), (1, {"stochastic": False})], ids=str
)
def test_step_floats(sign, changes):
    """Lion's kernel, run without momentum."""
    expected, _, gradients = floats(FLOAT_SHAPES)
    pairs = [guarded(tensor) for tensor in expected]
    gradients = [sign * gradient for gradient in gradients]
    given = step_float_arguments(len(expected), lr=0.01, **changes)

    backend.step_floats_([inner for inner, _ in pairs], gradients, **given)

    is_random = given["roundings"].stochastic
    values = expected if is_random else [value.float() for value in expected]
    reference.step_floats_(values, gradients, **given)
    for (inner, buffer), value in zip(pairs, values, strict=True):
        assert_same_bits(inner, stored(value.float(), inner.dtype))
        assert guards_are_intact(buffer)


def test_lion_step_floats_without_update_keeps_bits():
    parameter = torch.randn(2000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    parameter = parameter.bfloat16()
    before = parameter.clone()
    zeros = [[torch.zeros(2000, device=DEVICE)] for _ in range(2)]

    backend.lion_step_floats_([parameter], *zeros, **float_arguments(weight_decay=0.0))

    assert_same_bits(parameter, before)


def test_lion_step_floats_takes_any_counter():
    given = float_arguments(2, lr=0.01)
    given["roundings"] = given["roundings"]._replace(steps=[2**32 + 5, 1], streams=[0, 2**31])
    results = []
    for package in (backend, reference):
        tensors = [
            [torch.full((50,), value, device=DEVICE, dtype=dtype) for _ in range(2)]
            for value, dtype in ((1.0, torch.bfloat16), (0.0, torch.float32), (1.0, torch.float32))
        ]
        package.lion_step_floats_(*tensors, **given)
        results.append(tensors[0])

    for actual, expected in zip(*results, strict=True):
        assert_same_bits(actual, expected)


def test_lion_step_floats_in_any_memory_order():
    expected = torch.linspace(-1, 1, 35, device=DEVICE).view(5, 7).bfloat16()
    actual = expected.t().contiguous().t()
    gradient = torch.ones(7, 5, device=DEVICE).t()
    momenta = torch.zeros(5, 7, device=DEVICE), torch.zeros(7, 5, device=DEVICE).t()
    version = actual._version

    backend.lion_step_floats_([actual], [momenta[1]], [gradient], **float_arguments())

    reference.lion_step_floats_([expected], [momenta[0]], [gradient], **float_arguments())
    assert_same_bits(actual, expected)
    assert_same_bits(momenta[1], momenta[0])
    assert actual._version > version
