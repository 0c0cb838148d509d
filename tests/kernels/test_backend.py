"""Which backend runs on which device, and what runs if it does not implement an operator."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import sys
from contextlib import suppress
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels import Weight, backend
from qft_hf.kernels.operators import Composition, Operator
from tests.kernels.states import arguments, coded, make_state, random
from tests.tolerances import assert_same_bits

OPERATORS: dict[str, Operator] = {
    name: value for name, value in vars(kernels).items() if isinstance(value, Operator)
}
# Operators that a backend may implement. A composition always runs its reference.
LAUNCHED = [value for value in OPERATORS.values() if not isinstance(value, Composition)]
BACKENDS = ["cpu"]
importlib.import_module("qft_hf.kernels.cpu")
if importlib.util.find_spec("triton"):
    BACKENDS.append("triton")
    importlib.import_module("qft_hf.kernels.triton")

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _fresh_choice(monkeypatch):
    monkeypatch.delenv("QFT_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend.backends.cache_clear()
    backend.forget()
    yield
    backend.backends.cache_clear()
    backend.forget()


def test_the_device_chooses():
    assert backend.backend_for(CPU) == "cpu"


def test_a_device_without_its_own_backend_runs_the_reference():
    assert backend.backend_for(torch.device("meta")) == "reference"


def test_the_environment_overrides(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "reference")

    assert backend.backend_for(CPU) == "reference"


def test_an_unknown_name_lists_the_choices(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "fortran")

    with pytest.raises(ValueError, match=r"one of .*reference, .*got 'fortran'"):
        backend.backend_for(CPU)


def test_cpu_kernels_refuse_other_devices(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "cpu")

    with pytest.raises(ValueError, match=r"Unset QFT_BACKEND.*or use QFT_BACKEND=reference"):
        backend.backend_for(CUDA)


def test_triton_kernels_refuse_the_cpu(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "triton")

    with pytest.raises(ValueError, match=r"tensors on cpu; .* Unset QFT_BACKEND"):
        backend.backend_for(CPU)
    with pytest.raises(ValueError, match=r"tensors on cpu; .* Unset QFT_BACKEND"):
        kernels.quantize(torch.ones(1, 2), group_size=None)


def test_a_program_overrides_the_environment_and_programs_nest(monkeypatch):
    monkeypatch.setenv("QFT_BACKEND", "reference")
    chosen = []

    with backend.use("cpu"):
        chosen.append(backend.backend_for(CPU))
        with suppress(ZeroDivisionError), backend.use("reference"):
            chosen.append(backend.backend_for(CPU))
            raise ZeroDivisionError
        chosen.append(backend.backend_for(CPU))
    chosen.append(backend.backend_for(CPU))
    monkeypatch.delenv("QFT_BACKEND")
    backend.forget()
    chosen.append(backend.backend_for(CPU))

    assert chosen == ["cpu", "reference", "cpu", "reference", "cpu"]


@pytest.fixture
def gpu(monkeypatch):
    """Fake a machine on which everything is recent enough; each test changes one thing."""
    monkeypatch.setattr(backend, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")
    return monkeypatch


@pytest.mark.skipif("triton" not in BACKENDS, reason="triton is not installed")
def test_a_gpu_runs_triton(gpu):
    assert backend.backend_for(CUDA) == "triton"


def test_a_missing_triton_is_refused(gpu):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    gpu.setattr(backend, "version", missing)

    with pytest.raises(RuntimeError, match=r"found none: pip install 'triton>=3\.6', or set QFT_B"):
        backend.backend_for(CUDA)


def test_an_old_triton_is_refused(gpu):
    gpu.setattr(backend, "version", lambda name: "3.5.1")

    with pytest.raises(RuntimeError, match=r"triton 3\.6 or newer, found 3\.5\.1: pip install"):
        backend.backend_for(CUDA)


def test_an_old_gpu_is_refused(gpu):
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    with pytest.raises(RuntimeError, match=r"8\.0 or newer, Old Card has 7\.5.*QFT_BACKEND=refer"):
        backend.backend_for(CUDA)


def test_another_kind_of_gpu_is_refused(gpu):
    gpu.setattr(torch.version, "cuda", None)

    with pytest.raises(RuntimeError, match=r"NVIDIA GPUs only.*or set QFT_BACKEND=reference"):
        backend.backend_for(CUDA)


def test_the_reference_runs_on_a_gpu_if_asked_for(gpu):
    gpu.setattr(torch.version, "cuda", None)
    gpu.setenv("QFT_BACKEND", "reference")

    assert backend.backend_for(CUDA) == "reference"


# --- implementations ------------------------------------------------------------------------------

# Operators that a backend may leave to the reference or to a composition of its own kernels.
LEFT = {
    "cpu": {"int8_linear", "quantize_and_lion_step_"},
    "triton": {"outlier_products"},
}


IMPLEMENTED = [
    pytest.param(name, operator, id=f"{name}-{operator.name}")
    for name in BACKENDS
    for operator in LAUNCHED
    if operator.name not in LEFT[name]
]


def test_the_package_offers_operators_and_their_values():
    values = {"AdamW", "Input", "Lion", "Moments", "Quantized", "Rounding", "Roundings", "Weight"}

    assert set(kernels.__all__) == set(OPERATORS) | values | {"expand", "squared_norm"}
    assert all(name == operator.name for name, operator in OPERATORS.items())


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_every_operator_that_is_worth_it(name):
    missing = {operator.name for operator in LAUNCHED if name not in operator._implementations}

    assert missing == LEFT[name]
    assert all(OPERATORS[operator]._composed for operator in missing)


@pytest.mark.parametrize(("name", "operator"), IMPLEMENTED)
def test_backends_take_the_operator_s_arguments(name, operator):
    """Argument names agree; a backend may also accept `*` and `**` and pass them on."""
    kinds = inspect.Parameter
    wanted = list(inspect.signature(operator).parameters)
    own = inspect.signature(operator._implementations[name]).parameters.values()
    named = [p.name for p in own if p.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]

    if len(named) == len(own):
        assert named == wanted
    else:
        assert set(named) <= set(wanted)


@pytest.fixture
def calls(monkeypatch):
    """List `(backend, operator)` of each implementation that runs."""
    heard = []

    def spy(name: str, operator: Operator, function: Any) -> Any:
        def run(*values: Any, **options: Any) -> Any:
            heard.append((name, operator.name))
            return function(*values, **options)

        return run

    for operator in OPERATORS.values():
        for name, function in list(operator._implementations.items()):
            monkeypatch.setitem(operator._implementations, name, spy(name, operator, function))
        spied = spy("reference", operator, operator.reference)
        monkeypatch.setattr(operator, "reference", spied)
    backend.forget()
    return heard


def test_the_implementation_of_the_chosen_backend_runs(calls):
    x = random((5, 300), None)

    alone = kernels.quantize(x, group_size=32)
    with backend.use("reference"):
        forced = kernels.quantize(x, group_size=32)
    kernels.quantize(x, group_size=32)

    assert calls == [("cpu", "quantize"), ("reference", "quantize"), ("cpu", "quantize")]
    for one, other in zip(alone, forced, strict=True):
        assert_same_bits(one, other)


def test_all_parts_of_a_composition_run_on_the_backend_that_is_forced(calls):
    state = make_state((5, 300), group_size=32)
    gradient = random((5, 300), None)
    calls.clear()

    with backend.use("reference"):
        kernels.quantize_and_lion_step_(
            state.weight, state.momentum, gradient, group_size=256, **arguments()
        )

    parts = ["quantize_and_lion_step_", "quantize", "squared_norms", "lion_step_"]
    assert calls == [("reference", part) for part in parts]


def test_a_composition_runs_with_the_backend_s_own_kernels(calls, caplog):
    state = make_state((5, 300), group_size=32)
    gradient = random((5, 300), None)
    calls.clear()

    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        kernels.quantize_and_lion_step_(
            state.weight, state.momentum, gradient, group_size=256, **arguments()
        )

    assert calls[0] == ("reference", "quantize_and_lion_step_")
    assert calls[1:] == [("cpu", part) for part in ("quantize", "squared_norms", "lion_step_")]
    assert not caplog.records  # too small a loss for a warning


def test_an_operator_that_a_backend_has_not_runs_the_reference_and_tells_once(
    calls, caplog, monkeypatch
):
    x = random((5, 300), None)
    expected = kernels.quantize(x, group_size=32)
    matrix = coded(x, 32)
    for operator in (kernels.quantize, kernels.squared_norms):
        monkeypatch.delitem(operator._implementations, "cpu")
    backend.forget()
    calls.clear()

    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        for _ in range(3):
            found = kernels.quantize(x, group_size=32)
        kernels.squared_norms(matrix)

    assert calls == 3 * [("reference", "quantize")] + [("reference", "squared_norms")]
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
    assert [record.getMessage() for record in caplog.records] == [
        f"the cpu backend has no {name}: plain PyTorch runs instead, which gives the same bits and "
        "is slower"
        for name in ("quantize", "squared_norms")
    ]


def test_the_reference_is_no_resort_where_it_was_asked_for(caplog):
    with backend.use("reference"), caplog.at_level(logging.WARNING, logger="qft_hf"):
        kernels.quantize(random((5, 300), None), group_size=32)

    assert not caplog.records


# --- backends of other packages -------------------------------------------------------------------


@pytest.fixture
def other_package(monkeypatch):
    """Fake an installed package: its entry point, and a module that registers `quantize`.

    Its `quantize` returns codes of 7. Tests set the `devices` of its `Backend`.
    """
    module = ModuleType("other_package_kernels")
    found = SimpleNamespace(devices=("cpu",), checked=[], module=module)

    def register() -> None:
        @kernels.quantize.register("other")
        def quantize(x: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.full_like(x, 7, dtype=torch.int8), torch.ones(len(x), 1)

    def load() -> backend.Backend:
        return backend.Backend("other", module.__name__, found.devices, found.checked.append)

    def entry_points(*, group: str) -> list[Any]:
        return [SimpleNamespace(load=load)] if group == "qft_hf.backends" else []

    def import_module(name: str) -> ModuleType:
        if name == module.__name__:
            register()
            monkeypatch.setitem(sys.modules, name, module)
            return module
        return importlib.import_module(name)

    monkeypatch.setattr(backend, "entry_points", entry_points)
    monkeypatch.setattr(backend, "import_module", import_module)
    yield found
    kernels.quantize._implementations.pop("other", None)
    backend.forget()


def test_another_package_s_backend_goes_before_ours(other_package, caplog):
    with backend.use("cpu"):
        matrix = coded(random((5, 300), None), 32)
    assert "other" not in kernels.quantize._implementations

    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        codes, scales = kernels.quantize(random((5, 300), None), group_size=None)
        values = kernels.dequantize(Weight.dense(matrix))

    assert backend.backend_for(CPU) == "other"
    assert (codes == 7).all()
    assert (scales == 1).all()
    assert other_package.checked == [CPU]
    with backend.use("reference"):
        assert_same_bits(values, kernels.dequantize(Weight.dense(matrix)))
    assert [record.getMessage()[:31] for record in caplog.records] == [
        "the other backend has no dequan"
    ]


def test_another_package_s_backend_is_for_its_devices(other_package):
    other_package.devices = ("xpu", "mps")

    assert backend.backend_for(CPU) == "cpu"
    assert backend.backend_for(torch.device("xpu")) == "other"
    assert backend.backend_for(torch.device("mps")) == "other"
    assert backend.backend_for(torch.device("meta")) == "reference"
    assert other_package.checked == [torch.device("xpu"), torch.device("mps")]


def test_another_package_s_operator_is_checked_before_it_runs(other_package):
    with pytest.raises(TypeError, match=r"x must be torch\.float32 or .* got torch\.float64"):
        kernels.quantize(torch.ones(2, 3).double(), group_size=None)


def test_another_package_s_backend_may_be_asked_for_by_name(other_package, monkeypatch):
    other_package.devices = ()
    assert backend.backend_for(CPU) == "cpu"

    with backend.use("other"):
        assert (kernels.quantize(torch.ones(2, 3), group_size=None)[0] == 7).all()
    assert (kernels.quantize(torch.ones(2, 3), group_size=None)[0] == 127).all()
    monkeypatch.setenv("QFT_BACKEND", "another")
    backend.forget()
    with pytest.raises(ValueError, match="one of reference, cpu, triton, other, got 'another'"):
        backend.backend_for(CPU)


def test_a_composition_runs_with_another_package_s_kernels(other_package):
    product = kernels.requantized_matmul(
        torch.ones(2, 3, dtype=torch.int8), torch.ones(3, 4, dtype=torch.int8), None, group_size=2
    )

    assert (product[0] == 7).all()


def test_another_package_s_check_may_refuse(other_package, monkeypatch):
    def check(device: torch.device) -> None:
        raise RuntimeError(f"needs a newer {device}")

    monkeypatch.setattr(
        backend, "entry_points",
        lambda group: [SimpleNamespace(load=lambda: backend.Backend("o", "o", ("cpu",), check))],
    )  # fmt: skip

    with pytest.raises(RuntimeError, match="needs a newer cpu"):
        kernels.quantize(torch.ones(2, 3), group_size=None)


def test_kernels_compile_where_neither_the_package_nor_home_may_be_written(monkeypatch, caplog):
    """Numba raised at the first operator, as in a container with a user of its own."""
    from numba.core import caching

    from qft_hf.kernels.cpu import compiled

    monkeypatch.setattr(compiled, "_folders", [])
    monkeypatch.setattr(compiled.config, "CACHE_DIR", "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    compiled.find_place()
    assert compiled.config.CACHE_DIR == ""  # here there is a place
    assert caplog.records == []

    for name, value in vars(caching).items():  # older versions begin these names with _
        if name.lstrip("_") in ("InTreeCacheLocator", "UserWideCacheLocator"):
            monkeypatch.setattr(value, "ensure_cache_path", raise_read_only)
    with pytest.raises(RuntimeError, match="no locator available"):
        caching.FunctionCache(compiled.find_place)
    compiled.find_place()
    (folder,) = compiled._folders
    assert compiled.config.CACHE_DIR == folder.name
    caching.FunctionCache(compiled.find_place)
    assert "Set NUMBA_CACHE_DIR to a folder that may be written" in caplog.text
    folder.cleanup()


def raise_read_only(self):
    raise OSError("Read-only file system")
