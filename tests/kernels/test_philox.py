"""Words equal Philox 4x32-7, in any order, and those of an element are spread over steps."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from numba import njit

from qft_hf.kernels.cpu.philox import philox as cpu_philox
from qft_hf.kernels.cpu.philox import rounding_row
from qft_hf.kernels.philox import (
    MOMENTUM,
    STEP,
    WEIGHT,
    philox,
    random_words,
    rounding_words,
    weight_uniform,
)
from tests.tolerances import assert_same_bits

CPU = torch.device("cpu")
DIGITS_OF_PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0]


def exact_philox(counter: list[int], key: list[int], *, rounds: int = 7) -> list[int]:
    """Salmon et al. 2011, section 4.3, in Python integers: independent of the package."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (7, [0] * 4, [0] * 2, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (10, [0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (7, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (10, [0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (7, DIGITS_OF_PI[:4], DIGITS_OF_PI[4:], "4dfccaba 190a87f0 c47362ba b6b5242a"),
        (10, DIGITS_OF_PI[:4], DIGITS_OF_PI[4:], "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_integer_version_gives_the_published_vectors(rounds, counter, key, words):
    """Random123's kat_vectors check the integer version, to which the package is compared."""
    assert exact_philox(counter, key, rounds=rounds) == [int(word, 16) for word in words.split()]


def test_zero_counter_and_key_give_the_published_words():
    words = philox(torch.zeros(1, dtype=torch.int64), seed=0, step=0, stream=0)

    assert words.tolist() == [[0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]]


@pytest.mark.parametrize(
    ("seed", "step", "stream"),
    [
        (0, 1, 0),
        (0, 0, 1),
        (1, 0, 0),
        (0x299F31D0A4093822, 0x85A308D3, 0x13198A2E),
        (2**63 - 1, 2**32 - 1, 2**32 - 1),  # the largest of everything
        (5, 2**32 + 6, 2**32 + 7),  # step and stream wrap
    ],
)
@pytest.mark.parametrize("purpose", [0, 1])
def test_every_word_equals_the_integer_version(seed, step, stream, purpose):
    counters = [0, 1, 2, 3, 1000, 2**31 - 1, 2**32 - 1]

    words = philox(torch.tensor(counters), seed=seed, step=step, stream=stream, purpose=purpose)

    key = [seed % 2**32, seed // 2**32]
    expected = [exact_philox([c, step % 2**32, stream % 2**32, purpose], key) for c in counters]
    assert words.tolist() == expected


@njit
def _cpu_words(counters, seed, step, stream, purpose):
    words = np.empty((len(counters), 4), np.uint64)
    for i in range(len(counters)):
        words[i] = cpu_philox(counters[i], seed, step, stream, purpose)
    return words


@pytest.mark.parametrize("purpose", [0, 1])
def test_the_cpu_twin_gives_the_same_words(purpose):
    counters = torch.tensor([0, 1, 77, 2**31 - 1, 2**32 - 1])
    seed, step, stream = 2**63 - 12345, 2**32 - 2, 2**32 + 9

    words = _cpu_words(
        counters.numpy().astype(np.uint64),
        np.uint64(seed),
        np.uint64(step),
        np.uint64(stream),
        np.uint64(purpose),
    )

    assert_same_bits(
        torch.from_numpy(words.astype(np.int64)),
        philox(counters, seed=seed, step=step, stream=stream, purpose=purpose),
    )


@pytest.mark.parametrize("columns", [1, 2, 3, 4, 5, 7, 8, 127])
def test_words_of_a_matrix_follow_the_element(columns):
    """Four neighbors share a counter and use its words in order; each row starts a new counter."""
    words = random_words(slice(0, 6), columns, seed=9, step=2, stream=4, device=CPU)

    quads = -(-columns // 4)
    for row, column in [(0, 0), (1, 0), (5, columns - 1), (3, columns // 2)]:
        expected = exact_philox([row * quads + column // 4, 2, 4, 0], [9, 0])[column % 4]
        assert words[row, column] == expected


@pytest.mark.parametrize("columns", [3, 6, 16])
def test_words_do_not_depend_on_how_rows_are_cut(columns):
    whole = random_words(slice(0, 11), columns, seed=1, step=2, stream=3, device=CPU)

    for edges in ([0, 1, 11], [0, 5, 6, 11], list(range(12))):
        parts = [
            random_words(slice(a, b), columns, seed=1, step=2, stream=3, device=CPU)
            for a, b in pairwise(edges)
        ]
        assert_same_bits(torch.cat(parts), whole)


def test_seed_step_and_stream_each_change_nearly_every_word():
    first = random_words(slice(0, 20), 50, seed=1, step=1, stream=1, device=CPU)

    for other in ({"seed": 2}, {"seed": 1 + 2**32}, {"step": 2}, {"stream": 2}):
        arguments = {"seed": 1, "step": 1, "stream": 1, **other}
        words = random_words(slice(0, 20), 50, device=CPU, **arguments)
        assert int((words == first).sum()) == 0  # 1000 words of 32 bits: a match is a 2e-7 event


# --- words of updates -----------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", [WEIGHT, MOMENTUM])
@pytest.mark.parametrize("step", [0, 1, 1000, 2**32 - 1, 2**32 + 6, 2**62])
@pytest.mark.parametrize("columns", [1, 6, 127])
def test_each_step_adds_a_constant_to_the_word_of_an_element(columns, step, purpose):
    seed, stream = 2**63 - 12345, 4
    words = rounding_words(
        slice(2, 6), columns, seed=seed, step=step, stream=stream, purpose=purpose, device=CPU
    )

    key, quads = [seed % 2**32, seed // 2**32], -(-columns // 4)
    for row, column in [(0, 0), (1, 0), (3, columns - 1), (2, columns // 2)]:
        counter = [(2 + row) * quads + column // 4, 0, stream, purpose]
        first = exact_philox(counter, key)[column % 4]
        assert words[row, column] == (first + step * 0x9E9E4C07) % 2**32

    twin = np.empty((4, quads), np.uint32)
    for row in range(4):
        rounding_row(twin, 2 + row, *map(np.uint64, (seed, step, stream, purpose)))
        assert twin.T.flatten()[:columns].tolist() == words[row].tolist()


@pytest.mark.parametrize("bits", [32, 24, 16])
def test_no_bits_of_the_constant_are_near_a_fraction_with_a_small_denominator(bits):
    """In integers: the distance of `q * STEP / 2**bits` to the nearest integer is over 0.2 / q."""
    for q in range(1, 4097):
        distance = q * STEP % 2**bits
        assert 5 * q * min(distance, 2**bits - distance) > 2**bits


def test_the_words_of_an_element_are_spread_evenly_over_1000_steps():
    """For each of 1,000 elements, `1000 * share` of the words are below `share`, to within 5."""
    shape = dict(rows=slice(0, 20), columns=50, seed=1, stream=3, device=CPU)
    words = torch.stack([rounding_words(step=step, **shape) for step in range(1, 1001)])
    independent = torch.stack([random_words(step=step, **shape) for step in range(1, 1001)])

    for bits in (32, 24, 16):
        for share in (0.001, 0.03, 0.382, 0.5, 0.9):
            below = (words % 2**bits < share * 2**bits).sum(0)
            assert (below - 1000 * share).abs().max() <= 5
        below = (independent % 2**bits < share * 2**bits).sum(0)
        assert (below - 1000 * share).abs().max() > 10  # a control: these would not pass


def test_the_words_of_a_step_are_random():
    """In each step they have the moments of uniform words, and neighbors are independent."""
    for step in (0, 7, 12345):
        words = rounding_words(slice(0, 100), 1000, seed=3, step=step, stream=1, device=CPU)
        uniform = words.double() / 2**32 - 0.5
        assert abs(uniform.mean()) <= 5 * (1 / 12 / 100_000) ** 0.5
        assert abs(uniform.square().mean() - 1 / 12) <= 5 * (1 / 180 / 100_000) ** 0.5
        for other in (uniform.roll(1, 0), uniform.roll(1, 1), uniform.roll(4, 1)):
            assert abs((uniform * other).mean()) <= 5 / 12 / 100_000**0.5


def test_uniforms_are_the_high_24_bits_and_below_one():
    words = torch.tensor([0, 255, 256, 2**31, 2**32 - 1])

    uniform = weight_uniform(words)

    assert uniform.dtype == torch.float32
    assert uniform.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24]
