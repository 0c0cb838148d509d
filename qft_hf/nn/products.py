"""Which of a linear layer's three products are INT8 x INT8: the choice of `matmul="int8"`."""

from typing import Any, NamedTuple

from torch import nn

from ..config import PRODUCTS, QuantizationSpec, names_module


class Int8Products(NamedTuple):
    """The INT8 products of one module; the others use the dequantized weight."""

    forward: bool = True  # y = x W^T
    input_gradient: bool = True  # grad_x = grad_y W
    # grad_W = grad_y^T x; the layer then keeps INT8 codes of x instead of x.
    weight_gradient: bool = True
    seed: int = 0  # key of the random numbers for rounding gradients

    def __str__(self) -> str:
        """Return the names of the INT8 products."""
        return ", ".join(name for name in PRODUCTS if getattr(self, name))


FLOAT = Int8Products(forward=False, input_gradient=False, weight_gradient=False)


def int8_products(
    model: nn.Module, names: list[str], spec: QuantizationSpec
) -> dict[str, Int8Products | None]:
    """Return the INT8 products that `spec` chooses for each module in `names`; None: none.

    The output head is what `model.get_output_embeddings()` returns, as transformers models define
    it. It has no INT8 products unless it is listed: a few logits of a token have most of the
    gradient, so with one scale per token the others would be rounded to zero.

    Raises:
        ValueError: A name in `spec.int8_products` matches none of the modules.
    """
    if spec.matmul != "int8":
        return dict.fromkeys(names)
    head = output_head(model)
    listed = spec.int8_products or {}
    unknown = [entry for entry in listed if not any(_matches(name, entry) for name in names)]
    if unknown:
        example = f" such as {names[-1].rpartition('.')[2]!r}" if names else ""
        raise ValueError(
            f"int8_products names {unknown}, which match no quantized linear module of "
            f"{type(model).__name__}. Give full module names, single components of them{example}, "
            "or '*'."
        )
    choices: dict[str, Int8Products | None] = {}
    for name in names:
        matching = [entry for entry in listed if _matches(name, entry)]
        is_head = model.get_submodule(name) is head
        products = [] if is_head else list(PRODUCTS)
        # "*" does not include the head.
        if named := [entry for entry in matching if entry != "*" or not is_head]:
            products = listed[max(named, key=len)]
        choices[name] = (
            Int8Products(**{product: product in products for product in PRODUCTS}, seed=spec.seed)
            if products
            else None
        )
    return choices


def output_head(model: Any) -> nn.Module | None:
    """Return the module that computes the logits of a language model, if the model defines it."""
    find = getattr(model, "get_output_embeddings", None)
    return None if find is None else find()


def _matches(name: str, entry: str) -> bool:
    return entry == "*" or names_module(entry, name)
