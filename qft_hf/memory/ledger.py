"""The bytes of a model's training state by kind, measured from live tensors."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import nan, prod
from typing import Any

from torch import Tensor, nn

from ..nn.convert import Kept, kept_parameters
from ..optim.processes import Processes
from ..quant import Int8Tensor, QFTWeight
from ..side import side_network_of, side_parameters

FP32_ADAM_BYTES = 16  # per parameter: weight, gradient and two moments in FP32


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """Bytes of one kind of state in `n_tensors` stored tensors.

    Attributes:
        state: The kind. `momentum` is all states of an optimizer, such as both moments of AdamW.
    """

    state: str
    n_tensors: int
    bytes: int

    @property
    def drawn(self) -> str:
        """The kind as tables name it."""
        return "optimizer state" if self.state == "momentum" else self.state


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """Model state by kind; `str()` draws the table.

    Attributes:
        rows: Kinds of state; every stored tensor is in exactly one.
        n_parameters: Elements of all parameters; tied ones count once.
        n_quantized: Elements that are stored as INT8.
        kept: Parameters that stay float, and why.
        n_processes: Number of processes that divide the state of INT8 weights; the bytes are those
            of this process.
    """

    rows: list[LedgerRow]
    n_parameters: int
    n_quantized: int
    kept: list[Kept] = field(repr=False)
    n_processes: int = 1

    @property
    def total_bytes(self) -> int:
        """Bytes of all rows."""
        return sum(row.bytes for row in self.rows)

    @property
    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of `gradients`, of `momentum`, and of all other rows as `weights`."""
        kinds = {"weights": 0, "gradients": 0, "momentum": 0}
        for row in self.rows:
            kinds[row.state if row.state in kinds else "weights"] += row.bytes
        return kinds

    @property
    def bytes_per_parameter(self) -> float:
        """Total bytes per parameter; NaN without parameters."""
        return self.total_bytes / (self.n_parameters or nan)

    @property
    def percent_of_fp32_adam(self) -> float:
        """Total in percent of the 16 bytes per parameter of FP32 Adam; NaN without parameters."""
        return 100 * self.bytes_per_parameter / FP32_ADAM_BYTES

    def __str__(self) -> str:
        """Return the table, and the parameters that stay float by reason."""
        n_parameters = self.n_parameters or nan
        lines = [f"{'model state':<22}{'MB':>10}{'bytes/param':>13}{'tensors':>9}"]
        lines += [
            f"{row.drawn:<22}{row.bytes / 1e6:>10.1f}{row.bytes / n_parameters:>13.3f}"
            f"{row.n_tensors:>9}"
            for row in self.rows
        ]
        n_tensors = sum(row.n_tensors for row in self.rows)
        adam = FP32_ADAM_BYTES * self.n_parameters / 1e6
        lines += [
            f"{'total':<22}{self.total_bytes / 1e6:>10.1f}{self.bytes_per_parameter:>13.3f}"
            f"{n_tensors:>9}",
            f"{'FP32 Adam (arithmetic)':<22}{adam:>10.1f}{FP32_ADAM_BYTES:>13.3f}",
            f"{self.percent_of_fp32_adam:.1f} % of FP32 Adam; {self.n_quantized:,} of "
            f"{self.n_parameters:,} parameters in INT8",
        ]
        if self.n_processes > 1:
            lines.append(
                f"on this process, one of {self.n_processes}: each owns some rows of every INT8 "
                "weight, and holds gradients and optimizer state of these rows only"
            )
        for reason in sorted({kept.reason for kept in self.kept}):
            group = [kept for kept in self.kept if kept.reason == reason]
            elements = sum(kept.parameter.numel() for kept in group)
            where = group[0].name
            if len(group) > 1:
                where = f"{len(group)} tensors ({where}, ...)"
            lines.append(f"float: {elements:,} parameters in {where}: {reason}")
        return "\n".join(lines)


def elements(parameter: Tensor) -> int:
    """Return the number of values in a parameter; bitsandbytes keeps two 4-bit values in a byte."""
    state = _four_bit_state(parameter)
    return parameter.numel() if state is None else prod(state.shape)


def memory_ledger(model: nn.Module, optimizer: Any = None) -> MemoryLedger:
    """Measure the training state that is alive now.

    Args:
        model: Any module; its parameters, their gradients and its buffers are counted.
        optimizer: A `torch.optim.Optimizer` (or Accelerate's wrapper) whose state is counted.

    Returns:
        The ledger. Gradients exist between backward and step, momentum after the first step.
    """
    parameters = list(model.parameters())
    side = [] if side_network_of(model) is None else list(side_parameters(model).values())
    of_side = set(map(id, side))
    of_format: dict[str, list[Any]] = defaultdict(list)
    for parameter in parameters:
        if id(parameter) not in of_side:
            of_format[_format(parameter)].append(parameter)
    four_bit_scales = {
        form: [tensor for p in of_format[form] for tensor in _tensors(_four_bit_state(p))]
        for form in ("NF4", "FP4")
    }
    of_states = [] if optimizer is None else optimizer.state.values()
    states = [value for of in of_states for name, value in of.items() if name != "step"]
    rows = [
        *weight_rows(of_format["INT8"]),
        ledger_row("NF4 weights", of_format["NF4"]),
        ledger_row("NF4 scales", four_bit_scales["NF4"]),
        ledger_row("FP4 weights", of_format["FP4"]),
        ledger_row("FP4 scales", four_bit_scales["FP4"]),
        ledger_row("8-bit weights", of_format["8-bit"]),
        ledger_row("8-bit scales", _scales_of_8_bits(model)),
        ledger_row("integer parameters", of_format["integer"]),
        ledger_row("float parameters", of_format["float"]),
        ledger_row("side network", side),
        ledger_row("gradients", (p.grad for p in parameters if p.grad is not None)),
        ledger_row("momentum", (value for value in states if isinstance(value, Tensor))),
        ledger_row("buffers", model.buffers()),
    ]
    divides = any(isinstance(p, QFTWeight) and p.requires_grad for p in parameters)
    processes = Processes.found() if divides else None
    floats = kept_parameters(model) if of_format["INT8"] else []
    return MemoryLedger(
        rows=[row for row in rows if row.bytes],
        n_parameters=sum(map(elements, parameters)),
        n_quantized=sum(p.numel() for p in parameters if isinstance(p, QFTWeight)),
        n_processes=1 if processes is None else processes.n,
        kept=[kept for kept in floats if id(kept.parameter) not in of_side],
    )


def _format(parameter: Tensor) -> str:
    """Return the format of a parameter."""
    if isinstance(parameter, QFTWeight):
        return "INT8"
    if (state := _four_bit_state(parameter)) is not None:
        return str(state.quant_type).upper()
    if parameter.is_floating_point():
        return "float"
    return "8-bit" if hasattr(parameter, "SCB") else "integer"


def _four_bit_state(parameter: Tensor) -> Any:
    """The `QuantState` of a 4-bit parameter of bitsandbytes; None for others, and on `meta`."""
    return getattr(parameter, "quant_state", None)


def _scales_of_8_bits(model: nn.Module) -> list[Tensor]:
    """The scales of 8-bit weights of bitsandbytes, which the first forward moves to the module."""
    owners = (
        owner
        for module in model.modules()
        for owner in (getattr(module, "weight", None), getattr(module, "state", None))
    )
    found = (getattr(owner, "SCB", None) for owner in owners)
    return [scales for scales in found if isinstance(scales, Tensor)]


def _tensors(state: Any) -> list[Tensor]:
    """All tensors of a `QuantState`, and of the nested one of its scales, if any."""
    own = [value for value in vars(state).values() if isinstance(value, Tensor)]
    of_scales = getattr(state, "state2", None)  # absent after a CPU has repacked the weight
    return own if of_scales is None else own + _tensors(of_scales)


def weight_rows(weights: Sequence[QFTWeight]) -> list[LedgerRow]:
    """Return the rows of everything that is stored of INT8 weights, also without storage."""
    return [
        ledger_row("INT8 weights", (w.codes for w in weights)),
        ledger_row("weight scales", (w.scales for w in weights)),
        ledger_row("outliers", (t for w in weights for t in (w.outlier_values, w.outlier_columns))),
    ]


def ledger_row(state: str, tensors: Iterable[Tensor]) -> LedgerRow:
    """Return the row of some tensors; each field of an INT8 tensor counts as one."""
    stored = [
        part
        for tensor in tensors
        for part in (tensor.fields().values() if isinstance(tensor, Int8Tensor) else (tensor,))
    ]
    return LedgerRow(state, len(stored), sum(part.nbytes for part in stored))
