"""Predicts the memory of side tuning from shapes alone: a frozen base and a small trained network.

The base keeps no activations, gradients or optimizer state. The hidden states of its layers are
kept by the downsample modules, if these are trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..config import QuantizationSpec
from ..layout import FP32_BYTES, nf4_bytes
from ..nn import ConversionPlan
from ..side import QSTConfig, side_parameters
from .estimate import MemoryEstimate, Workload, largest_tile, planned_rows
from .ledger import LedgerRow, ledger_row

ADAMW_STATES = 2  # in FP32, like the parameters of a side network
NF4_TENSORS = 5  # scales and tables of a weight: see `nf4_bytes`


@dataclass(frozen=True, slots=True)
class Base:
    """How a frozen base is stored; in float, if neither `nf4` nor `plan` is given."""

    nf4: Sequence[Tensor] = ()  # weights that are stored as NF4
    plan: ConversionPlan | None = None  # which weights are INT8
    spec: QuantizationSpec | None = None  # format of the INT8 weights

    @property
    def weights(self) -> list[Tensor]:
        """Weights of the base that are not stored in float."""
        return [*self.nf4, *(self.plan.weights.values() if self.plan else ())]

    @property
    def rows(self) -> list[LedgerRow]:
        """The rows of everything that is stored of these weights."""
        sizes = [nf4_bytes(weight.numel()) for weight in self.nf4]
        return [
            *(planned_rows(self.plan, self.spec) if self.plan and self.spec else ()),
            LedgerRow("NF4 weights", len(sizes), sum(codes for codes, _ in sizes)),
            LedgerRow("NF4 scales", NF4_TENSORS * len(sizes), sum(scales for _, scales in sizes)),
        ]

    def expanded_bytes(self, compute_bytes: int) -> int:
        """Bytes of a weight in float: a whole NF4 one, or a tile of an INT8 one, also in FP32."""
        if self.plan is not None:
            return largest_tile(self.plan) * (FP32_BYTES + compute_bytes)
        return max((weight.numel() for weight in self.nf4), default=0) * compute_bytes


def estimate_side(
    model: nn.Module, base: Base, work: Workload, side_work: Workload, config: QSTConfig
) -> MemoryEstimate:
    """Predict the memory of training a side network with AdamW.

    Args:
        model: Float, with the side network attached, on any device; the meta device will do.
        base: How its base is to be stored.
        work: One pass of the base.
        side_work: One pass of the side layers.
        config: Configuration of the side network.
    """
    side = list(side_parameters(model).values())
    others = {*map(id, side), *map(id, base.weights)}
    floats = [p for p in model.parameters() if id(p) not in others]
    trained = ledger_row("side network", side)
    n_side, side_bytes = trained.n_tensors, trained.bytes
    states = [
        *base.rows,
        ledger_row("float parameters", floats),
        trained,
        LedgerRow("gradients", n_side, side_bytes),
        LedgerRow("momentum", ADAMW_STATES * n_side, ADAMW_STATES * side_bytes),
        ledger_row("buffers", model.buffers()),
    ]
    is_cast = work.compute_bytes != FP32_BYTES  # by autocast, for products in the base's dtype
    copies = work.compute_bytes * side_bytes // FP32_BYTES if is_cast else 0
    in_flight = work.tokens * work.compute_bytes * (2 * work.hidden + 3 * work.intermediate)
    layer = _layer_bytes(side_work)
    kept = side_work.layers * layer
    activations = [
        ("downsampled hidden states", side_work.layers + 1, _narrow_bytes(work, side_work, config)),
        ("saved by the side layers", side_work.layers, 0 if side_work.checkpointing else kept),
        ("one layer computed again", 1, layer if side_work.checkpointing else 0),
        ("one layer of the base", 1, in_flight),
        ("its weight in float", 1, base.expanded_bytes(work.compute_bytes)),
        ("side weights, cast", n_side, copies),
        ("last side state and norm", 3, 3 * side_work.tokens * side_work.hidden * FP32_BYTES),
        ("last hidden state", 1, work.tokens * work.hidden * work.compute_bytes),
        ("logits and their gradient", 3, work.logits_bytes),
    ]
    return MemoryEstimate(
        rows=[row for row in states if row.bytes],
        activation_rows=[LedgerRow(*kind) for kind in activations if kind[2]],
        n_parameters=sum(p.numel() for p in (*side, *base.weights, *floats)),
    )


def _layer_bytes(work: Workload) -> int:
    """Bytes that a side layer saves. Its residual stream is FP32; products cast their inputs."""
    wider = FP32_BYTES - work.compute_bytes
    casts = 3 * work.compute_bytes if wider else 0  # q, k and v share an input; gate and up another
    return work.layer_bytes + work.tokens * work.hidden * (2 * wider + casts)


def _narrow_bytes(work: Workload, side_work: Workload, config: QSTConfig) -> int:
    """Bytes that are saved where hidden states of the base enter, with checkpointing too."""
    compute, width, rank = work.compute_bytes, side_work.hidden, config.rank
    # Both states that the gate mixes, and the mixture.
    mixed = width * (2 * FP32_BYTES + compute)
    if side_work.checkpointing:  # the base runs again in backward to train the downsamples
        return work.tokens * side_work.layers * mixed
    of_module = {
        "adapter": (work.hidden + 2 * rank + width) * compute,
        "linear": work.hidden * compute,
    }.get(config.downsample, 0)
    return work.tokens * (side_work.layers * mixed + (side_work.layers + 1) * of_module)
