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


def markdown(report: dict[str, Any]) -> str:
    """The tables."""
    about = report["machine"]
    lines = [
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}, transformers "
        f"{about['transformers']}, commit {about['commit']}.",
        "",
        "| check | result | seconds |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {p['status']} | {p['seconds']} |" for n, p in report["parts"].items()]
    if report["kernels"]:
        lines += ["", "| kernel | weight | ns/element | GB/s | % of a copy | x reference |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {name} | {shape} | {row['ns_per_parameter']:.4f} | "
            f"{row['gigabytes_per_second']:.0f} | {row['percent_of_copy']:.0f} | "
            f"{row['times_faster_than_reference']:.1f} |"
            for shape, figures in report["kernels"].items()
            for name, row in figures["operators"].items()
        ]
        lines += ["", "| step of another optimizer | weight | ns/param | x lion_step_ |"]
        lines += ["|---|---|---|---|"]
        lines += [
            f"| {name} | {shape} | {row['ns_per_parameter']:.4f} | {row['times_lion_step']:.2f} |"
            for shape, figures in report["kernels"].items()
            for name, row in figures["peers"].items()
        ]
        lines += ["", "| INT8 product | weight | TOP/s | % of _int_mm | x bf16 |"]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| {name} | {shape} | {row['tera_operations_per_second']:.1f} | "
            f"{row.get('percent_of_int_mm', 0):.0f} | "
            f"{row['times_faster_than_bf16']:.2f} |"
            for shape, figures in report["kernels"].items()
            for name, row in figures["products"].items()
        ]
        lines += ["", "| few tokens | weight | us | GB/s of codes | x expanding | x float weight |"]
        lines += ["|---|---|---|---|---|---|"]
        lines += [
            f"| {name} | {shape} | {row['microseconds']:.1f} | "
            f"{row['gigabytes_of_codes_per_second']:.0f} | "
            f"{row['times_faster_than_expanding']:.2f} | "
            f"{row['times_faster_than_float_weight']:.2f} |"
            for shape, figures in report["kernels"].items()
            for name, row in figures["few_tokens"].items()
        ]
    if report["memory"]:
        lines += [
            "",
            f"{report['memory']['config']}, batch 1, gradient checkpointing; gigabytes (1e9).",
            "",
            "| training | layers | tokens | load | forward | backward | step | predicted | "
            "tokens/s |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for name, figures in report["memory"]["runs"].items():
            for length, row in figures["sequence_lengths"].items():
                peaks = [figures["load_peak_bytes"]]
                peaks += [row["peak_bytes"][phase] for phase in ("forward", "backward", "step")]
                shown = " | ".join(f"{peak / 1e9:.2f}" for peak in peaks)
                predicted = row.get("predicted_bytes")
                lines.append(
                    f"| {name} | {figures['layers']} | {length} | {shown} | "
                    f"{f'{predicted / 1e9:.2f}' if predicted else ''} | "
                    f"{row['tokens_per_second']:.0f} |"
                )
    if report["training"]:
        seconds = report["training"]["median_seconds"]
        base = seconds.get("bf16 autocast AdamW")
        lines += ["", f"A training step, {report['training']['layers']} layers; milliseconds.", ""]
        lines += ["| way | forward | backward | step | whole | of bf16 AdamW |", "|---" * 6 + "|"]
        for name, way in seconds.items():
            cells = [
                f"{1e3 * way[phase]:.0f}" for phase in ("forward", "backward", "step", "whole")
            ]
            cells.append(f"{way['whole'] / base['whole']:.2f}" if base else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
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
    training_json = output / "training" / "figures.json"
    for path in (kernels_json, memory_json, training_json):
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
         "torchao", "--output", str(training_json.parent)],
        limit=left(100),
        environment=environment,
    )  # fmt: skip

    report = {
        "machine": machine(options.device),
        "parts": parts,
        "kernels": read(kernels_json),
        "memory": read(memory_json),
        "training": read(training_json),
    }
    (output / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "gpu_check.md").write_text(markdown(report))
    print((output / "gpu_check.md").read_text())
    if any(part["status"].startswith("failed") for part in parts.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
