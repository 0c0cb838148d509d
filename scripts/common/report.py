"""The report of a measuring command: `figures.json` and `table.md` in its output folder."""

import datetime
import json
import platform
import subprocess
from argparse import Namespace
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from math import floor, log10, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "torchao",
    "bitsandbytes",
    "flashoptim",
    "lomo-optim",
)


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table; None is an empty cell, for a figure that was not measured."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    cells = (["" if cell is None else str(cell) for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def number(value: float | None, digits: int) -> str | None:
    """Return a cell with this many digits after the decimal point."""
    return None if value is None else f"{value:.{digits}f}"


def spread(values: list[float], digits: int, *, of_mean: bool = False) -> str | None:
    """Return a cell with the mean and, of several values, the standard deviation.

    `of_mean` takes the standard error of the mean instead.
    """
    if len(values) < 2:
        return number(values[0], digits) if values else None
    deviation = stdev(values) / (sqrt(len(values)) if of_mean else 1)
    return f"{mean(values):.{digits}f} +- {deviation:.{digits}f}"


def figures_table(what: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    """Return a table with a row of figures per name, to three digits; `what` heads the names."""
    keys = dict.fromkeys(key for row in figures.values() for key in row)

    def shown(value: float | None) -> str | None:
        return number(value, max(0, 2 - floor(log10(abs(value) or 1))) if value else 0)

    rows = [[name, *(shown(row.get(key)) for key in keys)] for name, row in figures.items()]
    return table([what, *(key.replace("_", " ") for key in keys)], rows)


def device_name(device: torch.device) -> str:
    """Return the device's name; for a CPU also its INT8 and BF16 instructions and threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "CPU")
    vnni = "with" if torch.cpu._is_vnni_supported() else "without"
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    threads = torch.get_num_threads()
    return f"{model} {vnni} AVX512-VNNI and {bf16} AVX512-BF16, {threads} thread(s)"


def machine(device: torch.device | str) -> dict[str, str]:
    """Return device, versions, commit and date, without which a figure is worth nothing."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        commit = found.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "device": device_name(torch.device(device)),
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "python": platform.python_version(),
        "cuda": str(torch.version.cuda),
        **versions,
    }


def write(options: Namespace, figures: Mapping[str, Any], text: str) -> None:
    """Write the figures and their tables. Call it after each result: a run may be cut short.

    Args:
        options: The command line, with `output`, the folder, and perhaps `device`.
        figures: Measurements, written to `figures.json` together with settings and machine.
        text: Content of `table.md` below the device and the versions.
    """
    about = machine(getattr(options, "device", "cpu"))
    settings = {name: str(value) for name, value in vars(options).items()}
    everything = {"machine": about, "settings": settings, **figures}
    head = ", ".join(f"{name} {value}" for name, value in about.items() if value != "missing")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "figures.json").write_text(json.dumps(everything, indent=2) + "\n")
    (options.output / "table.md").write_text(f"{head.removeprefix('device ')}.\n\n{text}\n")


def finish(options: Namespace, text: str) -> None:
    """Print the tables and the folder that they are in."""
    print(f"\n{text}\n\nwritten to {options.output}")
