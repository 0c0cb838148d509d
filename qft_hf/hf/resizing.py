"""`resize_token_embeddings` on an INT8 model: old rows keep their bits, new ones are quantized.

transformers makes a float table, fills in the new rows, and replaces the old table by it. Here it
does so with a float copy of an INT8 embedding or head, and the INT8 weight then takes over the new
rows. The parameter stays the same object, so an optimizer continues to update it, and rows that
stay keep their momentum. A float module is resized as usual.
"""

from typing import Any

from torch import nn

from ..nn import QuantizedModule, replace_
from ..optim import fit_states
from ..side import NEW_ROWS, side_network_of


def resizing_int8(resize: Any, model: Any, old: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Make resizing an INT8 embedding or head keep its rows."""
    if not isinstance(old, QuantizedModule):
        return resize(model, old, *args, **kwargs)
    stand_in = _float_copy(old)
    new: Any = resize(model, stand_in, *args, **kwargs)
    if new is not stand_in or new.weight.shape != old.complete_weight().shape:
        _take_rows_(old, new)
    for size in ("num_embeddings", "out_features", "padding_idx"):
        if hasattr(old, size):  # also if the weight is tied and has been resized already
            setattr(old, size, getattr(new, size))
    return old


def fitting_states(
    resize: Any,
    model: Any,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Make optimizers follow the new number of rows; refuse it beside a side network."""
    if side_network_of(model) is not None:
        _refuse_new_rows(model, new_num_tokens, pad_to_multiple_of)
    rows = _n_rows(model)
    embeddings = resize(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)
    setattr(model, NEW_ROWS, max(0, getattr(model, NEW_ROWS, 0) + _n_rows(model) - rows))
    for parameter in model.parameters():  # biases too: tying weights resizes them
        fit_states(parameter)
    return embeddings


def _n_rows(model: Any) -> int:
    """Return the rows of the input embeddings; 0 if they have no weight, as in some families."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    return 0 if weight is None else len(weight)


def _refuse_new_rows(model: Any, wanted: int | None, multiple: int | None) -> None:
    rows = _n_rows(model)
    wanted = rows if wanted is None else wanted
    if multiple:
        wanted = -(-wanted // multiple) * multiple
    if wanted != rows:
        raise ValueError(
            f"{type(model).__name__} has {rows} tokens and a side network, and {wanted} were asked "
            "for. Its embeddings are frozen, so new ones would learn nothing, and the side network "
            "would not fit its base again. Use tokens that there are, or train all parameters "
            "(method full)."
        )


def _float_copy(module: QuantizedModule) -> nn.Module:
    """Return a float embedding or linear module with the values of an INT8 one."""
    weight = module.complete_weight()
    rows, columns = weight.shape
    copy: Any
    if isinstance(module, nn.Embedding):
        copy = nn.Embedding(rows, columns, module.padding_idx, device="meta")
    else:
        bias = getattr(module, "bias", None)
        copy = nn.Linear(columns, rows, bias=bias is not None, device="meta")
        if bias is not None:
            copy.bias = nn.Parameter(bias.detach().clone())
    copy.weight = nn.Parameter(weight.values())
    return copy


def _take_rows_(module: Any, resized: Any) -> None:
    """Give an INT8 module as many rows as a float one has, and copy the new rows from it."""
    replace_(module.weight, module.weight.resized(resized.weight, module.spec))
    if getattr(module, "bias", None) is not None:
        module.bias.grad = None
        module.bias.data = resized.bias.detach()
