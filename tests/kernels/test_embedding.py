"""Lookup of rows and the gradient of an embedding table, against float64 and between backends."""

import numpy as np
import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import Quantized, Weight
from tests.kernels.backends import cpu, reference
from tests.kernels.states import (
    coded,
    guarded,
    guards_are_intact,
    make_state,
    random,
    spread,
    stored64,
)
from tests.tolerances import FP32_EPS, assert_same_bits, rounding_bound

BACKENDS = [reference, cpu]
ROWS = 23
N_TOKENS = [1, 7, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def token_ids(n, dtype=torch.int64):
    """Return ids: some rows often, in runs and far apart, the first and the last, others never."""
    ids = torch.randint(0, 9, (n,), generator=torch.Generator().manual_seed(n)) * 2
    ids[n // 2 :: 3] = ROWS - 1
    return ids.to(dtype)


def token_gradients(n, columns, dtype=torch.float32):
    """Return values whose size differs by row, so that the order of a sum shows in its bits."""
    values = random((n, columns), None) * torch.logspace(-3, 3, n)[:, None]
    return values.to(dtype)


def table(columns, group_size):
    """Return nonzero codes and scales, so that a change of rows that are not looked up shows."""
    return coded(random((ROWS, columns), None), group_size)


# --- lookup ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 30])
@pytest.mark.parametrize("n", N_TOKENS)
def test_rows_are_those_of_the_whole(backend, n, group_size, dtype, id_dtype):
    weight = make_state((ROWS, 70), group_size=group_size, outlier_fraction=0.03).weight
    ids = token_ids(n, id_dtype)

    found = backend.dequantize(weight, rows=ids, dtype=dtype)

    whole = reference.dequantize(weight, dtype=dtype)
    assert_same_bits(found, whole[ids.long()])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("number_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [None, 30])
def test_a_number_may_stand_for_several_rows_as_that_of_an_expert(
    backend, group_size, dtype, number_dtype
):
    weight = make_state((8 * 3, 70), group_size=group_size, outlier_fraction=0.03).weight
    numbers = torch.tensor([6, 0, 7, 2], dtype=number_dtype)

    found = backend.dequantize(weight, rows=numbers, n_each=3, dtype=dtype)

    whole = reference.dequantize(weight, dtype=dtype).view(8, 3, 70)
    assert_same_bits(found, whole[numbers.long()].view(12, 70))


def test_numbers_of_several_rows_are_checked():
    weight = make_state((8 * 3, 70), group_size=None, outlier_fraction=0.03).weight

    with pytest.raises(IndexError, match=r"in \[0, 8\), got 8"):
        kernels.dequantize(weight, rows=torch.tensor([1, 8]), n_each=3)
    for n_each in (0, 5):
        with pytest.raises(
            ValueError, match=f"must divide the 24 rows of the weight, got {n_each}"
        ):
            kernels.dequantize(weight, rows=torch.tensor([1]), n_each=n_each)


def test_no_rows_are_an_empty_result():
    weight = Weight.dense(table(40, 16))

    found = kernels.dequantize(weight, rows=torch.zeros(0, dtype=torch.int64), dtype=torch.bfloat16)

    assert tuple(found.shape) == (0, 40)
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(("bad", "shown"), [(-100, "-100"), (ROWS, "23")])
def test_an_id_that_is_no_row_says_so(bad, shown):
    matrix = table(40, 16)
    before = matrix.codes.clone()
    ids = torch.tensor([3, bad, 5])

    with pytest.raises(IndexError, match=rf"in \[0, 23\), got {shown}.*the tokenizer is not"):
        kernels.dequantize(Weight.dense(matrix), rows=ids)
    with pytest.raises(IndexError, match=rf"in \[0, 23\), got {shown}.*the tokenizer is not"):
        kernels.embedding_gradient_(matrix, ids, torch.ones(3, 40))
    assert_same_bits(matrix.codes, before)


def test_where_nobody_looks_an_id_that_is_no_row_gives_nan_and_no_gradient():
    """On a GPU the host does not read ids to check them. The reference defines the result."""
    weight = make_state((ROWS, 40), group_size=16, outlier_fraction=0.1).weight
    ids = torch.tensor([3, -100, ROWS, 5, 2**31])

    found = kernels.dequantize.reference(weight, rows=ids)

    assert found.isnan().all(dim=1).tolist() == [False, True, True, False, True]
    assert found[[0, 3]].isfinite().all()
    matrix, expected = table(40, 16), table(40, 16)
    add_ = kernels.embedding_gradient_.reference
    add_(matrix, ids, torch.ones(5, 40))
    add_(expected, torch.tensor([3, 5]), torch.ones(2, 40))
    assert_same_bits(matrix.codes, expected.codes)
    assert_same_bits(matrix.scales, expected.scales)


# --- gradient -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("padding_idx", [None, 4, 5])
@pytest.mark.parametrize("group_size", [16, 256])
@pytest.mark.parametrize("n", N_TOKENS)
def test_each_row_is_the_sum_over_its_tokens(backend, n, group_size, padding_idx):
    ids, gradient = token_ids(n), token_gradients(n, 300)
    matrix, before = table(300, group_size), table(300, group_size)

    backend.embedding_gradient_(matrix, ids, gradient, padding_idx=padding_idx)

    exact, size = np.zeros((ROWS, 300)), np.zeros((ROWS, 300))
    np.add.at(exact, ids.numpy(), gradient.double().numpy())
    np.add.at(size, ids.numpy(), gradient.double().abs().numpy())
    used = sorted(set(ids.tolist()) - {padding_idx})
    error = np.abs(stored64(matrix) - exact)
    bound = rounding_bound(exact, spread(matrix.scales, 300, group_size)) + n * FP32_EPS * size
    assert (error <= bound)[used].all()
    unused = sorted(set(range(ROWS)) - set(used))
    assert_same_bits(matrix.codes[unused], before.codes[unused])
    assert_same_bits(matrix.scales[unused], before.scales[unused])


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_sums_are_in_the_order_of_the_tokens(backend):
    """In FP32, 1e8 + 1 - 1e8 is 0 and 1e8 - 1e8 + 1 is 1: another order gives another row."""
    ids = torch.tensor([7, 2, 7, 2, 7, 2])
    gradient = torch.tensor([[1e8], [1e8], [1.0], [-1e8], [-1e8], [1.0]])
    matrix = table(1, 256)

    backend.embedding_gradient_(matrix, ids, gradient)

    assert matrix.codes[[7, 2], 0].tolist() == [0, 127]


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group_size", [1, 30, 256, 5000])
@pytest.mark.parametrize(("n", "columns"), [(1, 1), (7, 33), (300, 1100)])
def test_cpu_equals_reference_bit_for_bit(n, columns, group_size, dtype, id_dtype, n_threads):
    ids, gradient = token_ids(n, id_dtype), token_gradients(n, columns, dtype)
    expected = table(columns, group_size)
    pairs = [guarded(tensor) for tensor in expected.tensors]
    kept = gradient.clone()
    matrix = Quantized(*(inner for inner, _ in pairs), group_size)

    cpu.embedding_gradient_(matrix, ids, gradient, padding_idx=4)

    reference.embedding_gradient_(expected, ids, gradient, padding_idx=4)
    for (inner, buffer), wanted in zip(pairs, expected.tensors, strict=True):
        assert_same_bits(inner, wanted)
        assert guards_are_intact(buffer)
    assert_same_bits(gradient, kept)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(backend, bad):
    gradient = token_gradients(7, 300)
    gradient[3, 280] = bad
    ids = token_ids(7)
    matrix = table(300, 256)

    backend.embedding_gradient_(matrix, ids, gradient)

    finite = matrix.scales.isfinite()
    assert not finite[ids[3], 1]
    assert int(finite.sum()) == finite.numel() - 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"codes": torch.zeros(4, 6)}, TypeError, r"codes must be torch\.int8"),
        ({"scales": torch.ones(4, 2)}, ValueError, r"scales must be float32 of shape \(4, 1\)"),
        ({"ids": torch.zeros(3)}, TypeError, r"int32 or int64, got torch\.float32"),
        ({"ids": torch.zeros(3, 1).long()}, ValueError, r"of shape \[n\], .*got shape \(3, 1\)"),
        ({"ids": torch.zeros(6).long()[::2]}, ValueError, r"contiguous.*strides \(2,\)"),
        ({"gradient": torch.ones(2, 6)}, ValueError, r"shape \(3, 6\) on cpu, a row for each"),
        ({"gradient": torch.ones(3, 6).double()}, TypeError, r"got torch\.float64"),
        ({"gradient": torch.ones(6, 3).t()}, ValueError, r"Call \.contiguous\(\) first"),
        (
            {"codes": torch.zeros(4, 6, dtype=torch.uint8), "group_size": 64, "bits": 4},
            TypeError,
            "table must have codes of 8 bits, got 4",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, error, match):
    arguments = {
        "codes": torch.zeros(4, 6, dtype=torch.int8),
        "scales": torch.ones(4, 1),
        "group_size": 256,
        "ids": torch.tensor([1, 0, 1]),
        "gradient": torch.ones(3, 6),
        **change,
    }
    before = arguments["codes"].clone()
    ids, gradient = arguments.pop("ids"), arguments.pop("gradient")

    with pytest.raises(error, match=match):
        kernels.embedding_gradient_(Quantized(**arguments), ids, gradient)

    assert_same_bits(arguments["codes"], before)
