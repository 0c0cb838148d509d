"""The operators as PyTorch sees them: schema, fake results, functionalization, compilation."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qft_hf import kernels
from qft_hf.kernels import AdamW, Moments, Weight
from qft_hf.kernels.operators import Operator
from tests.kernels.states import (
    ROUNDING,
    arguments,
    assert_same_state,
    coded,
    float_arguments,
    make_state,
    random,
    step_arguments,
    step_float_arguments,
)
from tests.tolerances import assert_same_bits

OPERATORS: dict[str, Operator] = {
    name: value for name, value in vars(kernels).items() if isinstance(value, Operator)
}


def cases() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return arguments for each operator."""
    state = make_state((5, 300), group_size=32, outlier_fraction=0.02)
    packed = make_state((5, 300), group_size=32, momentum_bits=4)
    x = random((5, 300), None)
    codes, scales = kernels.quantize(x, group_size=None)
    floats = (
        [torch.linspace(-1, 1, n).bfloat16() for n in (30, 7)],
        *([torch.full((n,), value) for n in (30, 7)] for value in (0.0, 1.0)),
    )
    ratio, root = coded(x, 256), coded(x.abs(), 256)
    moments = Moments(*ratio.tensors, root.codes.byte(), root.scales, 256)
    rows = torch.tensor([4, 0, 4, 1])
    bias, columns, values = torch.ones(5), torch.tensor([3]), torch.ones(5, 1)
    shared = Weight(codes, scales, x[:, 4:6].contiguous(), torch.tensor([[4, 5]] * 5).short(), None)
    fused = {"group_size": 256, **arguments()}
    memory = torch.tensor([[0.01, 0.1, 5.0, 1.0, 1.0, 0.0, 0.0, 0.0]] * 9, dtype=torch.float64)
    return {
        "accumulate_": ((coded(x, 256), coded(x.flip(1), 256)), {}),
        "adamw_step_": (
            (state.weight, moments, state.gradient),
            {"rule": AdamW(3e-3, 0.9, 0.99, 1e-8, 0.1), "rounding": ROUNDING},
        ),
        "dequantize": ((state.weight,), {"dtype": torch.bfloat16, "rows": rows}),
        "dequantize of a dense weight": ((Weight.dense(state.gradient),), {}),
        "dequantized_matmul": ((random((3, 300), None).bfloat16(), state.weight), {"bias": bias}),
        "embedding_gradient_": (
            (coded(x, 256), torch.tensor([3, 0, 3]), torch.ones(3, 300)), {"padding_idx": 0}
        ),
        "expanded_input_gradient": (
            (random((3, 5), None), state.weight), {"own_dtype": torch.bfloat16}
        ),
        "expanded_linear": (
            (random((2, 3, 300), None), state.weight), {"bias": bias, "own_dtype": torch.bfloat16}
        ),
        "int8_linear": (
            (kernels.Input(*kernels.quantize_input(x, n_outliers=3)), x, shared),
            {"bias": bias, "dtype": torch.bfloat16},
        ),
        "int8_matmul": (
            (codes, codes.t(), scales, scales),
            {"bias": bias, "columns": columns, "values": values, "dtype": torch.bfloat16},
        ),
        "int8_matmul of codes alone": (
            (codes, codes.t(), None, None), {"dtype": torch.float32}
        ),
        "lion_step_": (state.arguments(), arguments()),
        "lion_step_ of a packed momentum": (packed.arguments(), arguments(maximize=True)),
        "lion_step_floats_": (floats, float_arguments(2)),
        "outlier_products": ((torch.ones(4, 5), values, torch.ones(4, 2)), {}),
        "quantize": ((x,), {"group_size": 32}),
        "quantize of whole rows": ((x.half(),), {"group_size": None}),
        "quantize_and_lion_step_": (
            (state.weight, state.momentum, x), {**fused, "factor": torch.tensor(0.5)}
        ),
        "quantize_and_lion_step_ of a packed momentum": (
            (packed.weight, packed.momentum, x.bfloat16()), fused
        ),
        "quantize_gradient": ((random((300, 5), None), scales, None), {"seed": 3}),
        "quantize_gradient in both forms": (
            (random((5, 5), None), scales, scales), {"stochastic": False, "seed": 3}
        ),
        "quantize_input": ((x.bfloat16(),), {"n_outliers": 7}),
        "requantized_matmul": (
            (codes, codes.t(), scales), {"columns": columns, "values": values, "group_size": 2}
        ),
        "squared_norms": ((coded(x, 256),), {}),
        "step_floats_": ((floats[0], floats[2]), step_float_arguments(2)),
        "step_floats_ with numbers in memory": (
            (floats[0], floats[2]), step_float_arguments(2, live=memory)
        ),
        "step_weight_": ((state.weight, x), step_arguments()),
        "step_weight_ with numbers in memory": (
            (state.weight, x), step_arguments(live=memory[3])
        ),
    }  # fmt: skip


def case(name: str) -> tuple[Operator, tuple[Any, ...], dict[str, Any]]:
    """Return the operator of a case, and its arguments."""
    return OPERATORS[name.split()[0]], *cases()[name]


def test_every_operator_has_a_case():
    assert {name.split()[0] for name in cases()} == set(OPERATORS)


@pytest.mark.parametrize("name", cases())
def test_opcheck(name):
    operator, values, options = case(name)
    flat = tuple(operator.flatten(*values, **options))

    results = torch.library.opcheck(getattr(torch.ops.qft_hf, operator.name).default, flat)

    assert set(results.values()) == {"SUCCESS"}


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return all tensors of arguments or results, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in tensors_in(part)]
    return []


def written(operator: Operator, values: Any, options: Any) -> list[bool]:
    """Return which of the flat tensors a call changes."""
    flat = tensors_in(operator.flatten(*values, **options))
    before = [tensor.clone() for tensor in flat]
    operator(*values, **options)
    return [not torch.equal(old, new) for old, new in zip(before, flat, strict=True)]


@pytest.mark.parametrize("name", cases())
def test_the_schema_says_what_is_written(name):
    """A call writes each tensor that the schema declares as written, and no other."""
    operator, values, options = case(name)
    schema = getattr(torch.ops.qft_hf, operator.name).default._schema
    flat = operator.flatten(*values, **options)
    declared = [
        argument.alias_info is not None and argument.alias_info.is_write
        for argument, value in zip(schema.arguments, flat, strict=True)
        for _ in tensors_in(value)
    ]

    found = written(operator, values, options)

    filled = [tensor.numel() > 0 for tensor in tensors_in(flat)]
    declared = [is_written and full for is_written, full in zip(declared, filled, strict=True)]
    assert found == declared


@pytest.mark.parametrize("name", cases())
def test_through_the_dispatcher_an_operator_has_the_bits_of_a_call(name):
    """Omitted arguments have the reference's defaults."""
    operator, values, options = case(name)
    _, other_values, other_options = case(name)
    flat = operator.flatten(*other_values, **other_options)

    direct = operator(*values, **options)
    dispatched = getattr(torch.ops.qft_hf, operator.name).default(*flat)

    changed = operator.flatten(*values, **options)
    pairs = [(direct, dispatched), (changed, flat)]
    for one, other in pairs:
        for tensor, wanted in zip(tensors_in(one), tensors_in(other), strict=True):
            assert_same_bits(tensor, wanted)


@pytest.mark.parametrize("name", cases())
def test_fake_results_have_the_shapes_of_real_ones(name):
    operator, values, options = case(name)
    flat = operator.flatten(*values, **options)
    operation = getattr(torch.ops.qft_hf, operator.name).default

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [
            [mode.from_tensor(part) for part in value] if tensors_in(value) == value and value
            else mode.from_tensor(value) if isinstance(value, torch.Tensor)
            else value
            for value in flat
        ]  # fmt: skip
        fake = operation(*fakes)
    real = operation(*flat)

    assert [(t.shape, t.dtype, t.stride()) for t in tensors_in(fake)] == [
        (t.shape, t.dtype, t.stride()) for t in tensors_in(real)
    ]


def test_an_operator_compiles_into_one_graph():
    """Written tensors stay the same objects, and later operations see their new values."""
    eager, compiled = (make_state((5, 300), group_size=32, outlier_fraction=0.02) for _ in range(2))

    def step(codes: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        state = compiled.of(dict(zip(compiled.tensors(), (codes, *rest), strict=True)))
        kernels.lion_step_(*state.arguments(), **arguments())
        return codes.sum()

    step_compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    total = step_compiled(*compiled.tensors().values())

    assert_same_bits(total, step(*eager.tensors().values()))
    assert_same_state(compiled, eager)


def test_values_may_be_made_inside_and_outside_of_what_is_compiled():
    """Floats are quantized, stepped and dequantized in one graph."""
    x = random((5, 300), None)

    def run(x: torch.Tensor) -> torch.Tensor:
        codes, scales = kernels.quantize(x, group_size=32)
        values = scales.new_empty(5, 0)
        weight = Weight(codes, scales, values, values.short(), 32)
        kernels.step_weight_(weight, x, **step_arguments(lr=0.1))
        return kernels.dequantize(weight, dtype=torch.bfloat16)

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)

    assert_same_bits(found, run(x))


class Listener(TorchDispatchMode):
    """Records which of the package's operators are called."""

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


def test_who_listens_to_a_composition_hears_of_it_and_of_none_of_its_parts():
    state, alone = (make_state((5, 300), group_size=32) for _ in range(2))
    given = {"group_size": 256, **arguments()}
    kernels.quantize_and_lion_step_(alone.weight, alone.momentum, random((5, 300), None), **given)

    with Listener() as listener:
        kernels.quantize_and_lion_step_(
            state.weight, state.momentum, random((5, 300), None), **given
        )

    assert listener.heard == ["qft_hf::quantize_and_lion_step_"]
    assert_same_state(state, alone)


def test_what_does_not_fit_is_refused_under_a_listener_too():
    with Listener(), pytest.raises(TypeError, match=r"x must be torch\.float32"):
        kernels.quantize(torch.ones(2, 3).double(), group_size=None)


def test_no_tensors_are_no_work_for_the_dispatcher_either():
    flat = kernels.step_floats_.flatten([], [], **step_float_arguments(0))

    assert torch.ops.qft_hf.step_floats_.default(*flat) is None


def test_tensors_without_values_get_shapes():
    codes, scales = kernels.quantize(torch.empty(5, 300, device="meta"), group_size=32)
    with FakeTensorMode():
        fake, _ = kernels.quantize(torch.empty(5, 300), group_size=32)

    assert (codes.shape, codes.dtype, scales.shape) == ((5, 300), torch.int8, (5, 10))
    assert codes.is_meta
    assert (fake.shape, fake.dtype) == ((5, 300), torch.int8)
