"""What the model card of a QFT run says beside the Trainer's own card."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer

from ..memory import MemoryLedger
from .optimizers import is_ours
from .support import quantization_config_of, unwrapped

TAGS = ["qft", "int8", "full-parameter-fine-tuning"]
MARK = "## INT8 full-parameter training"


def is_card(path: Path) -> bool:
    """Whether a `README.md` is a card that was written here."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def write_card(trainer: Trainer, *, ledger: MemoryLedger | None, base_model: str | None) -> None:
    """Add tags, base model and the sections on format, memory, loss and loading to the card.

    Args:
        trainer: After training; its output folder holds the Trainer's `README.md`, rewritten here.
        ledger: Of the training state; None if no step was taken.
        base_model: Hub name of the model that was tuned; None: what the model says of its origin.
    """
    path = Path(str(trainer.args.output_dir)) / "README.md"
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or []), *TAGS})
    config = getattr(trainer.model, "config", None)
    origin = base_model or card.data.base_model or getattr(config, "_name_or_path", "")
    if origin and not Path(origin).exists():  # a local path means nothing to a reader
        card.data.base_model = origin
    text, _, _ = card.text.partition(MARK)
    card.text = f"{text.rstrip()}\n\n{_sections(trainer, ledger)}"
    card.save(path)


def _stored(trainer: Trainer) -> str:
    """What was stored how, as the optimizer tells of itself; none was made without training."""
    optimizer: Any = unwrapped(trainer.optimizer)
    updated = f" and updated by {optimizer.description}" if is_ours(optimizer) else ""
    return f"Weights and gradients were stored as INT8 (QFT, arXiv:2310.07147){updated}"


def _sections(trainer: Trainer, ledger: MemoryLedger | None) -> str:
    name = Path(trainer.args.hub_model_id or str(trainer.args.output_dir)).name
    parts = [
        MARK,
        f"Every parameter was trained. {_stored(trainer)}, by qft_hf.",
        "### Weight format",
        _format_table(trainer),
        "### Memory of the model state",
        f"```\n{ledger}\n```" if ledger else "Not measured: no step was taken.",
        "### Loss",
        _loss_table(trainer.state.log_history),
        "### How to load it",
        "As INT8, to go on training or to save memory:",
        f'```python\nimport qft_hf  # registers the "qft" format\n'
        f"from transformers import {type(trainer.model).__name__}\n\n"
        f'model = {type(trainer.model).__name__}.from_pretrained("{name}")\n```',
        "Without qft_hf, after one conversion to an ordinary bf16 checkpoint:",
        f"```sh\nqft-hf export {name} {name}-bf16\n```",
        f'```python\nmodel = {type(trainer.model).__name__}.from_pretrained("{name}-bf16")\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _format_table(trainer: Trainer) -> str:
    config = quantization_config_of(trainer.model)
    if config is None:
        return "The model's config does not record the format."
    rows = {
        "codes": "INT8, symmetric, stochastic rounding of updates",
        "scales": "FP32, "
        + (f"per {config.group_size} inputs" if config.group_size else "per row"),
        "outliers in FP32": f"{100 * config.outlier_fraction:g} % of each row"
        + (", in the same columns" if config.matmul == "int8" else ""),
        "products": "INT8 x INT8 with stochastic rounding of gradients"
        if config.matmul == "int8"
        else "with dequantized weights",
        "modules kept in float": ", ".join(config.modules_to_not_convert or []) or "none",
    }
    return _table(("what", "how"), rows.items())


def _loss_table(history: list[dict[str, Any]]) -> str:
    rows = []
    for label, key in (("evaluation", "eval_loss"), ("training", "loss")):
        values = [entry[key] for entry in history if key in entry]
        if values:
            rows.append((label, f"{values[0]:.4f}", f"{values[-1]:.4f}"))
    return _table(("loss", "first", "last"), rows) if rows else "No loss was logged."


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
