"""`estimate_memory`: will it fit, before anything is loaded; and `recommend`: how it will."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..layout import MOMENTUM_BITS, OPTIMIZERS
from ..memory import Base, MemoryEstimate, Workload, estimate, estimate_side
from ..nn import conversion_plan
from ..side import QSTConfig, attach_side_network, side_config
from .absent_model import refused_if_absent
from .base import BASES, nf4_weights
from .config import QFTConfig
from .positions import n_positions

MODES = ("stack", "release")
# Of a card's memory, what is left for the run: the driver, the libraries and fragments of the
# allocator take the rest.
USABLE = 0.92
_FINEST_FIRST = ("float", "int8", "nf4")
LONGEST = 2**20  # tokens of a sequence: longer ones are not looked for

# A model, its configuration, or where that is: a folder with a config.json, or a name on the hub.
ModelSource = nn.Module | PreTrainedConfig | str | Path


def estimate_memory(
    model_or_config: ModelSource,
    *,
    config: QFTConfig | None = None,
    gradient: str = "stack",
    momentum_bits: int = 8,
    optimizer: str = "qft_lion",
    batch_size: int = 1,
    sequence_length: int = 2048,
    gradient_checkpointing: bool = True,
    chunked_loss: bool = False,
    n_processes: int = 1,
) -> MemoryEstimate:
    """Predict the memory of training a decoder model; no weight is loaded.

    Args:
        model_or_config: A model, on any device; or its configuration, a folder with a config.json
            or a name on the hub, of which a skeleton without storage is made, in the dtype that the
            configuration names (else FP32).
        config: The weight format; None: the default.
        gradient: `"stack"` or `"release"`.
        momentum_bits: Of Lion: 8 or 4; 0: none, as `qft_sgd` has it.
        optimizer: `"qft_lion"`, `"qft_adamw"` or `"qft_sgd"`, as `TrainingArguments.optim`.
        batch_size: Sequences of one micro-batch.
        sequence_length: Tokens of one sequence.
        gradient_checkpointing: Whether layers keep their input only.
        chunked_loss: Whether logits never exist whole; see `chunk_loss_`.
        n_processes: That train together, a GPU each. The bytes are those of the first, which owns
            the most rows; `batch_size` is that of each.

    Returns:
        Bytes by kind. States are exact to the byte; activations are arithmetic for a decoder
        with gated MLP.

    Raises:
        FileNotFoundError: There is no such folder, and no such model that the hub lets us see.
        ValueError: `gradient`, `momentum_bits` or `optimizer` is not supported, `batch_size`,
            `sequence_length` or `n_processes` is below 1, or the configuration lacks a size of the
            decoder.
    """
    for name, value, choices in (
        ("gradient", gradient, MODES),
        ("momentum_bits", momentum_bits, MOMENTUM_BITS),
        ("optimizer", optimizer, OPTIMIZERS),
    ):
        if value not in choices:
            raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}.")
    if n_processes < 1:
        raise ValueError(f"n_processes must be 1 or more, got {n_processes}.")
    _refuse_sizes(batch_size, sequence_length)
    model = skeleton(model_or_config)
    workload = _workload(
        model.config.get_text_config(),
        compute_bytes=model.dtype.itemsize,
        tokens=batch_size * sequence_length,
        checkpointing=gradient_checkpointing,
        chunked_loss=chunked_loss,
    )
    return estimate(
        model,
        workload,
        config or QFTConfig(),
        gradient=gradient,
        momentum_bits=momentum_bits,
        optimizer=optimizer,
        n_processes=n_processes,
    )


def skeleton(source: ModelSource) -> Any:
    """Return the model, or one without storage made from its configuration.

    Raises:
        FileNotFoundError: There is no such folder, and no such model that the hub lets us see.
    """
    if isinstance(source, nn.Module):
        return source
    if isinstance(source, str | Path):
        folder = Path(source)
        with refused_if_absent(source):
            if folder.is_dir() and not (folder / "config.json").is_file():
                raise FileNotFoundError(folder / "config.json")
            source = AutoConfig.from_pretrained(source)
    dtype = getattr(source, "dtype", None) or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(source, dtype=dtype)


def estimate_side_memory(
    model_or_config: ModelSource,
    side: QSTConfig | None = None,
    *,
    base: str = "nf4",
    config: QFTConfig | None = None,
    batch_size: int = 1,
    sequence_length: int = 2048,
    gradient_checkpointing: bool = True,
) -> MemoryEstimate:
    """Predict the memory of training a side network with AdamW; no weight is loaded.

    Args:
        model_or_config: As in `estimate_memory`.
        side: The side network; None: the default.
        base: How the frozen base is stored: `"nf4"`, `"int8"` or `"float"`, which is the dtype that
            the configuration names (else FP32).
        config: The format of a base in INT8; None: the default.
        batch_size: Sequences of one micro-batch.
        sequence_length: Tokens of one sequence.
        gradient_checkpointing: Whether side layers keep their input only.

    Returns:
        Bytes by kind. States are exact to the byte; activations are arithmetic for a decoder
        with gated MLP.

    Raises:
        FileNotFoundError: As `estimate_memory`.
        ValueError: `base` is none of these, the side network does not fit the model, or as
            `estimate_memory`.
    """
    estimator = _SideEstimator(model_or_config, side or QSTConfig(), base, config or QFTConfig())
    return estimator(
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
    )


class _SideEstimator:
    """The arithmetic of one side network on one base; the models it takes are made once."""

    def __init__(self, source: ModelSource, side: QSTConfig, base: str, config: QFTConfig) -> None:
        if base not in BASES:
            raise ValueError(f"base must be {' or '.join(map(repr, BASES))}, got {base!r}.")
        origin = skeleton(source)
        with torch.device("meta"):  # another one, to attach to
            model = type(origin)._from_config(origin.config, dtype=origin.dtype)
        self.base = Base()
        if base == "nf4":
            self.base = Base(nf4=nf4_weights(model))
        elif base == "int8":
            plan = conversion_plan(model, config.modules_to_not_convert)
            self.base = Base(plan=plan, spec=config)
        self.side = side
        self.sizes = (model.config.get_text_config(), side_config(model.config, side))
        self.model = attach_side_network(model, side)

    def __call__(
        self, *, batch_size: int, sequence_length: int, gradient_checkpointing: bool
    ) -> MemoryEstimate:
        _refuse_sizes(batch_size, sequence_length)
        work, side_work = (
            _workload(
                sizes,
                compute_bytes=self.model.dtype.itemsize,
                tokens=batch_size * sequence_length,
                checkpointing=gradient_checkpointing,
                chunked_loss=False,
            )
            for sizes in self.sizes
        )
        return estimate_side(self.model, self.base, work, side_work, self.side)


def _refuse_sizes(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise ValueError(
            f"batch_size and sequence_length must be 1 or more, got {batch_size} and "
            f"{sequence_length}."
        )


def _workload(
    config: Any, *, compute_bytes: int, tokens: int, checkpointing: bool, chunked_loss: bool
) -> Workload:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in names if getattr(config, name, None) is None]
    intermediate, choices = (None, 0) if missing else _mlp(config)
    if intermediate is None and not missing:
        missing = ["intermediate_size"]
    if missing or intermediate is None:
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
        intermediate=intermediate,
        vocabulary=config.vocab_size,
        compute_bytes=compute_bytes,
        checkpointing=checkpointing,
        chunked_loss=chunked_loss,
        experts_per_token=choices,
    )


def _mlp(config: Any) -> tuple[int | None, int]:
    """Width of all that a token passes between the products of a layer's MLP; how many experts."""
    width = getattr(config, "intermediate_size", None)
    if width is None and hasattr(config, "n_inner"):  # GPT-2
        width = config.n_inner or 4 * config.hidden_size
    choices = getattr(config, "num_experts_per_tok", None) or 0
    shared = getattr(config, "n_shared_experts", None) or 0
    if width is None or not choices:
        return width, 0
    of_expert = getattr(config, "moe_intermediate_size", None) or width
    return max(width, (choices + shared) * of_expert), choices  # of some models not all layers


@dataclass(frozen=True, slots=True)
class Recommendation:
    """How a model fits a card, or the nearest miss.

    Attributes:
        gradient: The mode; stack where it fits, since it clips at no cost. Of a side network: its
            own gradients always wait for the step.
        gradient_checkpointing: Off where the activations fit.
        momentum_bits: As asked for: fewer than 8 cost quality, which nothing here decides to pay.
        optimizer: As asked for.
        estimate: Of this choice.
        usable_bytes: What the card has left for it.
        batch_size: Sequences of one micro-batch, as asked for.
        longest_sequence: Tokens of the longest sequences that fit with this choice and batch size;
            0 if none does, and `LONGEST` also for longer ones.
        positions: `n_positions` of the model.
        base: Of a side network, how its frozen base is stored; None: every parameter is trained.
    """

    gradient: str
    gradient_checkpointing: bool
    momentum_bits: int
    optimizer: str
    estimate: MemoryEstimate
    usable_bytes: int
    batch_size: int
    longest_sequence: int
    positions: int | None
    base: str | None = None

    @property
    def missing_bytes(self) -> int:
        """What the card lacks; 0 if the estimate fits."""
        return max(0, self.estimate.total_bytes - self.usable_bytes)

    @property
    def fits(self) -> bool:
        """Whether the estimate is within the usable memory."""
        return not self.missing_bytes

    def __str__(self) -> str:
        """One line: the choice, whether it fits, and what would."""
        total, usable = self.estimate.total_bytes / 1e9, self.usable_bytes / 1e9
        way = f"gradient={self.gradient}" if self.base is None else f"method=qst, base={self.base}"
        each = f" of each of {n}" if (n := self.estimate.n_processes) > 1 else ""
        line = (
            f"{way}, gradient_checkpointing={self.gradient_checkpointing}"
            f"{'' if self.momentum_bits == 8 else f', momentum_bits={self.momentum_bits}'}"
            f"{'' if self.optimizer == 'qft_lion' else f', optim={self.optimizer}'}: "
            f"{total:.1f} GB of {usable:.1f} usable{each}, "
        )
        if self.fits and self.longest_sequence >= (self.positions or LONGEST):
            length = (
                f"up to the model's {self.positions:,} tokens" if self.positions else "any length"
            )
            return f"{line}fits, with sequences of {length}"
        if self.fits:
            return f"{line}fits, with sequences of up to {self.longest_sequence:,} tokens"
        line += f"does not fit: {self.missing_bytes / 1e9:.1f} GB are missing. "
        if self.longest_sequence:
            return (
                f"{line}Sequences of up to {self.longest_sequence:,} tokens would fit, at batch "
                f"size {self.batch_size}"
            )
        line += (
            f"The states alone take {self.estimate.state_bytes / 1e9:.1f} GB: take a larger card"
        )
        if self.base is not None:
            return f"{line} or a smaller model"
        return f"{line}, several of them or a smaller model, or train a side network: method qst"


def recommend(
    model: ModelSource,
    gpu_memory: float,
    sequence_length: int = 2048,
    batch_size: int = 1,
    *,
    config: QFTConfig | None = None,
    momentum_bits: int = 8,
    optimizer: str = "qft_lion",
    chunked_loss: bool = False,
    side: QSTConfig | None = None,
    base: str | None = None,
    n_processes: int = 1,
) -> Recommendation:
    """Choose the mode for a card: the fastest that fits, else the smallest.

    Args:
        model: As in `estimate_memory`; no weight is loaded.
        gpu_memory: Of the card, in GB of 1e9 bytes, as it is sold.
        sequence_length: Tokens of one sequence.
        batch_size: Sequences of one micro-batch.
        config: The weight format; None: the default.
        momentum_bits: As in `estimate_memory`; 4 and 0 are never chosen unasked.
        optimizer: As in `estimate_memory`.
        chunked_loss: As in `estimate_memory`.
        side: A side network, which alone is trained, with AdamW; None: every parameter is.
        base: How the frozen base of `side` is stored; None: in as many bits as fit.
        n_processes: That train together, each on such a card, as in `estimate_memory`.

    Raises:
        FileNotFoundError: As `estimate_memory`.
        ValueError: `gpu_memory` is not positive, `side` is given with several processes, or as
            `estimate_memory` and `estimate_side_memory`.
    """
    if gpu_memory <= 0:
        raise ValueError(f"gpu_memory must be positive, in GB, got {gpu_memory}.")
    if side is not None and n_processes > 1:
        raise ValueError(
            f"n_processes={n_processes} and side were given. Processes share the gradients and the "
            "momentum of INT8 weights that are trained, and beside a side network none are: each "
            "would take what one does. Leave n_processes out."
        )
    source, usable = skeleton(model), int(USABLE * gpu_memory * 1e9)
    ways = (
        _full_ways(
            source,
            config=config,
            momentum_bits=momentum_bits,
            optimizer=optimizer,
            batch_size=batch_size,
            chunked_loss=chunked_loss,
            n_processes=n_processes,
        )
        if side is None
        else _side_ways(source, side, base, config or QFTConfig(), batch_size)
    )
    for way, of in ways:
        way["estimate"] = estimate = of(sequence_length=sequence_length)
        if estimate.total_bytes <= usable:
            break
    return Recommendation(
        **way,
        usable_bytes=usable,
        batch_size=batch_size,
        longest_sequence=_longest(usable, of),
        positions=n_positions(source.config),
    )


# A way to train, as fields of a `Recommendation`; and its memory by `sequence_length`.
_Way = tuple[dict[str, Any], Callable[..., MemoryEstimate]]


def _full_ways(source: Any, **asked: Any) -> Iterator[_Way]:
    """Ways to train every parameter, from the fastest to the smallest.

    Checkpointing costs a third more work, release costs none, but clipping by the exact norm then
    takes a second backward pass.
    """
    as_asked = {name: asked[name] for name in ("momentum_bits", "optimizer")}
    for checkpointing in (False, True):
        for gradient in MODES:
            chosen: dict[str, Any] = {
                "gradient": gradient,
                "gradient_checkpointing": checkpointing,
            }
            yield chosen | as_asked, partial(estimate_memory, source, **asked, **chosen)


def _side_ways(
    source: Any, side: QSTConfig, base: str | None, config: QFTConfig, batch_size: int
) -> Iterator[_Way]:
    """Ways to train a side network: of each base, the most bits first, the fastest first."""
    fixed = {"gradient": "stack", "momentum_bits": 8, "optimizer": "adamw_torch"}
    for name in [base] if base else _FINEST_FIRST:
        estimator = _SideEstimator(source, side, name, config)
        for checkpointing in (False, True):
            chosen = {"gradient_checkpointing": checkpointing}
            of = partial(estimator, batch_size=batch_size, **chosen)
            yield chosen | fixed | {"base": name}, of


def _longest(usable: int, of: Callable[..., MemoryEstimate]) -> int:
    """Tokens of the longest sequence that fits: memory grows with length, so as many fit."""
    lengths = range(1, LONGEST + 1)
    return bisect_right(lengths, usable, key=lambda n: of(sequence_length=n).total_bytes)
