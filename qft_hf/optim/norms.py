"""Norms of many gradients at once, quantized or float, and a check that all are finite."""

import torch
from torch import Tensor
from torch.nn import Parameter

from ..kernels.gradients import sum_in_order
from ..quant import Int8Gradient
from .flow import RunPart, run_directly


def squares_of(gradient: Tensor) -> Tensor:
    """Return squares that add up to the squared norm of a gradient; one kernel if it is INT8.

    Returns:
        fp64: `[rows]` for an INT8 gradient, otherwise a scalar. `total_square` adds up all.
    """
    if isinstance(gradient, Int8Gradient):
        return gradient.squared_norms()
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float32).double()
    # Squares overflow in FP32 from 1e19 on.
    wide = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return torch.where(norm.isinf(), wide, norm).square()


def squares_of_floats(gradients: list[Tensor]) -> list[Tensor]:
    """Return squared norms of many float gradients, by few operators: fp64 `[n]` per device."""
    squares = []
    for members in by_device(gradients).values():
        norm, wide = (
            torch.stack(torch._foreach_norm(members, 2, dtype=dtype)).double()
            for dtype in (torch.float32, torch.float64)
        )
        squares.append(torch.where(norm.isinf(), wide, norm).square())
    return squares


def clip_(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Clip gradients by their global norm, as `torch.nn.utils.clip_grad_norm_` does, in place.

    A GPU gets one operation per INT8 gradient and a few for all, instead of eight per gradient.

    Args:
        gradients: Float or INT8.
        max_norm: What a larger norm is scaled down to.

    Returns:
        The norm before clipping: fp32.
    """
    stored = [gradient for gradient in gradients if isinstance(gradient, Int8Gradient)]
    floats = [gradient for gradient in gradients if not isinstance(gradient, Int8Gradient)]
    norm = total_norm([squares_of(gradient) for gradient in stored] + squares_of_floats(floats))
    factor = clipping_factor(norm, max_norm)
    own_rows = [gradient for gradient in stored if gradient.own_rows is not None]
    scales = [gradient.scales for gradient in stored if gradient.own_rows is None]
    for together in (floats, scales):  # in one list, mixed dtypes are scaled one by one
        for device, members in by_device(together).items():
            torch._foreach_mul_(members, factor.to(device))
    for gradient in own_rows:
        gradient.mul_(factor.to(gradient.device))
    return norm


def clipping_factor(norm: Tensor, max_norm: float) -> Tensor:
    """Return the factor that clips by this norm, as in `torch.nn.utils.clip_grad_norm_`."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def by_device(gradients: list[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Group gradients by device."""
    found: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        found.setdefault(gradient.device, []).append(gradient)
    return found


def total_square(squares: list[Tensor]) -> Tensor:
    """Return the squared norm of all gradients, from the results of `squares_of`: fp64."""
    return sum_in_order(joined(squares))


def joined(squares: list[Tensor]) -> Tensor:
    """Join all squares into one tensor on the device of the first: fp64 `[n]`."""
    device = squares[0].device
    here = [square if square.device == device else square.to(device) for square in squares]
    return torch.cat([square if square.ndim else square.view(1) for square in here])


def total_norm(squares: list[Tensor]) -> Tensor:
    """Return the norm of gradients with these squares: fp32."""
    return total_square(squares).sqrt().float()


def are_finite(parameters: list[Parameter], run_part: RunPart = run_directly) -> bool:
    """Return whether all gradients are finite, with one transfer to the host."""
    gradients = [g for p in parameters if (g := p.grad) is not None and g.numel()]
    tensors = [g.finite_probe if isinstance(g, Int8Gradient) else g for g in gradients]
    if not tensors:
        return True

    def largest() -> Tensor:
        """Return the largest magnitude, which is NaN or infinite if any value is."""
        return torch.nn.utils.get_total_norm(tensors, norm_type=float("inf"))

    return bool(run_part("largest", largest).isfinite())
