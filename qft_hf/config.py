"""How weights are stored and multiplied. Plain values: no tensors, no torch, no transformers."""

from collections.abc import Iterable
from dataclasses import dataclass, field

MATMULS = ("dequantize", "int8")
# The three matrix products of a linear layer in one training step: y, grad_x and grad_W.
PRODUCTS = ("forward", "input_gradient", "weight_gradient")


def names_module(entry: str, module: str) -> bool:
    """Whether `entry` is the full name of `module` or consecutive components of it."""
    return f".{entry}." in f".{module}."


def check_type(name: str, value: object, types: tuple[type, ...], wanted: str) -> None:
    """Raise TypeError if the setting `name` is of none of `types`, which `wanted` puts in words."""
    # In Python a bool is an int; here a bool in place of a number is a mistake.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise TypeError(f"{name} must be {wanted}, got {value!r}.")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise ValueError if the setting `name` is not one of its choices, which the text lists."""
    if value not in (listed := list(choices)):
        raise ValueError(f"{name} must be {' or '.join(map(repr, listed))}, got {value!r}.")


@dataclass(kw_only=True)
class QuantizationSpec:
    """The storage format of quantized weights and the arithmetic of their products.

    Args:
        group_size: Consecutive inputs (columns) of one output row that share an FP32 scale. None
            means one scale per row. The last group of a row may be short.
        outlier_fraction: Share of each row kept in FP32 in addition to the INT8 codes, largest
            magnitudes first: `ceil(outlier_fraction * columns)` values per row, 0 for none. For
            INT8 products it is also the share of input columns that stay float.
        modules_to_not_convert: Names of modules that stay float, with all their submodules; each is
            a full module name or consecutive components of one (`"lm_head"`, `"classifier"`).
        matmul: How products with the weight are computed. `"dequantize"` expands one tile of
            the weight at a time to the activation's dtype. `"int8"` quantizes activations and
            gradients and multiplies INT8 by INT8; its outliers are whole columns, the same
            in every row, and `group_size` must be None.
        int8_products: With `matmul="int8"`, which products of which modules are INT8: module names
            as in `modules_to_not_convert`, or `"*"` for all but the output head, each with a list
            of `"forward"`, `"input_gradient"` and `"weight_gradient"`. If several names match a
            module, the longest applies. Modules that are not listed use all three, the head none.
        seed: Key of the counter-based random numbers that round updates.
        strict: Whether to refuse a model if more than a tenth of its parameters would stay float
            without being listed in `modules_to_not_convert`; otherwise a warning is issued. It is
            an option of the conversion, not part of the format: checkpoints do not record it.

    Raises:
        ValueError: A value is out of range; the message names the range.
    """

    group_size: int | None = None
    outlier_fraction: float = 0.01
    modules_to_not_convert: list[str] | None = None
    matmul: str = "dequantize"
    int8_products: dict[str, list[str]] | None = None
    seed: int = 0
    strict: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size must be a positive number of columns or None for one scale per row, "
                f"got {self.group_size}."
            )
        if not 0.0 <= self.outlier_fraction < 1.0:
            raise ValueError(
                f"outlier_fraction is the share of a row kept in float and must be in [0, 1), "
                f"got {self.outlier_fraction}. The usual value is 0.01; 0 turns outliers off."
            )
        check_choice("matmul", self.matmul, MATMULS)
        if self.matmul == "int8" and self.group_size is not None:
            raise ValueError(
                f'matmul="int8" needs one scale per row, got group_size={self.group_size}: scales '
                "inside a row cannot be taken out of an integer sum. Leave group_size out, or set "
                'matmul="dequantize".'
            )
        for name, products in (self.int8_products or {}).items():
            if unknown := [product for product in products if product not in PRODUCTS]:
                raise ValueError(
                    f"int8_products has {unknown} for {name!r}; a module's products are "
                    f"{', '.join(PRODUCTS)}, and [] leaves it out."
                )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}.")
