"""`GradientStack`: last in, first out, and nothing kept alive."""

import gc
import weakref

import pytest
import torch
from torch.nn import Parameter

from qft_hf.gradients import GradientStack


def parameter_with_gradient(value: float = 1.0) -> Parameter:
    parameter = Parameter(torch.zeros(2))
    parameter.grad = torch.full((2,), value)
    return parameter


def filled(*parameters: Parameter) -> GradientStack:
    stack = GradientStack()
    for parameter in parameters:
        stack.push(parameter)
    return stack


def test_the_newest_comes_first_and_its_gradient_is_handed_over():
    parameters = [parameter_with_gradient(value) for value in (1.0, 2.0, 3.0)]
    stack = filled(*parameters)

    for left in (2, 1, 0):
        parameter, gradient = stack.pop()
        assert parameter is parameters[left]
        assert gradient[0] == left + 1
        assert parameter.grad is None
        assert len(stack) == left


def test_a_popped_gradient_is_freed_at_once():
    parameters = [parameter_with_gradient() for _ in range(2)]
    stack = filled(*parameters)
    alive = weakref.ref(parameters[1].grad)

    stack.pop()

    gc.collect()
    assert alive() is None
    assert parameters[0].grad is not None


def test_accumulating_pushes_once():
    first, second = parameter_with_gradient(), parameter_with_gradient()
    stack = filled(first, second, first, first)

    assert len(stack) == 2
    assert stack.pop()[0] is second
    assert stack.pop()[0] is first


def test_a_gradient_dropped_meanwhile_is_passed_over():
    parameters = [parameter_with_gradient() for _ in range(3)]
    stack = filled(*parameters)
    parameters[2].grad = parameters[0].grad = None

    assert len(stack) == 1
    assert stack.pop()[0] is parameters[1]
    assert len(stack) == 0


def test_an_empty_stack_says_why():
    with pytest.raises(IndexError, match="no backward pass since the last step"):
        GradientStack().pop()
    dropped = parameter_with_gradient()
    stack = filled(dropped)
    dropped.grad = None
    with pytest.raises(IndexError, match="no backward pass since the last step"):
        stack.pop()


def test_drain_pops_until_nothing_waits():
    parameters = [parameter_with_gradient() for _ in range(4)]
    stack = filled(*parameters)

    drained = [parameter for parameter, _ in stack.drain()]

    assert all(a is b for a, b in zip(drained, reversed(parameters), strict=True))
    assert list(stack.drain()) == []


def test_clear_forgets_the_order_and_keeps_the_gradients():
    parameter = parameter_with_gradient()
    stack = filled(parameter)

    stack.clear()

    assert len(stack) == 0
    assert parameter.grad is not None


def test_parameters_that_compare_equal_are_different():
    """A set of tensors would compare values; the record goes by identity."""
    stack = filled(parameter_with_gradient(), parameter_with_gradient())

    assert len(stack) == 2
