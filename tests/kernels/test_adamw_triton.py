"""The AdamW step in Triton against the reference, bit for bit; run as `test_triton.py` is."""

import pytest
import torch
from torch import Tensor

from qft_hf import kernels
from qft_hf.kernels import Moments, Weight, backend
from tests.kernels.devices import DEVICE, MARKS
from tests.kernels.test_adamw import ROUNDING, RULE, coded, make_moments, make_weight
from tests.tolerances import assert_same_bits

pytestmark = MARKS

GUARD = 64  # elements before and after a tensor that no kernel may write

# One column; odd; one over a group; several groups; more groups than a tile; a group beyond a tile.
CASES = [
    ((1, 1), 256, None),
    ((3, 33), 256, 40),
    ((3, 33), 10, None),
    ((2, 257), 256, None),
    ((3, 1100), 256, 40),
    ((1, 8500), 256, None),
    ((1, 8500), 5000, None),
]


def guarded(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of `tensor` inside a larger buffer, and that buffer."""
    buffer = torch.full((tensor.numel() + 2 * GUARD,), 77, dtype=tensor.dtype, device=DEVICE)
    inner = buffer[GUARD : GUARD + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner, buffer


@pytest.mark.parametrize("changes", [{}, {"maximize": True, "stochastic": False}], ids=str)
@pytest.mark.parametrize(("shape", "state_group_size", "group_size"), CASES, ids=str)
def test_adamw_step(shape, state_group_size, group_size, changes, monkeypatch):
    """Step tile by tile inside guard regions, with gradients of all magnitudes, zeros included."""
    monkeypatch.setattr("qft_hf.layout.TILE_ELEMENTS", 2 * shape[1])
    weight, moments = make_weight(shape, group_size, 3), make_moments(shape, state_group_size)
    tensors = [tensor.to(DEVICE) for tensor in (*weight.tensors, *moments.tensors)]
    states = {"reference": [(tensor.clone(), None) for tensor in tensors]}
    states["triton"] = [guarded(tensor) for tensor in tensors]
    for name, pairs in states.items():
        inner = [tensor for tensor, _ in pairs]
        weight = Weight(*inner[:4], group_size)
        moments = Moments(*inner[4:], state_group_size)
        for step, size in enumerate([1e-4, 1e-20, 1e20, 0.0], start=1):
            draw = torch.Generator().manual_seed(step)
            x = torch.randn(shape, generator=draw)
            x *= size * torch.exp(3 * torch.randn(shape, generator=draw))
            with backend.use(name):
                kernels.adamw_step_(
                    weight, moments, coded(x.to(DEVICE), state_group_size),
                    rule=RULE._replace(lr=[1e-3, 0.3][step % 2],
                                       maximize=changes.get("maximize", False)),
                    rounding=ROUNDING._replace(step=step, first_row=2,
                                               stochastic=changes.get("stochastic", True)),
                )  # fmt: skip
    for (actual, buffer), (expected, _) in zip(*reversed(states.values()), strict=True):
        assert_same_bits(actual, expected)
        assert (buffer[:GUARD] == 77).all()
        assert (buffer[-GUARD:] == 77).all()
