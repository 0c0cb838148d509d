"""Output gradients as INT8 operands in numba. Twin: `kernels/reference/quantize_gradient.py`.

The row form goes token by token. The column form goes by blocks of tokens, one cache line of its
transposed codes: first the maxima of all columns, then the codes.
"""

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .. import reference
from ..reference.philox import LANES, WEIGHT
from ..reference.quantize import QMAX, TINY, absmax_scale
from ..reference.quantize_gradient import COLUMNS, ROWS
from .bf16 import float_array, load_row
from .column_absmax import scaled_column_absmax
from .philox import philox, random_row, weight_uniform
from .quantize import largest_magnitude
from .threads import for_each_row_range

_f32, _u32, _u64 = np.float32, np.uint32, np.uint64
_QMAX, _TINY, _PER_QMAX = _f32(QMAX), _f32(TINY), _f32(1.0 / QMAX)
_ZERO, _ONE = _f32(0.0), _f32(1.0)
_INFINITY = np.int32(0x7F800000)  # as an integer; every NaN lies above it
_ROWS, _COLUMNS, _WEIGHT = _u64(ROWS), _u64(COLUMNS), _u64(WEIGHT)

BLOCK = 64  # tokens: one cache line of transposed codes; a multiple of LANES
CHUNK = 256  # outputs whose transposed codes are written together: they stay in the cache


@njit(inline="always")
def _stochastic_code(value, word):
    """Round up with the probability of the fraction; twin: `stochastic_codes`."""
    whole = np.floor(value)
    value = whole + _f32((value - whole) + weight_uniform(word) >= _ONE)
    return np.int8(min(max(value, -_QMAX), _QMAX))


@njit(inline="always")
def _stochastic_byte(value, word):
    """The bits of a code in a uint32."""
    return _u32(np.uint8(_stochastic_code(value, word)))


# Functions of their own, here and below: in one body with the loops around them, or with the random
# words, LLVM does not vectorize them as well.
@njit(nogil=True, cache=True)
def _round_quads(value0, value1, value2, value3, words, packed):
    """Codes of the four values that share a counter, as the bytes of a uint32, low byte first."""
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    for i in range(packed.shape[0]):
        packed[i] = (
            _stochastic_byte(value0[i], words0[i])
            | _stochastic_byte(value1[i], words1[i]) << _u32(8)
            | _stochastic_byte(value2[i], words2[i]) << _u32(16)
            | _stochastic_byte(value3[i], words3[i]) << _u32(24)
        )


@njit(nogil=True, error_model="numpy", cache=True)
def _quantize_rows(gradient, factors, codes, scales, seed, start, stop):
    outputs = gradient.shape[1]
    quads = (outputs + LANES - 1) // LANES
    values = np.empty(outputs, np.float32)
    words = np.empty((LANES, quads), np.uint32)
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    flat = np.empty(quads * LANES, np.uint32)
    for token in range(start, stop):
        code = codes[token]
        load_row(gradient[token], values)
        for j in range(outputs):
            values[j] *= factors[j]
        bits = largest_magnitude(values.view(np.int32))
        scale = np.array([bits], np.int32).view(np.float32)[0] * _PER_QMAX
        if bits >= _INFINITY:
            code[:] = 0
            scales[token] = scale
            continue
        if scale < _TINY:
            scale = _TINY
        scales[token] = scale
        inverse = _ONE / scale
        random_row(words, token, seed, _u64(bits), _ROWS, _WEIGHT)
        for quad in range(quads):
            flat[LANES * quad] = words0[quad]
            flat[LANES * quad + 1] = words1[quad]
            flat[LANES * quad + 2] = words2[quad]
            flat[LANES * quad + 3] = words3[quad]
        for j in range(outputs):
            code[j] = _stochastic_code(values[j] * inverse, flat[j])


@njit(nogil=True, cache=True)
def _scale_token(values, factor, inverses):
    for j in range(values.shape[0]):
        # An inverse of 0 marks a column that is not finite.
        value = values[j] * factor if inverses[j] > _ZERO else _ZERO
        values[j] = value * inverses[j]


@njit(nogil=True, cache=True)
def _column_words(words, bits, first, quads, quad, seed):
    """Random words of four neighbouring tokens in each column from `first` on."""
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    for j in range(bits.shape[0]):
        counter = _u64(first + j) * quads + quad
        w0, w1, w2, w3 = philox(counter, seed, _u64(bits[j]), _COLUMNS, _WEIGHT)
        words0[j], words1[j], words2[j], words3[j] = w0, w1, w2, w3


@njit(nogil=True, cache=True)
def _round_columns(gradient, factors, maxima, inverses, packed_codes, seed, start, stop):
    tokens, outputs = gradient.shape
    quads = _u64((tokens + LANES - 1) // LANES)
    values = np.zeros((LANES, CHUNK), np.float32)
    words = np.empty((LANES, CHUNK), np.uint32)
    packed = np.empty((BLOCK // LANES, CHUNK), np.uint32)
    for block in range(start, stop):
        first_token, last_token = block * BLOCK, min((block + 1) * BLOCK, tokens)
        first_quad = first_token // LANES
        n_quads = (last_token - first_token + LANES - 1) // LANES
        for first in range(0, outputs, CHUNK):
            last = min(first + CHUNK, outputs)
            width = last - first
            bits, inverse = maxima[first:last], inverses[first:last]
            for token in range(first_token, last_token, LANES):
                for lane in range(min(LANES, last_token - token)):
                    load_row(gradient[token + lane, first:last], values[lane, :width])
                    _scale_token(values[lane, :width], factors[token + lane], inverse)
                _column_words(words, bits, first, quads, _u64(token // LANES), seed)
                codes_of_quad = packed[(token - first_token) // LANES, :width]
                _round_quads(values[0], values[1], values[2], values[3], words, codes_of_quad)
            for j in range(width):
                column_codes = packed_codes[first + j]
                for quad in range(n_quads):
                    column_codes[first_quad + quad] = packed[quad, j]


def _by_rows(gradient: Tensor, factors: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    tokens, outputs = gradient.shape
    codes, scales = torch.empty(tokens, outputs, dtype=torch.int8), torch.empty(tokens, 1)
    others = (factors.view(-1), codes, scales.view(-1))
    arrays = [float_array(gradient), *(tensor.numpy() for tensor in others)]
    for_each_row_range(
        lambda start, stop: _quantize_rows(*arrays, _u64(seed), start, stop),
        n_rows=tokens,
        row_elements=outputs,
    )
    return codes, scales


def _by_columns(gradient: Tensor, factors: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    tokens, outputs = gradient.shape
    maxima = scaled_column_absmax(gradient, factors.view(-1))
    scales = absmax_scale(maxima)
    inverses = torch.where(maxima.isfinite(), torch.ones_like(scales) / scales, 0.0)
    quads = torch.empty(outputs, -(-tokens // LANES), dtype=torch.uint32)
    others = (factors.view(-1), maxima.view(torch.int32), inverses, quads)
    arrays = [float_array(gradient), *(tensor.numpy() for tensor in others)]
    for_each_row_range(
        lambda start, stop: _round_columns(*arrays, _u64(seed), start, stop),
        n_rows=-(-tokens // BLOCK),
        row_elements=BLOCK * outputs,
    )
    codes = quads.view(torch.int8)[:, :tokens].contiguous()
    return codes, scales.view(-1, 1)


def quantize_gradient(
    gradient: Tensor,
    row_factors: Tensor | None,
    column_factors: Tensor | None,
    *,
    stochastic: bool,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not stochastic:  # for ablation only
        return reference.quantize_gradient(
            gradient, row_factors, column_factors, stochastic=False, seed=seed
        )
    empty = torch.empty(0, 0, dtype=torch.int8), torch.empty(0, 1)
    rows = empty if row_factors is None else _by_rows(gradient, row_factors, seed)
    columns = empty if column_factors is None else _by_columns(gradient, column_factors, seed)
    return (*rows, *columns)
