"""Compare a training step on a GPU with AdamW's and with another checkout's, in 90 seconds.

    python scripts/benchmarks/gpu_quick.py
    python scripts/benchmarks/gpu_quick.py --against ../before    # a checkout without the change
    python scripts/benchmarks/gpu_quick.py --device cpu           # the same path at toy size

`benchmark_training.py` trains twelve layers of a 1B Llama on one sequence of 512 tokens and on one
of 4,096. With `--against`, the package in the other folder is measured too, by this checkout's
benchmark, and the last table has this package's figures divided by the other's: below 1 is faster.
AdamW is the same in both, so its rows show the noise of the ratios.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line

BENCHMARK = Path(__file__).resolve().parent / "benchmark_training.py"
SIZES = {
    "cuda": ["--config", "llama-1b", "--layers", "12", "--sequence_length", "512", "4096"],
    "cpu": ["--config", "tiny", "--sequence_length", "32", "--steps", "1"],
}

# By sequence length and way, as `benchmark_training.py` writes them.
Figures = dict[str, dict[str, dict[str, float]]]


def measure(package: Path, device: str, output: Path) -> Figures:
    """Run the benchmark with the `qft_hf` in the folder `package`.

    Raises:
        subprocess.CalledProcessError: The benchmark failed and has printed why.
    """
    command = [sys.executable, str(BENCHMARK), "--device", device, *SIZES[device]]
    command += ["--batch_size", "1", "--only", "bf16", "QFT", "--output", str(output)]
    paths = [str(package.resolve()), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    print(f"== {package}", flush=True)
    subprocess.run(command, env=environment, check=True)
    figures: Figures = json.loads((output / "figures.json").read_text())["median_seconds"]
    return figures


def ratios(now: Figures, before: Figures) -> dict[str, dict[str, float]]:
    """Return the ratio of each figure to its value before, if both have it and it was not zero."""
    return {
        f"{way}, {length} tokens": {
            name: value / before[length][way][name]
            for name, value in figures.items()
            if before[length][way].get(name)
        }
        for length, ways in now.items()
        for way, figures in ways.items()
        if way in before[length]
    }


def main() -> None:
    """Measure one or two packages, and write the report."""
    parser = command_line(__doc__, device="cuda")
    parser.add_argument("--against", type=Path, help="a checkout to compare with")
    options = parser.parse_args()
    if options.against and not (options.against / "qft_hf" / "__init__.py").exists():
        parser.error(f"--against must be a checkout of this project, got {options.against}")

    now = measure(report.ROOT, options.device, options.output / "now")
    figures = {"now": now}
    text = (options.output / "now" / "table.md").read_text()
    if options.against:
        figures["before"] = measure(options.against, options.device, options.output / "before")
        compared = report.figures_table("now / before", ratios(now, figures["before"]))
        text = f"{text}\n\nAgainst {options.against}\n\n{compared}"
    report.write(options, figures, text)
    report.finish(options, text)


if __name__ == "__main__":
    main()
