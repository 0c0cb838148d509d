"""Arguments of operators that belong together: quantized matrices, weights, rules and rounding.

Tensors are checked when they are put together here, so an operator checks only whether its
arguments fit each other. Backends take these values apart only where they launch a kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .. import layout
from ..layout import NIBBLE_GROUP_SIZE, NIBBLES, n_groups
from .checks import check_group_size, check_matrix, check_same, check_scales
from .philox import WEIGHT, rounding_words

# Columns of a `live` tensor, whose row holds the numbers of a step of one parameter: lr, weight
# decay, the number of the step, and what the rule adds.
N_LIVE = 8

CODE_DTYPES = {8: torch.int8, 4: torch.uint8}  # by bits


@dataclass(slots=True, eq=False)
class Quantized:
    """A matrix as codes with an FP32 scale for each row and group of columns.

    Args:
        codes: int8 `[rows, columns]` in [-127, 127]; 4-bit codes are uint8
            `[rows, ceil(columns / 2)]`, columns 2k (low half) and 2k + 1 in byte k. Contiguous.
        scales: fp32 `[rows, n_groups]`, contiguous, on the same device.
        group_size: Columns per scale; the last group of a row may be short. None: whole rows.
            Codes of 4 bits have groups of 64.
        bits: Bits of one code: 8 or 4.

    Raises:
        TypeError: The dtype of the codes is not that of their bits.
        ValueError: Shapes or devices do not fit.
    """

    codes: Tensor
    scales: Tensor
    group_size: int | None
    bits: int = 8

    def __post_init__(self) -> None:
        check_matrix("codes", self.codes, (CODE_DTYPES[self.bits],))
        check_group_size(self.group_size)
        group_size = self.group_size
        if self.bits == 4:
            if group_size != NIBBLE_GROUP_SIZE:
                raise ValueError(
                    f"4-bit codes must have groups of {NIBBLE_GROUP_SIZE} columns, got "
                    f"group_size={group_size}."
                )
            group_size = NIBBLE_GROUP_SIZE // NIBBLES  # in bytes
        rows, width = self.codes.shape
        check_scales("scales", self.scales, (rows, n_groups(width, group_size)), self.codes.device)

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """Codes and scales."""
        return self.codes, self.scales

    def rows(self, rows: slice) -> "Quantized":
        """Return some of its rows; they share its memory."""
        return Quantized(self.codes[rows], self.scales[rows], self.group_size, self.bits)


# The first live weight made with each tensor of codes, by the id of that tensor.
_weights: WeakValueDictionary[int, "Weight"] = WeakValueDictionary()


@dataclass(slots=True, eq=False, weakref_slot=True)
class Weight:
    """A weight in the hybrid format: dense codes, and a few values of each row in FP32.

    Args:
        codes: int8 `[rows, columns]`, contiguous; 0 under outliers.
        scales: fp32 `[rows, n_groups]`, positive.
        outlier_values: fp32 `[rows, n_outliers]`.
        outlier_columns: int16 or int32 `[rows, n_outliers]`: their columns, each at most once.
        group_size: Columns per scale; None: whole rows.

    Attributes:
        plans: Objects prepared for this weight that live as long as it does, such as launches that
            a backend has bound to its tensors. Weights with the same memory may share them; copies
            have none.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes or devices do not fit.
    """

    codes: Tensor
    scales: Tensor
    outlier_values: Tensor
    outlier_columns: Tensor
    group_size: int | None
    plans: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        codes, values, columns = self.codes, self.outlier_values, self.outlier_columns
        check_matrix("weight codes", codes, (torch.int8,))
        check_group_size(self.group_size)
        rows, width = codes.shape
        check_scales("scales", self.scales, (rows, n_groups(width, self.group_size)), codes.device)
        if (
            values.ndim != 2
            or values.shape[0] != codes.shape[0]
            or values.shape != columns.shape
            or not codes.device == values.device == columns.device
        ):
            raise ValueError(
                f"outlier values and outlier columns must be matrices of the same shape on "
                f"{codes.device}, with one row for each of the {codes.shape[0]} rows of the "
                f"weight, got shapes {tuple(values.shape)} on {values.device} and "
                f"{tuple(columns.shape)} on {columns.device}."
            )
        if values.numel():
            check_matrix("outlier values", values, (torch.float32,))
            check_matrix("outlier columns", columns, (torch.int16, torch.int32))
        if not torch.compiler.is_compiling():  # weights made while tracing are not kept
            _weights.setdefault(id(codes), self)

    @classmethod
    def around(cls, *fields: Any) -> "Weight":
        """Return the live weight with these fields, and so its plans, or else a new weight.

        Compiled code passes the fields of a weight, not the weight.
        """
        codes = fields[0]
        weight = _weights.get(id(codes))
        if weight is not None and all(map(is_, fields, (*weight.tensors, weight.group_size))):
            return weight
        return cls(*fields)

    @classmethod
    def dense(cls, matrix: Quantized) -> "Weight":
        """A weight without outliers."""
        values = matrix.scales.new_empty(matrix.codes.shape[0], 0)
        return cls(matrix.codes, matrix.scales, values, values.short(), matrix.group_size)

    @property
    def device(self) -> torch.device:
        """The device of the codes."""
        return self.codes.device

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes, scales, outlier values and outlier columns."""
        return self.codes, self.scales, self.outlier_values, self.outlier_columns

    @property
    def is_one_tile(self) -> bool:
        """Whether `layout.row_tiles` yields one range, so that all rows are expanded at once."""
        return self.codes.numel() <= layout.TILE_ELEMENTS

    @property
    def shared_columns(self) -> Tensor:
        """Outlier columns that are the same in every row: int64 `[n_outliers]`."""
        columns: Tensor | None = self.plans.get("shared columns")
        if columns is None:
            columns = self.plans["shared columns"] = self.outlier_columns[0].long()
        return columns

    def __reduce__(self) -> Any:
        return Weight, (*self.tensors, self.group_size)

    def rows(self, rows: slice) -> "Weight":
        """Return some of its rows; they share its memory."""
        codes, scales, values, columns = (tensor[rows] for tensor in self.tensors)
        return Weight(codes, scales, values, columns, self.group_size)


@dataclass(slots=True, eq=False)
class Moments:
    """Both moments of AdamW for a matrix as 8-bit codes; `kernels/adamw.py` explains them.

    Args:
        ratio_codes: int8 `[rows, columns]` in [-127, 127], contiguous: the first moment over the
            square root of the second.
        ratio_scales: fp32 `[rows, n_groups]`, contiguous.
        root_codes: uint8 `[rows, columns]`, contiguous: the eighth root of the second moment.
        root_scales: fp32 `[rows, n_groups]`, contiguous.
        group_size: Columns per scale, for both moments.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Shapes or devices do not fit.
    """

    ratio_codes: Tensor
    ratio_scales: Tensor
    root_codes: Tensor
    root_scales: Tensor
    group_size: int

    def __post_init__(self) -> None:
        check_matrix("ratio codes", self.ratio_codes, (torch.int8,))
        check_matrix("root codes", self.root_codes, (torch.uint8,))
        check_same("root codes", self.root_codes, self.ratio_codes)
        check_group_size(self.group_size)
        rows, columns = self.ratio_codes.shape
        shape = rows, n_groups(columns, self.group_size)
        check_scales("ratio scales", self.ratio_scales, shape, self.ratio_codes.device)
        check_scales("root scales", self.root_scales, shape, self.ratio_codes.device)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Codes and scales of the ratio, then of the root."""
        return self.ratio_codes, self.ratio_scales, self.root_codes, self.root_scales


class Input(NamedTuple):
    """An input `x[N, C]` of a layer as an operand of INT8 products, made by `quantize_input`.

    Attributes:
        codes: int8 `[N, C]`, 0 in outlier columns.
        scales: fp32 `[N, 1]`.
        columns: int64 `[k]`: the columns with the largest magnitudes, ascending.
        values: `[N, k]` of the dtype of `x`, stored column by column: the values of those columns.
    """

    codes: Tensor
    scales: Tensor
    columns: Tensor
    values: Tensor


class Rounding(NamedTuple):
    """The random numbers that round an update, counted instead of drawn from a state.

    They are those of `rounding_words`.

    Attributes:
        seed: Key, in [0, 2**63).
        step: Number of the step.
        stream: Number of the parameter; with the element's position it is the counter of Philox.
        first_row: Number of the first row that is passed, if only some rows of a matrix are: a
            weight that is updated in parts has the bits of one that is updated as a whole.
        stochastic: False rounds to nearest, for ablation; models do not train that way.
        live: fp64 `[N_LIVE]` on the weight's device, or None. It begins with the learning rate, the
            weight decay and the number of the step, which replace those that are passed. A kernel
            reads them when it runs, because a CUDA graph repeats its other arguments as they were
            captured.
    """

    seed: int
    step: int
    stream: int
    first_row: int = 0
    stochastic: bool = True
    live: Tensor | None = None

    def of_rows(self, rows: slice) -> "Rounding":
        """Return the rounding of some of the rows."""
        if not rows.start:
            return self
        return self._replace(first_row=self.first_row + rows.start)

    def words(
        self, rows: slice, columns: int, device: torch.device, purpose: int = WEIGHT
    ) -> Tensor:
        """Return a random word for each element of some of the rows; see `rounding_words`."""
        counted = slice(self.first_row + rows.start, self.first_row + rows.stop)
        return rounding_words(
            counted, columns, seed=self.seed, step=self.step, stream=self.stream,
            purpose=purpose, device=device,
        )  # fmt: skip


class Roundings(NamedTuple):
    """The random numbers of several float parameters, each with its step and stream.

    Attributes:
        seed: Key, in [0, 2**63).
        steps: Number of this step of each parameter.
        streams: Number of each parameter.
        stochastic: False rounds to nearest.
        live: fp64 `[n, N_LIVE]` on the device of the parameters, or None: row `streams[i]` has the
            `live` of parameter i.
    """

    seed: int
    steps: Sequence[int]
    streams: Sequence[int]
    stochastic: bool = True
    live: Tensor | None = None

    def of_each(self) -> list[Rounding]:
        """Return the rounding of each parameter."""
        return [
            Rounding(
                self.seed,
                step,
                stream,
                stochastic=self.stochastic,
                live=None if self.live is None else self.live[stream],
            )
            for step, stream in zip(self.steps, self.streams, strict=True)
        ]


class Lion(NamedTuple):
    """The numbers of a Lion step.

    Attributes:
        lr: Step size, in units of the weight.
        beta1: Weight of the momentum in the direction.
        beta2: Decay of the momentum.
        weight_decay: Decoupled: weights shrink by `lr * weight_decay` a step.
        maximize: Step along the gradient, not against it.
    """

    lr: float
    beta1: float
    beta2: float
    weight_decay: float
    maximize: bool = False

    @classmethod
    def without_momentum(cls, lr: float, weight_decay: float) -> "Lion":
        """Return the numbers of a step along a given direction."""
        return cls(lr=lr, beta1=0.0, beta2=0.0, weight_decay=weight_decay)

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers that kernels compute with, each to be rounded to FP32 once.

        They are `lr`, `lr * weight_decay`, `beta1`, `1 - beta1`, `beta2`, `1 - beta2`, and the sign
        of the gradient.
        """
        return (
            self.lr,
            self.lr * self.weight_decay,
            self.beta1,
            1 - self.beta1,
            self.beta2,
            1 - self.beta2,
            -1.0 if self.maximize else 1.0,
        )


class AdamW(NamedTuple):
    """The numbers of an AdamW step.

    Attributes:
        lr: Step size, in units of the weight.
        beta1: Decay of the first moment, the mean of gradients.
        beta2: Decay of the second, the mean of their squares; above `beta1**2`, otherwise steps
            have no bound.
        eps: Positive; added to the root of the second moment, in units of the gradient.
        weight_decay: Decoupled: weights shrink by `lr * weight_decay` a step.
        maximize: Step along the gradient, not against it.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool = False

    def corrections(self, step: int) -> tuple[float, float]:
        """Factors of the first moment and of the second's root that correct their start from 0."""
        return 1 / (1 - self.beta1**step), 1 / (1 - self.beta2**step) ** 0.5


Rule = TypeVar("Rule", Lion, AdamW)


def read_live(rule: Rule, rounding: Rounding) -> tuple[Rule, Rounding]:
    """Return both with the numbers that `rounding.live` holds, and the rounding without `live`.

    The host waits for them. GPU kernels read `live` themselves, when they run.
    """
    if rounding.live is None:
        return rule, rounding
    lr, weight_decay, step = rounding.live[:3].tolist()
    rule = rule._replace(lr=lr, weight_decay=weight_decay)
    return rule, rounding._replace(step=int(step), live=None)
