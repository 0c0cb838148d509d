"""Predicts the memory of a run from shapes alone, before anything is loaded.

The bytes of states follow exactly from the storage format. Activations are those of a decoder layer
as in transformers: two norms in FP32, attention that saves no score matrix, and a gated MLP. Its
linear modules save their four inputs as floats or, for INT8 weight gradients, as codes.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from ..config import QuantizationSpec
from ..layout import (
    CODE_BYTES,
    FP32_BYTES,
    SCALE_BYTES,
    STATE_GROUP_SIZE,
    TILE_ELEMENTS,
    outliers_per_row,
    quantized_bytes,
)
from ..nn import ConversionPlan, arrangement_of, conversion_plan, own_weights, product_choices
from ..nn.int8 import min_tokens_of_expert
from ..nn.loss import words_at_a_time
from ..nn.products import output_head
from ..optim import QFTOptimizer
from ..quant import Arrangement, QFTWeight
from .ledger import FP32_ADAM_BYTES, LedgerRow, ledger_row, weight_rows
from .processes import Rows


@dataclass(frozen=True, slots=True)
class Workload:
    """The sizes of one forward and backward pass, in elements, and how it saves activations."""

    tokens: int  # batch size times sequence length
    layers: int  # decoder layers
    hidden: int  # width of the residual stream
    attention: int  # width of all query heads together
    key_value: int  # width of all key heads together
    intermediate: int  # width of the MLP, or of all experts of one token together
    vocabulary: int  # rows of the output head
    compute_bytes: int  # of one activation: 2 for BF16, 4 for FP32
    checkpointing: bool  # whether a layer keeps only its input and is computed again in backward
    chunked_loss: bool = False  # whether logits exist for one chunk of the vocabulary at a time
    int8_inputs: bool = False  # whether linear modules save INT8 codes of their inputs
    int8_expert_inputs: bool = False  # whether experts save INT8 codes of their inputs
    outlier_fraction: float = 0.0  # share of the columns of INT8 inputs that are saved as floats
    experts_per_token: int = 0  # with copies of the token's inputs and outputs; 0: no experts

    @property
    def layer_bytes(self) -> int:
        """Bytes that one layer saves for its backward pass."""
        norms = 2 * self.hidden * FP32_BYTES
        others = 2 * self.hidden + self.attention + 2 * self.key_value + 3 * self.intermediate
        if self.experts_per_token:  # the router's input and the output of each expert
            others += (1 + self.experts_per_token) * self.hidden
        return self.tokens * (norms + others * self.compute_bytes + self.input_bytes)

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs that linear modules save for one token: q/k/v, o, gate/up, down.

        Each expert of a token has its own copy of the output of the second norm.
        """
        copies = (self.hidden,) * max(1, self.experts_per_token)
        of_attention = self._input_bytes(self.hidden, self.attention, as_codes=self.int8_inputs)
        return of_attention + self._input_bytes(
            *copies, self.intermediate, as_codes=self._mlp_saves_codes
        )

    @property
    def _mlp_saves_codes(self) -> bool:
        return self.int8_expert_inputs if self.experts_per_token else self.int8_inputs

    def _input_bytes(self, *widths: int, as_codes: bool) -> int:
        """Bytes of one token's inputs of these widths."""
        if not as_codes:
            return self.compute_bytes * sum(widths)
        return sum(
            CODE_BYTES * width
            + SCALE_BYTES
            + self.compute_bytes * outliers_per_row(width, self.outlier_fraction)
            for width in widths
        )

    @property
    def gradient_operand_bytes(self) -> int:
        """Bytes of the largest output gradient in its two INT8 forms, with scales."""
        widths = [self.hidden, self.attention] if self.int8_inputs else []
        if self._mlp_saves_codes:
            widths += [self.hidden, self.intermediate]
        if not widths:
            return 0
        codes = 2 * CODE_BYTES * self.tokens * max(widths)
        return codes + SCALE_BYTES * (self.tokens + max(widths))

    @property
    def saved_bytes(self) -> int:
        """Bytes that all layers save."""
        if not self.checkpointing:
            return self.layers * self.layer_bytes
        return self.layers * self.tokens * self.hidden * self.compute_bytes

    @property
    def logits_bytes(self) -> int:
        """Bytes of logits, their log-probabilities in FP32, and the gradient of those.

        A chunked loss holds one chunk of each (its gradient replaces the FP32 logits and is cast
        for the products), and the FP32 gradient of hidden states, to which all chunks are added.
        """
        if not self.chunked_loss:
            return self.tokens * self.vocabulary * (self.compute_bytes + 2 * FP32_BYTES)
        words = min(self.vocabulary, words_at_a_time(self.tokens), TILE_ELEMENTS // self.hidden)
        run = self.tokens * words * (2 * self.compute_bytes + FP32_BYTES)
        return run + self.tokens * self.hidden * FP32_BYTES


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by kind; `str()` draws the table.

    Attributes:
        rows: States by the kinds of `MemoryLedger`, at their largest: just before a step.
        activation_rows: What forward and backward hold in addition at the same time, at most.
        n_parameters: Elements of all parameters; tied ones count once.
        n_processes: Number of processes that train together; the bytes are those of one of them.
        received_bytes: Bytes that each process receives from the others in a step.
        not_counted: Parts of the model whose activations are in no row.
    """

    rows: list[LedgerRow]
    activation_rows: list[LedgerRow]
    n_parameters: int
    n_processes: int = 1
    received_bytes: int = 0
    not_counted: tuple[str, ...] = ()

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        return sum(row.bytes for row in self.rows)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all activations."""
        return sum(row.bytes for row in self.activation_rows)

    @property
    def total_bytes(self) -> int:
        """Bytes of states and activations, without those of the allocator and libraries."""
        return self.state_bytes + self.activation_bytes

    @property
    def sums(self) -> dict[str, int]:
        """The three sums above, by name."""
        names = ("state_bytes", "activation_bytes", "total_bytes")
        return {name: getattr(self, name) for name in names}

    @property
    def percent_of_fp32_adam(self) -> float:
        """States in percent of the 16 bytes per parameter of FP32 Adam."""
        return 100 * self.state_bytes / (FP32_ADAM_BYTES * self.n_parameters)

    def __str__(self) -> str:
        """Return the table, which says that it is arithmetic."""
        lines = [f"{'by arithmetic':<26}{'GB':>8}{'bytes/param':>13}"]
        for rows, name, total in (
            (self.rows, "states", self.state_bytes),
            (self.activation_rows, "activations", self.activation_bytes),
        ):
            lines += [self._line(row.drawn, row.bytes) for row in rows]
            lines.append(self._line(f"= {name}", total))
        lines.append(self._line("total", self.total_bytes))
        lines.append(f"states are {self.percent_of_fp32_adam:.1f} % of FP32 Adam")
        if self.n_processes > 1:
            lines.append(
                f"on each of {self.n_processes} processes, which receives "
                f"{self.received_bytes / 1e9:.2f} GB from the others in a step"
            )
        if self.not_counted:
            lines.append(without_activations(self.not_counted))
        return "\n".join(lines)

    def _line(self, name: str, n_bytes: int) -> str:
        return f"{name:<26}{n_bytes / 1e9:>8.2f}{n_bytes / self.n_parameters:>13.3f}"


def without_activations(parts: Iterable[str]) -> str:
    """Return the remark that a sum is without the activations of these parts."""
    return (
        f"without the activations of {' and '.join(parts)}, which depend on the data; a run of a "
        "few steps measures them"
    )


def estimate(
    model: nn.Module,
    workload: Workload,
    spec: QuantizationSpec,
    *,
    optimizer: QFTOptimizer,
    n_processes: int = 1,
    not_counted: tuple[str, ...] = (),
) -> MemoryEstimate:
    """Predict the memory of training `model`.

    Args:
        model: Float or quantized, on any device; the meta device will do. Not modified.
        workload: The sizes of one micro-batch.
        spec: The weight format.
        optimizer: Says how long gradients live, and which state it keeps; of any parameters.
        n_processes: Number of processes that train together; the bytes are those of the first one,
            which owns the most rows.
        not_counted: Parts of the model that `workload` does not cover.
    """
    plan = conversion_plan(model, spec.modules_to_not_convert)
    workload = replace(
        workload,
        **_saves_codes(model, plan, spec, workload),
        outlier_fraction=spec.outlier_fraction,
    )
    floats = [kept.parameter.numel() for kept in plan.kept if kept.parameter.requires_grad]
    shapes = trained_shapes(plan)
    rows = Rows(n_processes, spec)
    gradient = optimizer.gradient
    states = [*state_rows(plan, rows, optimizer), ledger_row("buffers", model.buffers())]
    largest = 0
    if gradient != "stack" or n_processes > 1:  # others wait for the step, and are counted above
        of_table, largest = largest_gradients(plan)
        # Backward ends with the tables, when layers and logits are freed.
        largest = max(largest, of_table - workload.saved_bytes - workload.logits_bytes)
    tile = largest_tile(plan)
    activations = [
        ("saved by the layers", workload.layers, workload.saved_bytes),
        ("one layer computed again", 1, workload.layer_bytes if workload.checkpointing else 0),
        ("logits and their gradient", 3, workload.logits_bytes),
        ("largest gradient", 2, largest),
        ("rows in transit", 6, rows.in_transit_bytes(shapes, gradient=gradient)),
        ("INT8 gradient operands", 4, workload.gradient_operand_bytes),
        # A tile of the weight in FP32 and in the compute dtype, and a tile of its gradient.
        ("float tiles", 3, tile * (FP32_BYTES + 2 * workload.compute_bytes)),
    ]
    return MemoryEstimate(
        rows=[row for row in states if row.bytes],
        activation_rows=[LedgerRow(*kind) for kind in activations if kind[2]],
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        n_processes=n_processes,
        received_bytes=rows.received_bytes(shapes, floats),
        not_counted=not_counted,
    )


def state_rows(plan: ConversionPlan, rows: Rows, optimizer: QFTOptimizer) -> list[LedgerRow]:
    """Return the rows of parameters, gradients and optimizer states.

    Frozen parameters have neither gradients nor states.

    Args:
        plan: Which parameters are quantized.
        rows: How they are stored, and divided among processes.
        optimizer: As in `estimate`.
    """
    every_float = [kept.parameter for kept in plan.kept]
    floats = [parameter for parameter in every_float if parameter.requires_grad]
    own = [rows.own(shape) for shape in trained_shapes(plan)]
    n_tensors = 2 * len(own) + len(floats)
    of_gradients = [quantized_bytes(*shape, STATE_GROUP_SIZE) for shape in own]
    waits = optimizer.gradient == "stack"
    gradients = sum(of_gradients) + sum(p.nbytes for p in floats) if waits else 0
    trained = [*(QFTWeight.empty(Arrangement(shape), rows.spec) for shape in own), *floats]
    states = [form for of in trained for form in optimizer.state_format(of).values()]
    n_bytes = sum(prod(s.shape) * s.dtype.itemsize for s in states)
    return [
        *planned_rows(plan, rows.spec),
        ledger_row("float parameters", every_float),
        LedgerRow("gradients", n_tensors, gradients),
        LedgerRow("momentum", len(states), n_bytes),
    ]


def largest_gradients(plan: ConversionPlan) -> tuple[int, int]:
    """Return the bytes of the largest INT8 gradients: of a table, and of any other weight.

    A table is only looked up: a weight that a head shares with an embedding is not one.
    """
    multiplied = {
        id(weight)
        for module in plan.modules.values()
        if not isinstance(module, nn.Embedding)
        for weight in own_weights(module).values()
    }
    largest = [0, 0]
    for name, weight in plan.weights.items():
        if weight.requires_grad:
            size = quantized_bytes(*plan.arrangements[name].matrix_shape, STATE_GROUP_SIZE)
            kind = id(weight) in multiplied
            largest[kind] = max(largest[kind], size)
    return largest[0], largest[1]


def trained_shapes(plan: ConversionPlan) -> list[tuple[int, int]]:
    """Return the shapes of the INT8 matrices that are not frozen."""
    return [
        arrangement.matrix_shape
        for name, arrangement in plan.arrangements.items()
        if plan.weights[name].requires_grad
    ]


def planned_rows(plan: ConversionPlan, spec: QuantizationSpec) -> list[LedgerRow]:
    """Return the rows of everything that will be stored of INT8 weights."""
    return weight_rows([QFTWeight.empty(of, spec) for of in plan.arrangements.values()])


def largest_tile(plan: ConversionPlan) -> int:
    """Return the largest number of elements of INT8 weights that are float at the same time."""
    largest = 0
    for arrangement in plan.arrangements.values():
        n_elements = prod(arrangement.matrix_shape)
        # Experts are expanded whole, others in tiles.
        at_least = n_elements // arrangement.n_matrices if arrangement.n_matrices > 1 else 0
        largest = max(largest, at_least, min(TILE_ELEMENTS, n_elements))
    return largest


def _saves_codes(
    model: nn.Module, plan: ConversionPlan, spec: QuantizationSpec, workload: Workload
) -> dict[str, bool]:
    """Return whether linear modules save codes, and whether experts do, instead of float inputs.

    A kind does if all its modules do; the output head does not count. Tokens are assumed to be
    spread evenly over experts, on a GPU, where small experts are multiplied in float.
    """
    head = output_head(model)
    tokens = workload.tokens * workload.experts_per_token
    of_kind: dict[str, list[bool]] = {"int8_inputs": [], "int8_expert_inputs": []}
    for name, choice in product_choices(model, plan, spec).items():
        module = model.get_submodule(name)
        saves = choice is not None and choice.weight_gradient
        every = (arrangement_of(module, own) for own in own_weights(module))
        experts = [of_own for of_own in every if of_own.n_matrices > 1]
        for of_own in experts:
            fewest = min_tokens_of_expert(of_own.rows, of_own.columns, "cuda")
            saves = saves and tokens >= fewest * of_own.n_matrices
        if module is not head:
            of_kind["int8_expert_inputs" if experts else "int8_inputs"].append(saves)
    return {kind: bool(found) and all(found) for kind, found in of_kind.items()}
