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
from .philox import philox, weight_uniform
from .quantize import largest_magnitude
from .threads import for_each_row_range

_f32, _u64 = np.float32, np.uint64
_QMAX, _TINY, _PER_QMAX = _f32(QMAX), _f32(TINY), _f32(1.0 / QMAX)
_ZERO, _ONE = _f32(0.0), _f32(1.0)
_MAGNITUDE = np.int32(0x7FFFFFFF)  # FP32 without its sign: as an integer it orders magnitudes
_INFINITY = np.int32(0x7F800000)  # and every NaN lies above this
_ROWS, _COLUMNS, _WEIGHT = _u64(ROWS), _u64(COLUMNS), _u64(WEIGHT)

BLOCK = 64  # tokens; a multiple of LANES
CHUNK = 256  # outputs whose transposed codes are written together: they stay in the cache


@njit(inline="always")
def _stochastic_code(value, word):
    """Round up with the probability of the fraction; twin: `stochastic_codes`."""
    whole = np.floor(value)
    value = whole + _f32((value - whole) + weight_uniform(word) >= _ONE)
    return np.int8(min(max(value, -_QMAX), _QMAX))


@njit(nogil=True, error_model="numpy", cache=True)
def _quantize_rows(gradient, factors, codes, scales, seed, start, stop):
    outputs = gradient.shape[1]
    quads = (outputs + LANES - 1) // LANES
    values = np.empty(outputs, np.float32)
    words = np.empty((LANES, quads), np.uint32)
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    flat = np.empty(quads * LANES, np.uint32)
    for token in range(start, stop):
        row, code = gradient[token], codes[token]
        for j in range(outputs):
            values[j] = row[j] * factors[j]
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
        base = _u64(token) * _u64(quads)
        for quad in range(quads):
            w0, w1, w2, w3 = philox(base + _u64(quad), seed, _u64(bits), _ROWS, _WEIGHT)
            words0[quad], words1[quad], words2[quad], words3[quad] = w0, w1, w2, w3
        for quad in range(quads):
            flat[LANES * quad] = words0[quad]
            flat[LANES * quad + 1] = words1[quad]
            flat[LANES * quad + 2] = words2[quad]
            flat[LANES * quad + 3] = words3[quad]
        for j in range(outputs):
            code[j] = _stochastic_code(values[j] * inverse, flat[j])


@njit(nogil=True, cache=True)
def _column_maxima(gradient, factors, maxima, start, stop):
    """Bits of the largest magnitude of each column within each block of tokens."""
    tokens, outputs = gradient.shape
    values = np.empty(outputs, np.float32)
    bits = values.view(np.int32)
    for block in range(start, stop):
        largest = maxima[block]
        largest[:] = 0
        for token in range(block * BLOCK, min((block + 1) * BLOCK, tokens)):
            row, factor = gradient[token], factors[token]
            for j in range(outputs):
                values[j] = row[j] * factor
            for j in range(outputs):
                largest[j] = max(largest[j], bits[j] & _MAGNITUDE)


# Functions of their own: in one body with the loops around them LLVM does not vectorize these two.
@njit(nogil=True, cache=True)
def _column_words(words0, words1, words2, words3, bits, first, quads, quad, seed):
    """Random words of four neighbouring tokens in each column from `first` on."""
    for j in range(bits.shape[0]):
        counter = _u64(first + j) * quads + quad
        w0, w1, w2, w3 = philox(counter, seed, _u64(bits[j]), _COLUMNS, _WEIGHT)
        words0[j], words1[j], words2[j], words3[j] = w0, w1, w2, w3


@njit(nogil=True, cache=True)
def _round_token(row, factor, inverse, words, codes):
    for j in range(row.shape[0]):
        # An inverse of 0 marks a column that is not finite.
        value = row[j] * factor if inverse[j] > _ZERO else _ZERO
        codes[j] = _stochastic_code(value * inverse[j], words[j])


@njit(nogil=True, cache=True)
def _round_columns(gradient, factors, maxima, inverses, codes, seed, start, stop):
    tokens, outputs = gradient.shape
    quads = _u64((tokens + LANES - 1) // LANES)
    words = np.empty((LANES, CHUNK), np.uint32)
    words0, words1, words2, words3 = words[0], words[1], words[2], words[3]
    tile = np.empty((BLOCK, CHUNK), np.int8)
    for block in range(start, stop):
        first_token, last_token = block * BLOCK, min((block + 1) * BLOCK, tokens)
        for first in range(0, outputs, CHUNK):
            last = min(first + CHUNK, outputs)
            inverse, bits = inverses[first:last], maxima[first:last]
            for token in range(first_token, last_token):
                lane = token % LANES
                if lane == 0:
                    quad = _u64(token // LANES)
                    _column_words(words0, words1, words2, words3, bits, first, quads, quad, seed)
                row, code = gradient[token, first:last], tile[token - first_token]
                _round_token(row, factors[token], inverse, words[lane], code)
            for j in range(last - first):
                code = codes[first + j, first_token:last_token]
                for i in range(last_token - first_token):
                    code[i] = tile[i, j]


def _by_rows(gradient: Tensor, factors: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    tokens, outputs = gradient.shape
    codes, scales = torch.empty(tokens, outputs, dtype=torch.int8), torch.empty(tokens, 1)
    arrays = [tensor.numpy() for tensor in (gradient, factors.view(-1), codes, scales.view(-1))]
    for_each_row_range(
        lambda start, stop: _quantize_rows(*arrays, _u64(seed), start, stop),
        n_rows=tokens,
        row_elements=outputs,
    )
    return codes, scales


def _by_columns(gradient: Tensor, factors: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    tokens, outputs = gradient.shape
    n_blocks = -(-tokens // BLOCK)
    block_maxima = torch.empty(n_blocks, outputs, dtype=torch.int32)
    blocks = {"n_rows": n_blocks, "row_elements": BLOCK * outputs}
    inputs = [tensor.numpy() for tensor in (gradient, factors.view(-1))]
    for_each_row_range(
        lambda start, stop: _column_maxima(*inputs, block_maxima.numpy(), start, stop), **blocks
    )
    maxima = block_maxima.amax(dim=0)
    scales = absmax_scale(maxima.view(torch.float32))
    inverses = torch.where(maxima < int(_INFINITY), torch.ones_like(scales) / scales, 0.0)
    codes = torch.empty(outputs, tokens, dtype=torch.int8)
    arrays = [tensor.numpy() for tensor in (maxima, inverses, codes)]
    for_each_row_range(
        lambda start, stop: _round_columns(*inputs, *arrays, _u64(seed), start, stop), **blocks
    )
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
    gradient = gradient.float()
    empty = torch.empty(0, 0, dtype=torch.int8), torch.empty(0, 1)
    rows = empty if row_factors is None else _by_rows(gradient, row_factors, seed)
    columns = empty if column_factors is None else _by_columns(gradient, column_factors, seed)
    return (*rows, *columns)
