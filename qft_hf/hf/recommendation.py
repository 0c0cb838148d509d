"""`recommend`: how a model can be trained on a GPU, before anything is loaded."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

from ..memory import MemoryEstimate
from ..optim.settings import GRADIENTS
from ..side import QSTConfig
from .base import form_of_base
from .config import QFTConfig
from .estimate import ModelSource, SideEstimator, estimate_memory, skeleton
from .positions import n_positions

# Share of a GPU's memory that a run can use: the driver, the libraries and fragmentation in the
# allocator take the rest.
USABLE = 0.92
_FINEST_FIRST = ("float", "int8", "nf4")
LONGEST = 2**20  # tokens: without positions, the search for the longest sequence ends here


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The chosen way to train a model on a GPU; if none fits, the smallest one.

    Attributes:
        gradient: The mode; stack if it fits, since it clips at no cost. Always stack for a side
            network.
        gradient_checkpointing: Off if the activations fit.
        momentum_bits: As requested: fewer than 8 bits cost quality and are never chosen here.
        optimizer: As requested.
        estimate: Memory of this choice.
        usable_bytes: Memory of the GPU that the run can use.
        batch_size: Sequences of one micro-batch, as requested.
        longest_sequence: Tokens of the longest sequence that fits with this choice and batch size;
            0 if none fits, and at most `positions`, or `LONGEST` without them.
        positions: `n_positions` of the model.
        base: For a side network, how its frozen base is stored; None if every parameter is trained.
    """

    gradient: str
    gradient_checkpointing: bool
    momentum_bits: int | None
    optimizer: str
    estimate: MemoryEstimate
    usable_bytes: int
    batch_size: int
    longest_sequence: int
    positions: int | None
    base: str | None = None

    @property
    def missing_bytes(self) -> int:
        """Bytes by which the estimate exceeds the usable memory; 0 if it fits."""
        return max(0, self.estimate.total_bytes - self.usable_bytes)

    @property
    def fits(self) -> bool:
        """Whether the estimate is within the usable memory."""
        return not self.missing_bytes

    def __str__(self) -> str:
        """Return one line: the choice, whether it fits, and otherwise what would."""
        total, usable = self.estimate.total_bytes / 1e9, self.usable_bytes / 1e9
        way = f"gradient={self.gradient}" if self.base is None else f"method=qst, base={self.base}"
        each = f" of each of {n}" if (n := self.estimate.n_processes) > 1 else ""
        line = (
            f"{way}, gradient_checkpointing={self.gradient_checkpointing}"
            f"{f', momentum_bits={self.momentum_bits}' if self.momentum_bits else ''}"
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
        line += f"The states alone take {self.estimate.state_bytes / 1e9:.1f} GB: use a larger GPU"
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
    momentum_bits: int | None = None,
    optimizer: str = "qft_lion",
    chunked_loss: bool = False,
    side: QSTConfig | None = None,
    base: str | None = None,
    n_processes: int = 1,
) -> Recommendation:
    """Choose the fastest way to train that fits a GPU, or the smallest if none fits.

    Args:
        model: As in `estimate_memory`; no weight is loaded.
        gpu_memory: Nominal memory of the GPU, in GB of 1e9 bytes.
        sequence_length: Tokens of one sequence.
        batch_size: Sequences of one micro-batch.
        config: As in `estimate_memory`.
        momentum_bits: As in `estimate_memory`; 4 bits are used only if requested here.
        optimizer: As in `estimate_memory`.
        chunked_loss: As in `estimate_memory`.
        side: A side network, the only part that is trained, with AdamW; None to train every
            parameter.
        base: How the frozen base of `side` is stored; None for as many bits as fit, and for a model
            that is quantized.
        n_processes: Number of processes that train together, each on such a GPU, as in
            `estimate_memory`.

    Raises:
        FileNotFoundError: As in `estimate_memory`.
        ValueError: `gpu_memory` is not positive and finite, `side` is given with several processes,
            or as in `estimate_memory` and `estimate_side_memory`.
    """
    if not isinstance(gpu_memory, int | float) or not 0 < gpu_memory < inf:
        raise ValueError(f"gpu_memory must be a positive, finite number of GB, got {gpu_memory!r}.")
    if side is not None and n_processes > 1:
        raise ValueError(
            f"n_processes={n_processes} and side were given. Processes divide the gradients and "
            "the momentum of trained INT8 weights, and the base of a side network is not trained: "
            "each process would need as much memory as one alone. Leave n_processes out."
        )
    source, usable = skeleton(model), int(USABLE * gpu_memory * 1e9)
    fixed: dict[str, Any] = {"momentum_bits": momentum_bits, "optimizer": optimizer}
    ways = ways_to_train(
        source,
        batch_size,
        config=config,
        chunked_loss=chunked_loss,
        side=side,
        base=base,
        n_processes=n_processes,
        **fixed,
    )
    if side is not None:
        fixed = {"gradient": "stack", "momentum_bits": None, "optimizer": "adamw_torch"}
    for way, of in ways:
        way["estimate"] = estimate = of(sequence_length=sequence_length)
        if estimate.total_bytes <= usable:
            break
    positions = n_positions(source.config)
    return Recommendation(
        **way,
        **fixed,
        usable_bytes=usable,
        batch_size=batch_size,
        longest_sequence=_longest(usable, of, positions or LONGEST),
        positions=positions,
    )


def ways_to_train(
    source: Any,
    batch_size: int = 1,
    *,
    config: QFTConfig | None = None,
    side: QSTConfig | None = None,
    base: str | None = None,
    **of_full: Any,
) -> Iterator[tuple[dict[str, Any], Callable[..., MemoryEstimate]]]:
    """Yield the ways to train a model, from the fastest to the smallest.

    Gradient checkpointing costs a third more work. Release costs nothing, except that clipping by
    the exact norm then takes a second backward pass. Of a side network, a base with more bits comes
    first.

    Args:
        source: The model, or one without storage.
        batch_size: Sequences of one micro-batch.
        config: As in `recommend`.
        side: As in `recommend`.
        base: As in `recommend`.
        **of_full: Other arguments of `estimate_memory`, which a side network does not have.

    Yields:
        The choices of a way, as fields of a `Recommendation`, and its memory as a function of
        `sequence_length`.
    """
    way: dict[str, Any]
    if side is None:
        of_full |= {"batch_size": batch_size, "config": config}
        for checkpointing in (False, True):
            for gradient in GRADIENTS:
                way = {"gradient": gradient, "gradient_checkpointing": checkpointing}
                yield way, partial(estimate_memory, source, **of_full, **way)
        return
    form = form_of_base(source.config, base)
    for name in [form] if form else _FINEST_FIRST:
        estimator = SideEstimator(source, side, name, config)
        for checkpointing in (False, True):
            way = {"gradient_checkpointing": checkpointing}
            yield {"base": name, **way}, partial(estimator, batch_size=batch_size, **way)


def _longest(usable: int, of: Callable[..., MemoryEstimate], limit: int) -> int:
    """Return the tokens of the longest sequence that fits; memory grows with the length."""
    lengths = range(1, limit + 1)
    return bisect_right(lengths, usable, key=lambda n: of(sequence_length=n).total_bytes)
