"""The measuring scripts run on a CPU at toy size, where their figures mean nothing."""

import importlib.util
import runpy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.autograd.profiler_util import Interval

from qft_hf import kernels
from qft_hf.kernels.operators import Composition, Operator
from tests.recorded_graph import RecordedGraph
from tests.scripts.commands import SCRIPTS, load

CPU = torch.device("cpu")


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
            ("AdamW", torch.optim.AdamW, None),
        )
    }
    return runs


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
    for name, figures in memory_figures.items():
        rows = figures["sequence_lengths"]
        assert list(rows) == ["16", "40"]
        for row in rows.values():
            assert row["loss"] > 0
            assert set(row["peak_bytes"]) == {"forward", "backward", "step", "all"}
            assert row["tokens_per_second"] > 0
        ledgers[name] = rows["40"]["ledger_bytes"]
    # 3.1 and 2.1 bytes per parameter against 8, plus small float parts.
    assert ledgers["release"] < 0.75 * ledgers["stack"]
    assert ledgers["stack"] < ledgers["AdamW"] / 2
    assert ledgers["int8"] == ledgers["stack"]


def test_random_int8_weights_have_the_usual_deviation():
    script = load("profile_memory")

    weight = script.random_weight(50, 400, script.QFTConfig(), CPU).dequantize().float()

    assert weight.std().item() == pytest.approx(script.WEIGHT_STD, rel=0.1)


def has_kernels(value):
    """Return whether a value is an operator that backends may implement."""
    return isinstance(value, Operator) and not isinstance(value, Composition)


def test_every_operator_is_timed_against_the_reference(kernel_figures):
    script, operators = load("benchmark_kernels"), kernel_figures["6x300"]["operators"]

    timed = {name.split()[0] for name in operators}
    products = {call.func.__name__ for call in script.products(7, 6, 300, CPU).values()}
    names = {name for name in kernels.__all__ if has_kernels(getattr(kernels, name))}
    assert (timed | products, timed & products) == (names, set())
    assert {"dequantize rows", "lion_step_ 4-bit"} < set(operators)
    assert all(value > 0 for row in operators.values() for value in row.values())


def test_every_kernel_is_called(monkeypatch):
    called = set()
    for name in kernels.__all__:
        if has_kernels(operator := getattr(kernels, name)):
            monkeypatch.setattr(operator, "_check", partial(_note, called, operator._check, name))
    folder = SCRIPTS / "benchmarks"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr("sys.argv", ["every_kernel.py", "cpu"])

    runpy.run_path(str(folder / "every_kernel.py"))

    assert called == {n for n in kernels.__all__ if has_kernels(getattr(kernels, n))}


def _note(called, check, name, *arguments, **options):
    called.add(name)
    if check is not None:
        check(*arguments, **options)


def test_every_product_is_timed_beside_float(kernel_figures):
    products = kernel_figures["6x300"]["products"]

    assert set(products) == {"forward", "grad_x", "grad_w", "grad_w, quantized"}
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


def test_the_reports_show_all_figures(memory_figures, kernel_figures):
    kernel_text = load("benchmark_kernels").tables(kernel_figures)
    assert "| lion_step_ | " in kernel_text
    assert "| grad_w | " in kernel_text
    assert "| 4 bfloat16 | " in kernel_text
    assert "| torch AdamW fused, FP32 | " in kernel_text
    assert "| AdamW | 2 | 40 |" in load("profile_memory").table(memory_figures)


def test_the_step_is_timed_beside_its_peers(run, monkeypatch):
    script = load("benchmark_step")
    config = script.model_config
    monkeypatch.setattr(script, "model_config", lambda name, layers: config("tiny", layers))
    figures, text = run("benchmark_step", "--layers", "1", "--steps", "1")

    assert next(iter(figures["optimizers"].values()))["ratio"] == 1
    assert "| QFTLion, reference backend | " in text


def test_the_share_of_check_sums_in_a_save_is_timed(run):
    figures, text = run("benchmark_save", "--config", "tiny", "--repeats", "2")
    whole, alone = figures["saves"]["QFTTrainer's checkpoint"], figures["saves"]["save_pretrained"]
    assert whole["megabytes"] > 1.5 * alone["megabytes"] > 0
    for row in (whole, alone):
        assert 0 < row["sums_of_tensors_%"] < 100
        assert 0 < row["sums_of_tensors_ms"] + row["waiting_for_the_disk_ms"] < row["whole_ms"]
    assert (whole["sums_of_files_ms"] > 0, alone["sums_of_files_ms"]) == (True, 0)
    assert "| save_pretrained |" in text


def test_training_steps_are_timed_by_phase(run, tmp_path):
    figures, text = run(
        "benchmark_training", "--config", "tiny", "--sequence_length", "20", "--steps", "1",
        "--only", "AdamW", "QFT",
    )  # fmt: skip

    ways = figures["median_seconds"]["20"]
    assert list(ways) == [
        "FP32 AdamW", "bf16 autocast AdamW", "bf16 AdamW", "QFT, dequantize",
        "QFT release, dequantize", "QFT, int8", "QFT release, int8",
        "QFT, int8, no outlier columns",
    ]  # fmt: skip
    for way in ways.values():
        assert way["whole"] == pytest.approx(way["forward"] + way["backward"] + way["step"])
    assert "| FP32 AdamW |" in text
    assert (tmp_path / "out" / "steps.png").stat().st_size > 10_000


def test_what_a_device_did_is_its_own_operations_and_not_the_annotated_spans():
    device, host = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(kind, microseconds, *, annotation=False):
        span = Interval(10, 10 + microseconds)
        return SimpleNamespace(device_type=kind, time_range=span, is_user_annotation=annotation)

    work = load("benchmark_training").device_work(
        [event(device, 30), event(host, 500), event(device, 12), event(device, 99, annotation=True)]
    )

    assert work == {"device_busy": pytest.approx(42e-6), "device_operations": 2}


def test_too_few_tokens_for_int8_products_are_refused(run):
    with pytest.raises(SystemExit):
        run(
            "benchmark_training", "--config", "tiny", "--batch_size", "1", "--sequence_length", "31"
        )


def test_memory_is_profiled_from_the_command_line(run):
    figures, text = run(
        "profile_memory", "--device", "cpu", "--config", "tiny", "--sequence_length", "16",
        "--steps", "1", "--gradient", "release", "--compare",
    )  # fmt: skip

    assert list(figures["runs"]) == ["QFT release", "AdamW bf16"]
    assert "| QFT release | 2 | 16 |" in text


def test_replayed_steps_have_the_bits_of_eager_ones_and_the_report_says_so(run):
    flags = ["--device", "cpu", "--steps", "7", "--sequence_length", "16", "--layers", "1"]
    figures, text = run("graph_check", *flags, "--only", "stack", "release")

    assert list(figures["modes"]) == list(load("graph_check").MODES)
    for row in figures["modes"].values():
        assert row["tensors that differ"] == row["steps whose logs differ"] == 0
        assert row["graph, ms"] > 0
    assert "| release, int8 |" in text


def test_a_graph_that_runs_nothing_fails_the_check(run, monkeypatch):
    monkeypatch.setattr(RecordedGraph, "replay", lambda graph: None)
    flags = ["--device", "cpu", "--steps", "7", "--sequence_length", "16", "--layers", "1"]
    with pytest.raises(SystemExit, match="1"):
        run("graph_check", *flags, "--only", "stack, int8")


def test_the_gpu_check_shows_failures_and_the_tables_of_its_parts(tmp_path):
    script = load("gpu_check")
    (tmp_path / "table.md").write_text("of an earlier run")
    write = ["sh", "-c", f"echo '| QFT, int8 | 1000 |' > {tmp_path}/table.md; exit 1"]
    parts = [
        script.Part("x", write, 5, folder=tmp_path),
        script.Part("y", ["sleep", "5"], 0.1),
        script.Part("z", [], 5, missing="no tool"),
        script.Part("nothing written", ["true"], 5, folder=tmp_path),
    ]

    text = script.markdown({part.name: part.run(10.0) for part in parts})

    assert "| x | failed (1) |" in text
    assert "| y | failed (124) |" in text
    assert "| z | not run: no tool |" in text
    assert "## x\n\n| QFT, int8 | 1000 |\n" in text
    assert "## nothing written" not in text


@pytest.mark.parametrize("real", [True, False])
def test_the_gpu_check_has_all_parts_in_files_that_exist(real, tmp_path):
    script = load("gpu_check")
    parts = script.parts(tmp_path, real=real)

    assert len(parts) == 7
    folders = [part.folder for part in parts if part.folder]
    assert len(set(folders)) == len(folders)
    limits = [part.limit for part in parts if part.folder]
    assert limits == sorted(limits)  # if the GPU is lost, most parts are done
    assert ["-n", "auto"] == parts[1].command[parts[1].command.index("-n") :][:2]
    for part in parts:
        files = [word for word in part.command if word.endswith(".py")]
        assert files
        assert all((script.report.ROOT / file).exists() for file in files)


def test_the_quick_check_measures_this_package_and_another(run, tmp_path):
    figures, text = run("gpu_quick", "--device", "cpu", "--against", str(SCRIPTS.parent))

    assert list(figures["now"]) == list(figures["before"]) == ["32"]
    assert "| QFT release, int8, 32 tokens | " in text.partition("Against")[2]


def test_the_quick_check_divides_what_is_by_what_was():
    now = {"512": {"QFT": {"whole": 3.0, "step": 1.0, "device_busy": 2.0}, "new": {"whole": 1.0}}}
    before = {"512": {"QFT": {"whole": 4.0, "step": 0.0}}}

    assert load("gpu_quick").ratios(now, before) == {"QFT, 512 tokens": {"whole": 0.75}}


def test_the_quick_check_refuses_a_folder_that_is_no_checkout(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("gpu_quick", "--device", "cpu", "--against", str(tmp_path))

    assert f"must be a checkout of this project, got {tmp_path}" in capsys.readouterr().err
