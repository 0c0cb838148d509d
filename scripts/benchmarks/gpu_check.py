"""Run every check that needs a GPU: memory errors, equal bits, speed, and the 7B run.

    python scripts/benchmarks/gpu_check.py
    python scripts/benchmarks/gpu_check.py --device cpu    # the same paths at toy size, interpreted

Runs from a checkout with torch, triton, transformers and accelerate. pytest, pytest-xdist and
compute-sanitizer are used if available; nothing is installed. Each part has its own time limit, and
all together take nine minutes at most; the report is written after each. Exits with 1 if a part
failed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line

TOTAL_SECONDS = 530
HERE = Path(__file__).resolve().parent


@dataclass
class Part:
    """One command of the check.

    Attributes:
        name: Name in the report.
        command: Command line; not run if `missing` is set.
        limit: Time limit in seconds.
        variables: Environment variables to add.
        folder: Folder in which it writes a `table.md`; None if its only result is its exit status.
        missing: Why it cannot run here; empty if it can.
    """

    name: str
    command: list[str]
    limit: float
    variables: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None
    missing: str = ""

    def run(self, seconds_left: float) -> dict[str, Any]:
        """Run the command; return its status, time and table, and the end of its output."""
        print(f"== {self.name} {self.missing}", flush=True)
        if self.missing:
            return {"status": f"not run: {self.missing}", "seconds": 0.0, "output": "", "table": ""}
        path = None if self.folder is None else self.folder / "table.md"
        if path:
            path.unlink(missing_ok=True)
        begin = time.monotonic()
        try:
            done = subprocess.run(
                self.command,
                cwd=report.ROOT,
                env={**os.environ, **self.variables},
                timeout=max(1.0, min(self.limit, seconds_left)),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            status, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            status, output = 124, error.stdout or b""
            output = output.decode(errors="replace") if isinstance(output, bytes) else output
        print(output[-3000:], flush=True)
        return {
            "status": "passed" if status == 0 else f"failed ({status})",
            "seconds": round(time.monotonic() - begin, 1),
            "output": output[-6000:],
            "table": path.read_text() if path and path.exists() else "",
        }


def parts(folder: Path, *, real: bool) -> list[Part]:
    """Return the parts in order; `real` is on a GPU, otherwise they run at toy size on a CPU."""
    device = ["--device", "cuda" if real else "cpu"]
    interpreted = {} if real else {"TRITON_INTERPRET": "1"}

    def benchmark(name: str, limit: float, script: str, *flags: str) -> Part:
        output = folder / name.replace(" ", "_").replace(",", "")
        command = [sys.executable, str(HERE / f"{script}.py"), *device, *flags]
        return Part(name, [*command, "--output", str(output)], limit, folder=output)

    every_kernel = [sys.executable, str(HERE / "every_kernel.py")]
    sanitizer = shutil.which("compute-sanitizer")
    if real:
        command = [str(sanitizer), "--error-exitcode", "1", *every_kernel, "cuda"]
        memory_errors = Part("memory errors, by compute-sanitizer", command, 60)
        memory_errors.missing = "" if sanitizer else "compute-sanitizer is not found"
    else:
        variables = interpreted | {"QFT_BACKEND": "triton"}
        memory_errors = Part("every kernel, interpreted", [*every_kernel, "cpu"], 240, variables)

    pytest = [sys.executable, "-m", "pytest", "-q", "tests/kernels/test_triton.py"]
    pytest += ["-n", "auto"] if importlib.util.find_spec("xdist") else []
    pytest += ["-m", "gpu"] if real else ["-k", "33 or floats or leaves_rows"]
    bits = Part("bit equality with the reference", pytest, 150 if real else 300, interpreted)
    bits.missing = "" if importlib.util.find_spec("pytest") else "pytest is not installed"

    kernels = [] if real else ["--shapes", "64x300", "--tokens", "32", "--calls", "2"]
    training = ["--batch_size", "1", "--only", "bf16", "QFT", "FlashOptim"]
    memory = ["--compare", "--matmul", "dequantize", "int8"]
    lengths = ["--sequence_length", "512", "2048", "8192"]
    compiled = ["--compile", "--batch_size", "1", "--only", "bf16", "QFT"]
    graphs = ["--sequence_length", "512"]
    if real:
        training += ["--config", "llama-1b", *lengths]
        memory += lengths
        compiled += ["--config", "llama-1b", "--sequence_length", "2048"]
        graphs += ["--config", "llama-1b", "--layers", "4"]
    else:
        lengths = ["--sequence_length", "32"]
        graphs = ["--config", "tiny", "--steps", "7", *lengths]
        training += ["--config", "tiny", "--steps", "1", *lengths]
        compiled += ["--config", "tiny", "--steps", "1", *lengths]
        memory += ["--config", "tiny", *lengths]
    return [
        memory_errors,
        bits,
        benchmark("steps as CUDA graphs", 80, "graph_check", *graphs),
        benchmark("kernel speed", 90, "benchmark_kernels", *kernels),
        benchmark("training speed, compiled", 100, "benchmark_training", *compiled),
        benchmark("training speed", 130, "benchmark_training", *training),
        benchmark("memory", 230, "profile_memory", *memory),
    ]


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """Return a table of which parts passed, followed by the tables of all parts."""
    rows = [[name, part["status"], part["seconds"]] for name, part in results.items()]
    tables = [f"## {name}\n\n{part['table']}" for name, part in results.items() if part["table"]]
    return "\n\n".join([report.table(["check", "result", "seconds"], rows), *tables])


def main() -> None:
    """Run all parts, and write the report after each."""
    options = command_line(__doc__, device="cuda").parse_args()
    real = options.device == "cuda"
    if real and not torch.cuda.is_available():
        raise SystemExit("gpu_check needs a CUDA device; --device cpu runs it at toy size.")
    options.output = options.output.resolve()
    paths = [str(report.ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    stop = time.monotonic() + TOTAL_SECONDS
    results: dict[str, dict[str, Any]] = {}
    for part in parts(options.output, real=real):
        results[part.name] = part.run(stop - time.monotonic())
        report.write(options, {"parts": results}, markdown(results))
    report.finish(options, markdown(results))
    if any(part["status"].startswith("failed") for part in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
