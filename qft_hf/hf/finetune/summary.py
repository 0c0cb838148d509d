"""The results of a run in numbers: `summary.json` and the lines printed at the end."""

import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
import transformers

from ...version import __version__
from ..atomic_writes import atomic_path
from ..peak_memory import PeakMemory
from ..wording import counted, score_text
from .arguments import DataArguments
from .data import DataCounts


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the model and the data came from, in names that other machines know, too."""

    base_model: str | None  # on the Hub; None for a local one
    datasets: list[str]  # training data on the Hub
    files: list[str]  # names of local files and folders with training data
    evaluated: list[str] | None  # as in `CardFacts`

    @classmethod
    def of(cls, model: str, data: DataArguments) -> "Origin":
        """Separate local names from Hub names, as loading does: existing paths are local."""
        evaluated = data.eval_data
        if evaluated is not None and any(map(_is_local, evaluated)):
            evaluated = []
        return cls(
            base_model=None if Path(model).exists() else model,
            datasets=[source for source in data.train_data if not _is_local(source)],
            files=[Path(source).name for source in data.train_data if _is_local(source)],
            evaluated=evaluated,
        )


def _is_local(source: str) -> bool:
    """Return whether an entry of the data is a path or a URL, and not a name on the Hub."""
    return Path(source).exists() or ":" in source


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The numbers of a run."""

    model: str
    origin: Origin
    architecture: str  # class of the model
    task: str
    parameters: int
    trained_parameters: int
    side: dict[str, Any] | None  # `QSTConfig`, and how the base is stored; None: all parameters
    optimizer: str | None  # its description
    hyperparameters: dict[str, Any]
    steps: int
    before: dict[str, float] | None  # scores on the evaluation data; None if there is none
    after: dict[str, float] | None
    trained_tokens: int  # in all epochs, without padding
    train_seconds: float  # in training steps since the last resume: no loading, evaluation, saving
    tokens_per_second: float  # during `train_seconds`, of all processes together
    wall_seconds: float  # whole run
    peak_memory: PeakMemory  # of the process that used the most
    peak_bytes: list[int]  # of each process
    state_bytes: dict[str, int]  # by kind, in process 0, just before an optimizer step
    bytes_per_parameter: float
    percent_of_fp32_adam: float
    sampled: dict[str, Any]  # a sample of the weights: `Health.sample_changes`
    train_data: DataCounts
    eval_data: DataCounts | None
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """Write as JSON; inf and NaN, which JSON does not have, become null."""
        with atomic_path(path) as draft:
            draft.write_text(json.dumps(finite(asdict(self)), indent=2) + "\n", encoding="utf-8")

    @property
    def title(self) -> str:
        """The name of the model, what was trained, and in which format."""
        name = Path(self.model).name
        if self.side is None:
            return f"{name}: {self.parameters / 1e6:,.1f} M parameters, INT8"
        trained = f"{self.trained_parameters / 1e6:,.2f} M parameters"
        return f"{name}, {self.side['base']}: side network of {trained}"

    @property
    def _trained(self) -> str:
        if self.trained_parameters == self.parameters:
            return f"{self.parameters:,} parameters"
        return f"{self.trained_parameters:,} of {self.parameters:,} parameters"

    def __str__(self) -> str:
        """Return the scores before and after, and the time and memory that the run took."""
        n = len(self.peak_bytes)
        together, each = (f" of {n} processes", f" on each of {n}") if n > 1 else ("", "")
        peaks = ", ".join(f"{n_bytes / 1e9:.2f}" for n_bytes in self.peak_bytes)
        lines = []
        if self.before is not None and self.after is not None:
            lines += [
                f"{name + ' before -> after':<30}{score_text(self.before[name])} -> "
                f"{score_text(self.after[name])}"
                for name in self.after
            ]
        lines.append(
            f"{'trained':<30}{self._trained}, {counted(self.steps, 'step')}, "
            f"{counted(self.trained_tokens, 'token')}"
        )
        if self.train_seconds:  # 0 if a finished run was resumed: nothing was measured
            lines.append(
                f"{'speed':<30}{self.tokens_per_second:,.0f} tokens/s{together} in "
                f"{self.train_seconds:,.0f} s of training; {self.wall_seconds:,.0f} s in all"
            )
        if self.state_bytes:
            lines.append(
                f"{'model state':<30}{self.bytes_per_parameter:.2f} bytes a parameter, "
                f"{self.percent_of_fp32_adam:.1f} % of FP32 Adam{each}"
            )
        lines += [
            f"{'training data':<30}{self.train_data}",
            f"{'peak memory':<30}{peaks} GB{each}, {self.peak_memory.what}",
        ]
        return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    modules = (torch, transformers, datasets, evaluate)
    return {
        "qft_hf": __version__,
        "python": platform.python_version(),
        **{module.__name__: str(module.__version__) for module in modules},
    }


def finite(value: Any) -> Any:
    """Return a value with None for inf and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
