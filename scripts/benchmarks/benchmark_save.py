"""Cost of checksums when a checkpoint or a model is saved, as a share of the time of the save.

A model with random weights takes one step. It is then saved repeatedly by `QFTTrainer`, including
the optimizer's momentum, and by `save_pretrained`. Both write to the page cache and wait for the
disk. Reported are medians: single times differ by half if other programs use the disk, too.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line
from common.shapes import model_config

from qft_hf import QFTConfig, QFTTrainer, QFTTrainingArguments, quantize_model_
from qft_hf.hf import atomic_writes, checkpoint, quantizer

# Functions that are timed within a save: module, name there, and name in the report.
PARTS = (
    (quantizer, "metadata", "sums_of_tensors"),
    (checkpoint, "_digest", "sums_of_files"),
    (atomic_writes, "_sync", "waiting_for_the_disk"),
)


@contextmanager
def timed(milliseconds: dict[str, float]) -> Iterator[None]:
    """Within the context, add the time of each call of `PARTS` to `milliseconds`."""

    def wrapped(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                milliseconds[part] += 1e3 * (time.perf_counter() - start)

        return call

    originals = [(module, name, getattr(module, name)) for module, name, _ in PARTS]
    for (module, name, part), (*_, function) in zip(PARTS, originals, strict=True):
        setattr(module, name, wrapped(function, part))
    try:
        yield
    finally:
        for module, name, function in originals:
            setattr(module, name, function)


def measure(save: Callable[[], object], folder: Path, *, n_saves: int) -> dict[str, float]:
    """Return medians in milliseconds, shares of the whole in percent, and megabytes written."""
    rows = []
    for _ in range(n_saves + 1):
        row = {"whole": 0.0} | {part: 0.0 for *_, part in PARTS}
        with timed(row):
            start = time.perf_counter()
            save()
            row["whole"] = 1e3 * (time.perf_counter() - start)
        rows.append(row)
    of_all = {f"{part}_ms": median(row[part] for row in rows[1:]) for part in rows[0]}
    shares = {
        f"{part}_%": median(100 * row[part] / row["whole"] for row in rows[1:])
        for part in ("sums_of_tensors", "sums_of_files")
    }
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"megabytes": written / 1e6, **of_all, **shares}


def trained(config: str, layers: int | None, folder: Path) -> QFTTrainer:
    """Return a trainer that has taken one step on copies of one short sequence."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(config, layers))
    tokens = list(range(16))
    trainer = QFTTrainer(
        model=quantize_model_(model, QFTConfig()),
        args=QFTTrainingArguments(
            output_dir=str(folder), max_steps=1, save_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"input_ids": tokens, "labels": tokens}] * 8),
    )  # fmt: skip
    trainer.train()
    return trainer


def main() -> None:
    """Measure both ways to save, and write the report."""
    options = command_line(
        __doc__, config="smollm2-135m", layers=None, repeats=10, threads=1
    ).parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=".") as name:  # /tmp may be in memory, not on a disk
        folder = Path(name)
        trainer = trained(options.config, options.layers, folder / "run")
        model: Any = trainer.model
        ways: dict[str, tuple[Callable[[], object], Path]] = {
            "QFTTrainer's checkpoint": (
                lambda: trainer._save_checkpoint(model, trial=None),
                folder / "run",
            ),
            "save_pretrained": (lambda: model.save_pretrained(folder / "model"), folder / "model"),
        }
        figures = {
            name: measure(save, where, n_saves=options.repeats)
            for name, (save, where) in ways.items()
        }
    text = report.figures_table("way to save", figures)
    report.write(options, {"saves": figures}, text)
    report.finish(options, text)


if __name__ == "__main__":
    main()
