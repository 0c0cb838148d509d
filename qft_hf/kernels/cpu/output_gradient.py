"""Output gradients as INT8 operands in numba. Twin: `kernels/output_gradient.py`.

The row form is computed token by token. For the column form the maxima of all columns come first,
then the codes by blocks of tokens, each as long as a cache line of the transposed codes.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import output_gradient as operators
from ..groups import QMAX, TINY, absmax_scale, empty_quantized
from ..output_gradient import COLUMNS, ROWS
from ..philox import LANES, WEIGHT
from .bf16 import float_array, widen
from .columns import column_maxima
from .philox import philox, weight_uniform
from .quantization import magnitude
from .threads import for_each_row_range, run

_f32, _u32, _u64 = np.float32, np.uint32, np.uint64
_QMAX, _TINY, _PER_QMAX = _f32(QMAX), _f32(TINY), _f32(1.0 / QMAX)
_ZERO, _ONE = _f32(0.0), _f32(1.0)
_INFINITY = np.int32(0x7F800000)  # as an integer; every NaN lies above it
_ROWS, _COLUMNS, _WEIGHT = _u64(ROWS), _u64(COLUMNS), _u64(WEIGHT)

BLOCK = 64  # tokens: one cache line of transposed codes
QUADS = BLOCK // LANES
CHUNK = 256  # outputs whose transposed codes are written together, and so stay in the cache


@njit(inline="always")
def _stochastic_code(value, word):
    """Round up with the probability of the fraction; twin: `stochastic_codes`."""
    whole = np.floor(value)
    value = whole + _ONE if (value - whole) + weight_uniform(word) >= _ONE else whole
    return np.int8(min(max(-_QMAX, value), _QMAX))  # in this order NaN becomes a number


# Separate functions, here and below: LLVM vectorizes them less well in one body with the loops
# around them or with the random words. They take matrices and a row number: a view made in the
# loops around them would count references, which costs as much as tens of elements.
@njit(nogil=True, cache=True)
def _scale_row(gradient, token, factors, values):
    """Write a row times its factors to `values` and return its largest magnitude, as bits."""
    row = gradient[token]
    largest = np.int32(0)
    for j in range(row.shape[0]):
        value = widen(row[j]) * factors[j]
        values[j] = value
        largest = max(largest, magnitude(value))
    return largest


@njit(nogil=True, cache=True)
def _row_words(words, row, seed, step):
    """Draw the random words of a row; `words` is padded to whole quads."""
    quads = words.shape[0] // LANES
    base = _u64(row) * _u64(quads)
    for quad in range(quads):
        w0, w1, w2, w3 = philox(base + _u64(quad), seed, step, _ROWS, _WEIGHT)
        j = LANES * quad
        words[j], words[j + 1], words[j + 2], words[j + 3] = w0, w1, w2, w3


@njit(nogil=True, cache=True)
def _round_row(values, inverse, words, codes, token):
    code = codes[token]
    for j in range(values.shape[0]):
        code[j] = _stochastic_code(values[j] * inverse, words[j])


@njit(nogil=True, error_model="numpy", cache=True)
def _quantize_rows(gradient, factors, codes, scales, seed, start, stop):
    outputs = gradient.shape[1]
    values = np.empty(outputs, np.float32)
    words = np.empty((outputs + LANES - 1) // LANES * LANES, np.uint32)
    for token in range(start, stop):
        bits = _scale_row(gradient, token, factors, values)
        scale = np.int32(bits).view(np.float32) * _PER_QMAX
        if bits >= _INFINITY:
            codes[token] = 0
        else:
            scale = max(scale, _TINY)
            _row_words(words, token, seed, _u64(bits))
            _round_row(values, _ONE / scale, words, codes, token)
        scales[token] = scale


@njit(nogil=True, error_model="numpy", cache=True)
def _invert_scales(bits, inverses):
    """Write the inverse scales of columns whose largest magnitudes have these bits."""
    for j in range(bits.shape[0]):
        inverse = _ONE / max(np.int32(bits[j]).view(np.float32) * _PER_QMAX, _TINY)
        # An inverse of 0 marks a column with NaN or infinity.
        inverses[j] = inverse if bits[j] < _INFINITY else _ZERO


@njit(nogil=True, cache=True)
def _column_words(words, bits, first, quads, quad, seed):
    """Draw the random words of a quad of tokens, in each column from `first` on."""
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    for j in range(bits.shape[0]):
        counter = _u64(first + j) * quads + quad
        w0, w1, w2, w3 = philox(counter, seed, _u64(bits[j]), _COLUMNS, _WEIGHT)
        words0[j], words1[j], words2[j], words3[j] = w0, w1, w2, w3


@njit(inline="always")
def _column_byte(element, factor, inverse, word):
    """Return the code of an element in the column form, as the low byte of a uint32."""
    return _u32(np.uint8(_stochastic_code(widen(element) * factor * inverse, word)))


@njit(nogil=True, cache=True)
def _round_quad(gradient, factors, inverses, words, packed, quad, first, last):
    """Write the codes of a quad of tokens in each column as a uint32, low byte first."""
    # Past the end the last token is repeated; the codes of the repetitions are cut off.
    end, token0 = gradient.shape[0] - 1, LANES * quad
    token1, token2, token3 = min(token0 + 1, end), min(token0 + 2, end), min(token0 + 3, end)
    factor0, factor1 = factors[token0], factors[token1]
    factor2, factor3 = factors[token2], factors[token3]
    row0, row1 = gradient[token0, first:last], gradient[token1, first:last]
    row2, row3 = gradient[token2, first:last], gradient[token3, first:last]
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    packed_codes = packed[quad % QUADS]
    for j in range(last - first):
        inverse = inverses[j]
        codes = (
            _column_byte(row0[j], factor0, inverse, words0[j])
            | _column_byte(row1[j], factor1, inverse, words1[j]) << _u32(8)
            | _column_byte(row2[j], factor2, inverse, words2[j]) << _u32(16)
            | _column_byte(row3[j], factor3, inverse, words3[j]) << _u32(24)
        )
        # 0 if the column has NaN or infinity. LLVM would move a branch around the loads, and only
        # AVX-512 has conditional loads of 16 bits.
        packed_codes[j] = codes & (_u32(0) - _u32(inverse > _ZERO))


@njit(nogil=True, cache=True)
def _transpose(packed, packed_codes, first, last, first_quad):
    for j in range(first, last):
        for quad in range(QUADS):  # a constant, so that the loop is unrolled
            packed_codes[j, first_quad + quad] = packed[quad, j - first]


@njit(nogil=True, cache=True)
def _round_columns(gradient, factors, maxima, packed_codes, seed, start, stop):
    tokens, outputs = gradient.shape
    quads = (tokens + LANES - 1) // LANES
    inverses = np.empty(CHUNK, np.float32)
    words = np.empty((LANES, CHUNK), np.uint32)
    packed = np.empty((QUADS, CHUNK), np.uint32)
    for first_quad in range(start * QUADS, stop * QUADS, QUADS):
        for first in range(0, outputs, CHUNK):
            last = min(first + CHUNK, outputs)
            bits, inverse = maxima[first:last], inverses[: last - first]
            _invert_scales(bits, inverse)
            for quad in range(first_quad, min(first_quad + QUADS, quads)):
                _column_words(words, bits, first, _u64(quads), _u64(quad), seed)
                _round_quad(gradient, factors, inverse, words, packed, quad, first, last)
            _transpose(packed, packed_codes, first, last, first_quad)


@njit(nogil=True, cache=True)
def _rows(arguments, n_rows, n_ranges):
    for_each_row_range(_quantize_rows, arguments, n_rows, n_ranges)


@njit(nogil=True, cache=True)
def _columns(arguments, n_blocks, n_ranges):
    for_each_row_range(_round_columns, arguments, n_blocks, n_ranges)


def _by_rows(gradient: Tensor, factors: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    tokens, outputs = gradient.shape
    codes, scales = empty_quantized(tokens, outputs, None)
    arguments = (float_array(gradient), factors.view(-1), codes, scales.view(-1), _u64(seed))
    run(_rows, arguments, tokens, outputs)
    return codes, scales


def _by_columns(gradient: Tensor, factors: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    tokens, outputs = gradient.shape
    maxima = column_maxima(gradient, factors.view(-1))
    n_blocks = -(-tokens // BLOCK)
    packed_codes = gradient.new_empty(outputs, n_blocks * QUADS, dtype=torch.uint32)
    arguments = (float_array(gradient), factors.view(-1), maxima, packed_codes, _u64(seed))
    run(_columns, arguments, n_blocks, BLOCK * outputs)
    codes = packed_codes.view(torch.int8)[:, :tokens].contiguous()
    return codes, absmax_scale(maxima.view(torch.float32)).view(-1, 1)


@operators.quantize_gradient.register("cpu")
def quantize_gradient(
    gradient: Tensor,
    row_factors: Tensor | None,
    column_factors: Tensor | None,
    *,
    stochastic: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not stochastic:  # for ablation only
        return operators.quantize_gradient.reference(
            gradient, row_factors, column_factors, stochastic=False, seed=seed
        )
    empty = empty_quantized(0, 0, None)
    rows = empty if row_factors is None else _by_rows(gradient, row_factors, seed)
    columns = empty if column_factors is None else _by_columns(gradient, column_factors, seed)
    return (*rows, *columns)
