"""`estimate_memory`: will it fit, before anything is loaded; and `recommend`: how it will."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ..memory import MemoryEstimate, Workload, estimate
from .config import QFTConfig

MODES = ("stack", "release")
# Of a card's memory, what is left for the run: the driver, the libraries and fragments of the
# allocator take the rest.
USABLE = 0.92


def estimate_memory(
    model_or_config: nn.Module | PreTrainedConfig,
    *,
    config: QFTConfig | None = None,
    gradient: str = "stack",
    momentum_bits: int = 8,
    batch_size: int = 1,
    sequence_length: int = 2048,
    gradient_checkpointing: bool = True,
    chunked_loss: bool = False,
) -> MemoryEstimate:
    """Predict the memory of training a decoder model; no weight is loaded.

    Args:
        model_or_config: A model, on any device, or its configuration, of which a skeleton without
            storage is made, in the dtype that the configuration names (else FP32).
        config: The weight format; None: the default.
        gradient: `"stack"` or `"release"`.
        momentum_bits: 8.
        batch_size: Sequences of one micro-batch.
        sequence_length: Tokens of one sequence.
        gradient_checkpointing: Whether layers keep their input only.
        chunked_loss: Whether logits never exist whole; see `chunk_loss_`.

    Returns:
        Bytes by kind. States are exact to the byte; activations are arithmetic for a decoder
        with gated MLP.

    Raises:
        ValueError: `gradient` or `momentum_bits` is not supported, or the configuration lacks a
            size of the decoder.
    """
    if gradient not in MODES:
        raise ValueError(f"gradient must be {' or '.join(map(repr, MODES))}, got {gradient!r}.")
    if momentum_bits != 8:
        raise ValueError(f"momentum_bits must be 8, got {momentum_bits}.")
    if isinstance(model_or_config, nn.Module):
        model: Any = model_or_config
    else:
        dtype = getattr(model_or_config, "dtype", None) or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_or_config, dtype=dtype)
    workload = _workload(
        model,
        tokens=batch_size * sequence_length,
        checkpointing=gradient_checkpointing,
        chunked_loss=chunked_loss,
    )
    return estimate(model, workload, config or QFTConfig(), gradient=gradient)


def _workload(model: Any, *, tokens: int, checkpointing: bool, chunked_loss: bool) -> Workload:
    config = model.config.get_text_config()
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    missing = [name for name in (*names, "vocab_size") if getattr(config, name, None) is None]
    if missing:
        raise ValueError(
            f"{type(config).__name__} has no {', '.join(missing)}, which the activations are "
            "computed from. Give the configuration of a decoder; memory_ledger measures any model."
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Workload(
        tokens=tokens,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention=heads * width,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * width,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
        compute_bytes=model.dtype.itemsize,
        checkpointing=checkpointing,
        chunked_loss=chunked_loss,
    )


@dataclass(frozen=True, slots=True)
class Recommendation:
    """How a model fits a card, or the nearest miss.

    Attributes:
        gradient: The mode; stack where it fits, since it clips at no cost.
        gradient_checkpointing: Off where the activations fit.
        estimate: Of this choice.
        usable_bytes: What the card has left for it.
    """

    gradient: str
    gradient_checkpointing: bool
    estimate: MemoryEstimate
    usable_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the estimate is within the usable memory."""
        return self.estimate.total_bytes <= self.usable_bytes

    def __str__(self) -> str:
        """One line."""
        total, usable = self.estimate.total_bytes / 1e9, self.usable_bytes / 1e9
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"gradient={self.gradient}, gradient_checkpointing={self.gradient_checkpointing}: "
            f"{total:.1f} GB of {usable:.1f} usable, {verdict}"
        )


def recommend(
    model_or_config: nn.Module | PreTrainedConfig,
    gpu_memory: float,
    sequence_length: int = 2048,
    batch_size: int = 1,
    *,
    config: QFTConfig | None = None,
    chunked_loss: bool = False,
) -> Recommendation:
    """Choose the mode for a card: the fastest that fits, else the smallest.

    Args:
        model_or_config: As in `estimate_memory`.
        gpu_memory: Of the card, in GB of 1e9 bytes, as it is sold.
        sequence_length: Tokens of one sequence.
        batch_size: Sequences of one micro-batch.
        config: The weight format; None: the default.
        chunked_loss: As in `estimate_memory`.
    """
    usable = int(USABLE * gpu_memory * 1e9)
    # From fastest to smallest: checkpointing costs a third more work, release costs none, but
    # clipping by the exact norm then takes a second backward pass.
    for gradient, checkpointing in (
        ("stack", False),
        ("release", False),
        ("stack", True),
        ("release", True),
    ):
        choice = Recommendation(
            gradient,
            checkpointing,
            estimate_memory(
                model_or_config,
                config=config,
                gradient=gradient,
                batch_size=batch_size,
                sequence_length=sequence_length,
                gradient_checkpointing=checkpointing,
                chunked_loss=chunked_loss,
            ),
            usable,
        )
        if choice.fits:
            break
    return choice
