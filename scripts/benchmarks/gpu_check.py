"""Everything that needs a GPU, in one command: bits, memory errors, speed, the 7B run.

Runs from a checkout with torch, triton, transformers and accelerate; pytest and compute-sanitizer
are used where they are, and nothing is installed. Each part has its own time limit, nine minutes
in all. Writes `gpu_check.json` and `gpu_check.md` into `--output`; exits with 1 if a part failed.
`--device cpu` runs the same paths at toy size, in Triton's interpreter.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 530

# One call of each kernel for compute-sanitizer, small enough for its slowness.
SANITIZED = """
import sys
import torch
from qft_hf import kernels
device = sys.argv[1]
x = torch.randn(5, 577, device=device)
n = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.1, "seed": 1, "step": 1}
for size in (None, 100, 64):
    w = kernels.quantize(x, group_size=size)
    columns = torch.tensor([0, 5, 576], dtype=torch.int16, device=device).repeat(5, 1)
    values = torch.ones(5, 3, device=device)
    w[0].scatter_(1, columns.long(), 0)
    m, g = (kernels.quantize(x * 0.1, group_size=256) for _ in range(2))
    kernels.accumulate_(*g, *m, group_size=256)
    kernels.squared_norm(*g, group_size=256)
    kernels.lion_step_(*w, values, columns, *m, *g, group_size=size, state_group_size=256,
                       stream=0, **n)
    # Two ids that are no rows; on a CPU they raise.
    ids = torch.tensor([4, 0, 4, *([5, -1] if device == "cuda" else [1, 4])], device=device)
    kernels.dequantize(*w, rows=ids, group_size=size, outlier_values=values,
                       outlier_columns=columns)
    kernels.embedding_gradient_(*g, ids, x, group_size=256)
    kernels.quantize_and_lion_step_(*w, values, columns, *m, x, group_size=size,
                                    state_group_size=256, stream=0, **n)
    packed = (torch.zeros(5, 289, dtype=torch.uint8, device=device),
              torch.ones(5, 10, device=device))
    kernels.lion_step_(*w, values, columns, *packed, *g, group_size=size, state_group_size=256,
                       stream=0, **n)
    sgd = {name: value for name, value in n.items() if not name.startswith("beta")}
    kernels.sgd_step_(*w, values, columns, *g, group_size=size, state_group_size=256, stream=0,
                      **sgd)
    kernels.dequantize(*w, group_size=size, outlier_values=values, outlier_columns=columns,
                       dtype=torch.bfloat16)
    for tokens in (x[:1], x, x[:1].half(), x.half()):
        kernels.dequantized_matmul(tokens.contiguous(), *w, group_size=size, outlier_values=values,
                                   outlier_columns=columns, bias=x[:, 0].contiguous())
for size in (5, 577):
    w, y = kernels.quantize(x, group_size=None), torch.randn(size, 577, device=device)
    a = kernels.quantize(y, group_size=None)
    g = kernels.int8_matmul(a[0], w[0].t(), a[1], w[1], dtype=torch.float32)
    by_rows, by_columns = kernels.quantize_gradient(g, w[1], a[1], seed=1)
    kernels.int8_matmul(by_rows[0], w[0], by_rows[1], None, dtype=torch.bfloat16)
    kernels.int8_matmul(by_columns[0], a[0], by_columns[1], None, dtype=torch.bfloat16)
    given = {"columns": torch.tensor([1], device=device), "values": y.new_ones(len(w[0]), 1)}
    kernels.requantized_matmul(by_columns[0], a[0], by_columns[1], **given, group_size=256)
sizes = (1001, 7, 1024)
p, g = ([torch.ones(s, device=device, dtype=torch.bfloat16) for s in sizes] for _ in range(2))
m = [torch.zeros(s, device=device) for s in sizes]
del n["step"], sgd["step"]
kernels.lion_step_floats_(p, m, g, steps=[1, 2, 3], streams=[0, 1, 2], **n)
kernels.sgd_step_floats_(p, g, steps=[1, 2, 3], streams=[0, 1, 2], **sgd)
if device == "cuda":
    torch.cuda.synchronize()
"""


def run(
    name: str, command: list[str], *, limit: float, environment: dict[str, str]
) -> dict[str, Any]:
    """Run one part; its time, exit status and the end of what it printed."""
    print(f"== {name}", flush=True)
    begin = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=max(1.0, limit),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status = 124
        output = error.stdout or b""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
    print(output[-3000:], flush=True)
    return {
        "status": "passed" if status == 0 else f"failed ({status})",
        "seconds": round(time.monotonic() - begin, 1),
        "output": output[-6000:],
    }


def missing(what: str) -> dict[str, Any]:
    """A part that cannot run here."""
    print(f"== not run: {what}", flush=True)
    return {"status": f"not run: {what}", "seconds": 0.0, "output": ""}


def commit() -> str:
    """The checkout's commit, or "unknown"."""
    try:
        text = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.strip()


def machine(device: str) -> dict[str, str]:
    """Device and versions."""
    versions = {}
    for name in ("torch", "triton", "transformers", "accelerate"):
        found = importlib.util.find_spec(name)
        versions[name] = __import__(name).__version__ if found else "missing"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted: no measurement"
    return {
        "device": name,
        "cuda": str(torch.version.cuda),
        "python": sys.version.split()[0],
        "commit": commit(),
        **versions,
    }


def read(path: Path) -> Any:
    """The JSON that a part wrote, or None."""
    return json.loads(path.read_text()) if path.exists() else None


# Tables of the kernel benchmark: what a row is, and its columns with their figure and digits.
KERNEL_TABLES = {
    "operators": (
        "kernel",
        {
            "ns/element": ("ns_per_parameter", 4),
            "GB/s": ("gigabytes_per_second", 0),
            "% of a copy": ("percent_of_copy", 0),
            "x reference": ("times_faster_than_reference", 1),
        },
    ),
    "peers": (
        "step of another optimizer",
        {"ns/param": ("ns_per_parameter", 4), "x lion_step_": ("times_lion_step", 2)},
    ),
    "products": (
        "INT8 product",
        {
            "TOP/s": ("tera_operations_per_second", 1),
            "% of _int_mm": ("percent_of_int_mm", 0),
            "x bf16": ("times_faster_than_bf16", 2),
        },
    ),
    "few_tokens": (
        "few tokens",
        {
            "us": ("microseconds", 1),
            "GB/s of codes": ("gigabytes_of_codes_per_second", 0),
            "x expanding": ("times_faster_than_expanding", 2),
            "x float weight": ("times_faster_than_float_weight", 2),
        },
    ),
}


def number(value: float | None, digits: int) -> str:
    """A cell; empty for what was not measured."""
    return "" if value is None else f"{value:.{digits}f}"


def gigabytes(n_bytes: int | None) -> str:
    """A cell in units of 1e9 bytes."""
    return number(None if n_bytes is None else n_bytes / 1e9, 2)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, an empty one first."""
    cells = [head, ["---"] * len(head), *rows]
    return ["", *("| " + " | ".join(row) + " |" for row in cells)]


def kernel_table(kernels: dict[str, Any], key: str) -> list[str]:
    """The table `key` of the kernel benchmark, over all shapes of weights."""
    what, columns = KERNEL_TABLES[key]
    rows = [
        [name, shape, *(number(row.get(figure), digits) for figure, digits in columns.values())]
        for shape, figures in kernels.items()
        for name, row in figures[key].items()
    ]
    return table([what, "weight", *columns], rows)


def memory_table(memory: dict[str, Any]) -> list[str]:
    """Peaks in GB by phase, and speed."""
    phases = ("forward", "backward", "step")
    rows = []
    for name, figures in memory["runs"].items():
        for length, row in figures["sequence_lengths"].items():
            peaks = [figures["load_peak_bytes"], *(row["peak_bytes"][phase] for phase in phases)]
            shown = [gigabytes(peak) for peak in (*peaks, row.get("predicted_bytes"))]
            speed = number(row["tokens_per_second"], 0)
            rows.append([name, str(figures["layers"]), length, *shown, speed])
    head = ["training", "layers", "tokens", "load", *phases, "predicted", "tokens/s"]
    about = f"{memory['config']}, batch 1, gradient checkpointing; gigabytes (1e9)."
    return ["", about, *table(head, rows)]


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    about = report["machine"]
    parts = [[name, p["status"], str(p["seconds"])] for name, p in report["parts"].items()]
    lines = [
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}, transformers "
        f"{about['transformers']}, commit {about['commit']}.",
        *table(["check", "result", "seconds"], parts),
    ]
    if report["kernels"]:
        for key in KERNEL_TABLES:
            lines += kernel_table(report["kernels"], key)
    if report["memory"]:
        lines += memory_table(report["memory"])
    if report["training"]:
        lines += ["", report["training"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all parts, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu_check")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("gpu_check needs a CUDA device; --device cpu rehearses it at toy size.")
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    real = options.device == "cuda"
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    interpreted = {**environment, "TRITON_INTERPRET": "1"}
    stop = time.monotonic() + TOTAL_SECONDS
    kernels_json, memory_json = output / "kernels.json", output / "memory.json"
    training = output / "training"
    for path in (kernels_json, memory_json, training / "table.md"):
        path.unlink(missing_ok=True)

    def left(limit: float) -> float:
        return min(limit, stop - time.monotonic())

    python, parts = sys.executable, {}
    if importlib.util.find_spec("pytest"):
        selection = ["-m", "gpu"] if real else ["-k", "33 or floats or leaves_rows"]
        parts["bits"] = run(
            "bit equality with the reference",
            [python, "-m", "pytest", "-q", "tests/kernels/test_triton.py", *selection],
            limit=left(150),
            environment=environment if real else interpreted,
        )
    else:
        parts["bits"] = missing("pytest is not installed")
    sanitizer = shutil.which("compute-sanitizer")
    if real and sanitizer:
        parts["memory errors"] = run(
            "compute-sanitizer",
            [sanitizer, "--error-exitcode", "1", python, "-c", SANITIZED, "cuda"],
            limit=left(60),
            environment=environment,
        )
    elif not real:
        parts["memory errors"] = run(
            "the program for compute-sanitizer, interpreted without it",
            [python, "-c", SANITIZED, "cpu"],
            limit=left(90),
            environment=interpreted | {"QFT_BACKEND": "triton"},
        )
    else:
        parts["memory errors"] = missing("compute-sanitizer is not here")
    device = ["--device", options.device]
    small = [] if real else ["--shapes", "64x300", "--tokens", "32", "--calls", "2"]
    parts["kernel speed"] = run(
        "kernel benchmark",
        [python, "scripts/benchmark_kernels.py", *device, *small, "--json", str(kernels_json)],
        limit=left(90),
        environment=environment,
    )
    size = ["--config", "llama2-7b"] if real else ["--config", "tiny", "--sequence-lengths", "32"]
    size += ["--compare", "--matmul", "dequantize", "int8"]
    parts["memory"] = run(
        "memory of training steps",
        [python, "scripts/profile_memory.py", *device, *size, "--json", str(memory_json)],
        limit=left(200),
        environment=environment,
    )
    size = ["--config", "llama-1b", "--batch", "2", "--sequence", "2048"]
    if not real:
        size = ["--config", "tiny", "--batch", "1", "--sequence", "32", "--steps", "1"]
    parts["training speed"] = run(
        "time of training steps beside AdamW and torchao",
        [python, "scripts/benchmark_training.py", *device, *size, "--only", "bf16", "QFT",
         "torchao", "--output", str(training)],
        limit=left(100),
        environment=environment,
    )  # fmt: skip

    report = {
        "machine": machine(options.device),
        "parts": parts,
        "kernels": read(kernels_json),
        "memory": read(memory_json),
        "training": text.read_text() if (text := training / "table.md").exists() else "",
    }
    (output / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "gpu_check.md").write_text(markdown(report))
    print((output / "gpu_check.md").read_text())
    if any(part["status"].startswith("failed") for part in parts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
