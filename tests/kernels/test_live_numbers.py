"""A step whose numbers are in memory equals a step with the same numbers as arguments."""

import pytest
import torch

from qft_hf import kernels
from tests.kernels.backends import cpu, reference
from tests.kernels.live_steps import NUMBERS, OTHERS, STEPS, in_memory
from tests.tolerances import assert_same_bits


@pytest.mark.parametrize("backend", [reference, cpu, kernels], ids=["reference", "cpu", "chosen"])
@pytest.mark.parametrize("name", STEPS)
def test_they_take_the_place_of_those_that_are_given(name, backend):
    """The second step's numbers are written to the same memory, as before a graph's replay."""
    (expected, given), (actual, read) = STEPS[name]("cpu"), STEPS[name]("cpu")
    live = in_memory(name, NUMBERS[0], "cpu")
    for numbers in NUMBERS:
        live.copy_(in_memory(name, numbers, "cpu"))
        before = [tensor.clone() for tensor in actual]
        given(reference, **numbers)

        read(backend, live=live, **OTHERS)

        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)
        assert any(not torch.equal(*pair) for pair in zip(actual, before, strict=True))


DAMAGED = {
    "of fp32": lambda live: live.float(),
    "too few": lambda live: live[..., :-1].contiguous(),
    "not contiguous": lambda live: live.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("name", STEPS)
def test_those_of_another_form_are_refused(name, damage):
    tensors, run = STEPS[name]("cpu")
    before = [tensor.clone() for tensor in tensors]
    with pytest.raises(ValueError, match=r"live must be float64 numbers of shape .* on cpu, begin"):
        run(kernels, live=DAMAGED[damage](in_memory(name, NUMBERS[0], "cpu")), **OTHERS)
    for one, other in zip(tensors, before, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("name", ["floats", "lion, floats"])
def test_a_parameter_without_a_row_of_numbers_is_refused(name):
    _, run = STEPS[name]("cpu")
    with pytest.raises(ValueError, match=r"live must be float64 numbers of shape \(14, 8\)"):
        run(kernels, live=in_memory(name, NUMBERS[0], "cpu")[:-1], **OTHERS)
