"""Random words from Philox 4x32-7, a counter-based generator. This file is the specification.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 4.3 and table 2.
The same counter and key give the same four words on every device and backend, so random numbers
need no state, no order of evaluation and no saving. Seven rounds are the fewest that pass BigCrush.
The usual ten add a margin, but then random words take half of the time in which a CPU rounds a
gradient.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
ROUNDS = 7
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)

LANES = 4  # words that one counter yields

# Word 3 of the counter: what its random numbers round.
WEIGHT, MOMENTUM = 0, 1

# What a step adds to the random word of an element; see `rounding_words`. As fractions, the word,
# its low 24 bits and its low 16 bits are 0.620, 0.618 and 0.297. Like the golden ratio, 0.618, none
# is close to a fraction with a small denominator: |STEP / 2**bits - p / q| > 0.2 / q**2 for every
# q up to 4096. The golden ratio itself has poor low bits.
STEP = 0x9E9E4C07


def philox(
    counter: Tensor, *, seed: int, step: int | Tensor, stream: int, purpose: int = WEIGHT
) -> Tensor:
    """Four random 32-bit words for each counter.

    Args:
        counter: int64 `[n]`, values in [0, 2**32): word 0 of the 128-bit counter.
        seed: The 64-bit key.
        step: Word 1 of the counter, one number or int64 `[n]`; taken modulo 2**32.
        stream: Word 2 of the counter, modulo 2**32.
        purpose: Word 3 of the counter.

    Returns:
        int64 `[n, 4]` with values in [0, 2**32).
    """
    # Words are int64, in which a product of two words wraps modulo 2**64 and keeps its bits. Shifts
    # are arithmetic, so the high half is masked after the exclusive-ors that follow.
    even = torch.stack((counter, torch.full_like(counter, stream & MASK)))  # words 0 and 2
    odd = torch.empty_like(even)  # words 1 and 3
    odd[0], odd[1] = step & MASK, purpose
    multipliers = counter.new_tensor(MULTIPLIERS)[:, None]
    keys = [seed & MASK, (seed >> 32) & MASK]
    for _ in range(ROUNDS):
        product = even * multipliers
        # New word 0 mixes the high half of word 2's product, new word 2 that of word 0's.
        even = (product >> 32).flip(0).bitwise_xor_(odd)
        even[0].bitwise_xor_(keys[0])
        even[1].bitwise_xor_(keys[1])
        even.bitwise_and_(MASK)
        odd = product.flip(0).bitwise_and_(MASK)
        keys = [(key + more) & MASK for key, more in zip(keys, KEY_INCREMENTS, strict=True)]
    return torch.stack((even[0], odd[0], even[1], odd[1]), dim=1)


def random_words(
    rows: slice,
    columns: int,
    *,
    seed: int,
    step: int | Tensor,
    stream: int,
    purpose: int = WEIGHT,
    device: torch.device,
) -> Tensor:
    """One random 32-bit word for each element of rows `rows` of a matrix.

    Four neighboring columns share a counter, `row * ceil(columns / 4) + column // 4`, and use its
    four words in order. `step` is one number, or an int64 tensor with one for each of the rows.

    Returns:
        int64 `[rows.stop - rows.start, columns]` with values in [0, 2**32).
    """
    quads = -(-columns // LANES)
    counter = torch.arange(rows.start * quads, rows.stop * quads, device=device)
    if isinstance(step, Tensor):
        step = step.repeat_interleave(quads)
    words = philox(counter, seed=seed, step=step, stream=stream, purpose=purpose)
    return words.view(rows.stop - rows.start, quads * LANES)[:, :columns]


def rounding_words(
    rows: slice,
    columns: int,
    *,
    seed: int,
    step: int,
    stream: int,
    purpose: int = WEIGHT,
    device: torch.device,
) -> Tensor:
    """One word for each element of rows `rows` of a matrix that step `step` rounds.

    An element has a random word of its own, to which each step adds `STEP`, modulo 2**32. So its
    words are spread evenly over the steps as well: in n steps, an element whose exact update is a
    constant p of a code goes up p * n times to within a few, whereas independent words would be off
    by sqrt(p * (1 - p) * n). Each word alone is uniform, and rounding with it is unbiased.

    Returns:
        int64 `[rows.stop - rows.start, columns]` with values in [0, 2**32).

    Source:
        Weyl 1916, "Über die Gleichverteilung von Zahlen mod. Eins": multiples of an irrational
        number are spread evenly.
    """
    words = random_words(
        rows, columns, seed=seed, step=0, stream=stream, purpose=purpose, device=device
    )
    return words.add_(step * STEP & MASK).bitwise_and_(MASK)


def weight_uniform(words: Tensor) -> Tensor:
    """Return FP32 uniforms in [0, 1), which round a weight, from the high 24 bits of each word.

    FP32 holds 24 bits exactly. With 16 bits an update of 1e-4 of a quantum, the usual size of
    weight decay, would be off by up to 7 %.
    """
    return (words >> 8).float().mul_(2.0**-24)
