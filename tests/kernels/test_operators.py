"""The operators as PyTorch sees them: schema, fake results, functionalization, compilation."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qft_hf import kernels
from tests.kernels.states import ARGUMENTS, float_arguments, make_state, random
from tests.tolerances import assert_same_bits


def quantized(group_size: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.quantize(random((5, 300), None), group_size=group_size)


def cases() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of each operator."""
    state = make_state((5, 300), group_size=32, outlier_fraction=0.02)
    outliers = {
        "outlier_values": state.outlier_values,
        "outlier_columns": state.outlier_columns,
        "dtype": torch.bfloat16,
    }
    codes, scales = kernels.quantize(random((5, 300), None), group_size=None)
    floats = (
        [torch.linspace(-1, 1, n).bfloat16() for n in (30, 7)],
        *([torch.full((n,), value) for n in (30, 7)] for value in (0.0, 1.0)),
    )
    rows = torch.tensor([4, 0, 4, 1])
    sgd = {name: value for name, value in ARGUMENTS.items() if not name.startswith("beta")}
    sgd_floats = float_arguments(2)
    del sgd_floats["beta1"], sgd_floats["beta2"]
    weight_and_gradient = (*state.arguments()[:4], *state.arguments()[6:])
    return {
        "accumulate_": ((*quantized(), *quantized(), 256), {}),
        "column_absmax": ((random((5, 300), None).bfloat16(),), {}),
        "dequantize": ((state.codes, state.scales, 32), {**outliers, "rows": rows}),
        "dequantized_matmul": (
            (random((3, 300), None).bfloat16(), state.codes, state.scales, 32),
            {
                "outlier_values": state.outlier_values,
                "outlier_columns": state.outlier_columns,
                "bias": torch.ones(5),
            },
        ),
        "embedding_gradient_": (
            (*quantized(), torch.tensor([3, 0, 3]), torch.ones(3, 300)),
            {"group_size": 256, "padding_idx": 0},
        ),
        "int8_matmul": (
            (codes, codes.t(), scales, scales),
            {
                "bias": torch.ones(5),
                "columns": torch.tensor([3]),
                "values": torch.ones(5, 1),
                "dtype": torch.bfloat16,
            },
        ),
        "lion_step_": (state.arguments(), {"group_size": 32, "state_group_size": 256, **ARGUMENTS}),
        "lion_step_floats_": (floats, float_arguments(2)),
        "quantize": ((random((5, 300), None), 32, torch.arange(300) % 7 == 0), {}),
        "quantize_and_lion_step_": (
            (*state.arguments()[:-2], random((5, 300), None)),
            {"group_size": 32, "state_group_size": 256, "factor": torch.tensor(0.5), "first_row": 0}
            | ARGUMENTS,
        ),
        "quantize_gradient": (
            (random((300, 5), None), scales, None),
            {"stochastic": True, "seed": 3},
        ),
        "requantized_matmul": (
            (codes, codes.t(), scales),
            {"columns": torch.tensor([3]), "values": torch.ones(5, 1), "group_size": 2},
        ),
        "sgd_step_": (weight_and_gradient, {"group_size": 32, "state_group_size": 256, **sgd}),
        "sgd_step_floats_": ((floats[0], floats[2]), sgd_floats),
        "squared_norm": ((*quantized(), 256), {}),
    }


def test_every_operator_has_a_case():
    assert set(cases()) == set(kernels.__all__)


@pytest.mark.parametrize("name", kernels.__all__)
def test_opcheck(name):
    arguments, options = cases()[name]

    results = torch.library.opcheck(getattr(torch.ops.qft_hf, name).default, arguments, options)

    assert set(results.values()) == {"SUCCESS"}


def test_an_operator_compiles_into_one_graph():
    """Written tensors stay the same tensors, and what follows sees the new values."""
    eager, compiled = (make_state((5, 300), group_size=32, outlier_fraction=0.02) for _ in range(2))

    def step(*tensors: torch.Tensor) -> torch.Tensor:
        kernels.lion_step_(*tensors, group_size=32, state_group_size=256, **ARGUMENTS)
        return tensors[0].sum()

    total = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled.arguments())

    assert_same_bits(total, step(*eager.arguments()))
    for name, tensor in eager.tensors().items():
        assert_same_bits(getattr(compiled, name), tensor)


class Listener(TorchDispatchMode):
    """Writes down which of the package's operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "qft_hf":
            self.heard.append(operator.name())
        return operator(*args, **(kwargs or {}))


def test_who_listens_hears_of_operators_and_nothing_else_changes():
    x = random((5, 300), None)
    alone = kernels.quantize(x, group_size=32)

    with Listener() as listener:
        heard = kernels.quantize(x, group_size=32)

    assert listener.heard == ["qft_hf::quantize"]
    for one, other in zip(alone, heard, strict=True):
        assert_same_bits(one, other)


def test_tensors_without_values_get_shapes():
    codes, scales = kernels.quantize(torch.empty(5, 300, device="meta"), group_size=32)
    with FakeTensorMode():
        fake, _ = kernels.quantize(torch.empty(5, 300), group_size=32)

    assert (codes.shape, codes.dtype, scales.shape) == ((5, 300), torch.int8, (5, 10))
    assert codes.is_meta
    assert (fake.shape, fake.dtype) == ((5, 300), torch.int8)
