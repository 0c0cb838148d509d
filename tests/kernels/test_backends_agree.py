"""Quantization and gradients: every backend that runs on a CPU returns the reference's bits.

The Lion step has its own comparison in `test_lion.py`.
"""

import pytest
import torch

from qft_hf.kernels import Quantized, Weight
from tests.kernels.backends import cpu, reference
from tests.kernels.states import coded, guarded, guards_are_intact, ramp, random, ties
from tests.scripts.commands import load
from tests.tolerances import assert_same_bits, assert_same_norms

BACKENDS = [cpu]

SHAPES = [(1, 1), (1, 128), (3, 129), (7, 33), (5, 300), (70, 1100)]  # the last is split by threads
GROUP_SIZES = [None, 1, 32, 100, 256, 5000]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def extremes(shape, group_size):
    """Return all orders of magnitude, both signs, zeros, rows of zeros, NaN and infinities."""
    generator = torch.Generator().manual_seed(5)
    x = 10 ** (torch.rand(shape, generator=generator) * 80 - 42)  # 0 and infinity at the ends
    x *= torch.randint(-1, 2, shape, generator=generator)
    x[::3] *= 1e-30
    x[1::7] = 0.0
    flat = x.view(-1)
    for position, value in ((5, float("nan")), (77, float("inf")), (200, -float("inf"))):
        flat[position : position + 1] = value
    return x


INPUTS = [random, ramp, ties, extremes]


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_and_back(backend, make_input, shape, dtype, group_size, n_threads):
    x = make_input(shape, group_size).to(dtype)
    before = x.clone()

    codes, scales = backend.quantize(x, group_size=group_size)
    weight = Weight.dense(Quantized(codes, scales, group_size))
    values = backend.dequantize(weight)

    # Zero tolerance: all backends round every operation correctly, and in the same order.
    expected_codes, expected_scales = reference.quantize(x, group_size=group_size)
    assert_same_bits(codes, expected_codes)
    assert_same_bits(scales, expected_scales)
    assert_same_bits(values, reference.dequantize(weight))
    assert_same_bits(x, before)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_input(backend, make_input, shape, n_threads):
    x = make_input(shape, None).to(DTYPES[shape[1] % 3])

    results = backend.quantize_input(x, n_outliers=shape[1] // 3)

    expected = reference.quantize_input(x, n_outliers=shape[1] // 3)
    for tensor, wanted in zip(results, expected, strict=True):
        assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize("group_size", [1, 30, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accumulate(backend, make_input, shape, group_size, n_threads):
    first = coded(random(shape, group_size), group_size)
    other = coded(make_input(shape, group_size) * -0.7, group_size)
    kept = tuple(tensor.clone() for tensor in other.tensors)
    pairs = [guarded(tensor) for tensor in first.tensors]
    reference.accumulate_(first, other)

    backend.accumulate_(Quantized(*(inner for inner, _ in pairs), group_size), other)

    for (inner, buffer), wanted in zip(pairs, first.tensors, strict=True):
        assert_same_bits(inner, wanted)
        assert guards_are_intact(buffer)
    for tensor, wanted in zip(other.tensors, kept, strict=True):
        assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("make_input", INPUTS)
@pytest.mark.parametrize("group_size", [1, 30, 256])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squared_norms(backend, make_input, shape, group_size, n_threads):
    gradient = coded(make_input(shape, group_size), group_size)

    norms = backend.squared_norms(gradient)

    assert_same_norms(norms, reference.squared_norms(gradient), gradient.scales.shape[1])


CALLS = load("benchmark_kernels").operators(6, 300, None, torch.device("cpu"), 5)


@pytest.mark.parametrize("name", CALLS)
def test_tensors_are_made_on_the_device_of_the_arguments(name):
    """Not on PyTorch's default, on which the CPU's kernels once made their results."""
    _, _, call = CALLS[name]

    with torch.device("meta"):
        result = call()

    assert result is None or all(tensor.device.type == "cpu" for tensor in tensors_of(result))


def tensors_of(result):
    return [result] if isinstance(result, torch.Tensor) else result
