"""The measuring scripts run on a CPU at toy size; what they measure there means nothing."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from qft_hf import kernels
from qft_hf.kernels.operators import Operator

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.append(str(SCRIPTS))  # where `python scripts/name.py` looks for its neighbours
CPU = torch.device("cpu")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def memory_figures():
    script = load("profile_memory")
    config = script.config_of("tiny", None)
    arguments = {"device": CPU, "lengths": [16, 40], "n_steps": 2, "chunked_loss": True}
    runs = {
        name: script.profile(config, gradient, spec, **arguments)
        for name, gradient, spec in (
            ("stack", "stack", script.QFTConfig()),
            ("release", "release", script.QFTConfig()),
            ("int8", "stack", script.QFTConfig(matmul="int8")),
            ("AdamW", None, None),
        )
    }
    return {"config": "tiny", "runs": runs}


@pytest.fixture(scope="module")
def kernel_figures():
    script = load("benchmark_kernels")
    figures = script.measure(6, 300, None, CPU, 2)
    figures["products"] = {
        name: script.measure_product(product, CPU, 2)
        for name, product in script.products(7, 6, 300, CPU).items()
    }
    figures["few_tokens"] = script.measure_few_tokens(6, 300, None, CPU, 2)
    return {"6x300": figures}


def test_training_steps_are_profiled(memory_figures):
    ledgers = {}
    for name, figures in memory_figures["runs"].items():
        rows = figures["sequence_lengths"]
        assert list(rows) == ["16", "40"]
        for row in rows.values():
            assert row["loss"] > 0
            assert set(row["peak_bytes"]) == {"forward", "backward", "step", "all"}
            assert row["tokens_per_second"] > 0
        ledgers[name] = rows["40"]["ledger_bytes"]
    # 3.1 and 2.1 against 8 bytes per parameter, small float parts on top.
    assert ledgers["release"] < 0.75 * ledgers["stack"]
    assert ledgers["stack"] < ledgers["AdamW"] / 2
    assert ledgers["int8"] == ledgers["stack"]


def test_the_study_of_momentum_runs_every_kind():
    script = load("study_momentum")
    study = script.Study(script.Size(hidden=32, layers=1), pretrain_steps=2, steps=2)
    rows = [{"kind": "float", "lr": 1e-3, "seed": 0, "reduction": study.lion(0, 1e-3, None)}]
    sgd = study.float_sgd(0, 1e-3)
    rows.append({"kind": "float SGD", "lr": 1e-3, "seed": 0, "reduction": sgd})
    for bits in (8, 4, 0):
        row = {
            "kind": f"{bits} bits",
            "lr": 1e-3,
            "seed": 0,
            "reduction": study.lion(0, 1e-3, bits),
        }
        rows.append(row)
    for name in ("as shipped: slope 3, groups of 64", "to nearest", "sticky scale"):
        reduction, error = study.simulated(0, 1e-3, script.VARIANTS[name])
        assert 0 < error < 1
        rows.append({"kind": name, "lr": 1e-3, "seed": 0, "reduction": reduction, "error": error})

    text = script.table(rows)

    assert "| float | 0.001 | 100.0 % |" in text
    assert all(f"| {row['kind']} |" in text for row in rows)


def test_random_int8_weights_have_the_usual_deviation():
    script = load("profile_memory")

    weight = script.random_weight(50, 400, script.QFTConfig(), CPU).dequantize().float()

    assert weight.std().item() == pytest.approx(script.WEIGHT_STD, rel=0.1)


def test_every_operator_is_timed_against_the_reference(kernel_figures):
    operators = kernel_figures["6x300"]["operators"]

    others = {"dequantize rows", "lion_step_ 4-bit"}
    # One is timed in the table of products; the other is that one and `quantize`, on GPUs.
    products = {"int8_matmul", "requantized_matmul"}
    names = {name for name in kernels.__all__ if isinstance(getattr(kernels, name), Operator)}
    assert set(operators) == (names | others) - products
    assert all(value > 0 for row in operators.values() for value in row.values())


def test_every_product_is_timed_beside_float(kernel_figures):
    products = kernel_figures["6x300"]["products"]

    assert set(products) == {"forward", "grad_x", "grad_w"}
    for row in products.values():
        assert all(value > 0 for value in row.values())
        assert {"tera_operations_per_second", "times_faster_than_bf16"} < set(row)


def test_few_tokens_are_timed_beside_expanding_and_beside_float(kernel_figures):
    few = kernel_figures["6x300"]["few_tokens"]

    assert set(few) == {f"{n} {dtype}" for n in (1, 4, 16) for dtype in ("bfloat16", "float32")}
    for row in few.values():
        assert all(value > 0 for value in row.values())
        assert {"times_faster_than_expanding", "times_faster_than_float_weight"} < set(row)


def test_other_optimizers_are_timed_in_the_same_run(kernel_figures):
    peers = kernel_figures["6x300"]["peers"]

    wanted = {"torch AdamW fused, FP32"}
    if importlib.util.find_spec("bitsandbytes"):
        wanted.add("bitsandbytes Lion8bit, FP32")
    assert set(peers) == wanted
    assert all(value > 0 for row in peers.values() for value in row.values())


def test_the_report_shows_failures_and_all_figures(memory_figures, kernel_figures):
    script = load("gpu_check")
    part = script.run("x", ["false"], limit=5, environment={"PATH": "/usr/bin:/bin"})
    late = script.run("y", ["sleep", "5"], limit=0.1, environment={"PATH": "/usr/bin:/bin"})

    text = script.markdown(
        {
            "machine": script.machine("cpu"),
            "parts": {"x": part, "y": late},
            "kernels": kernel_figures,
            "memory": memory_figures,
            "training": "| QFT, int8 | 1000 |",
        }
    )

    assert "| x | failed (1) |" in text
    assert "| y | failed (124) |" in text
    assert "| lion_step_ | 6x300 |" in text
    assert "| grad_w | 6x300 |" in text
    assert "| 4 bfloat16 | 6x300 |" in text
    assert "| AdamW | 2 | 40 |" in text
    assert "| torch AdamW fused, FP32 | 6x300 |" in text
    assert text.endswith("\n| QFT, int8 | 1000 |\n")
