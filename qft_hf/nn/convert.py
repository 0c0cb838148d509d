"""The one rule of what is quantized, and the conversion of a model there and back.

Loading, converting and estimating all ask `conversion_plan`, so they cannot disagree.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import QuantizationSpec
from ..quant import QFTWeight
from .attachments import attach_, attachments
from .modules import PLAIN_CLASSES, QUANTIZED_CLASSES, is_quantized_module
from .products import Int8Products, int8_products
from .state import check_shared_columns

# Classes that hold their matrices transposed or in other forms, found in common models.
UNSUPPORTED_CLASSES = ("Conv1D",)


@dataclass(frozen=True, slots=True)
class Kept:
    """A parameter that stays float, and why."""

    name: str
    parameter: nn.Parameter
    reason: str


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What of a model is quantized and what is not.

    Attributes:
        modules: Modules whose `weight` is or will be a `QFTWeight`, by full name.
        kept: Parameters that stay float, each once.
    """

    modules: dict[str, nn.Module]
    kept: list[Kept]


def conversion_plan(model: nn.Module, modules_to_not_convert: list[str] | None) -> ConversionPlan:
    """Apply the rule: the weight of every `nn.Linear` and `nn.Embedding` that can be is quantized.

    Works on float models, on models already quantized, and on the meta device; changes nothing.

    Raises:
        ValueError: The model holds matrices in a class that is not supported and not excluded, or a
            name in `modules_to_not_convert` matches nothing.
    """
    excluded = modules_to_not_convert or []
    modules = {}
    reasons: dict[int, str] = {}
    unsupported = []
    for name, module in model.named_modules():
        reason = _reason_to_keep(name, module, excluded)
        if reason is None:
            modules[name] = module
        elif reason == "unsupported":
            unsupported.append(name)
        elif (weight := getattr(module, "weight", None)) is not None:
            reasons[id(weight)] = reason
    if unsupported:
        raise ValueError(
            f"{len(unsupported)} modules ({unsupported[0]}, ...) are of class "
            f"{type(model.get_submodule(unsupported[0])).__name__}, which QFT does not quantize. "
            "Use a model built from nn.Linear, or list their names in modules_to_not_convert to "
            "train them as float."
        )
    _check_names(model, excluded)
    # One float user of a tied weight keeps it float: it could not compute with codes.
    modules = {
        name: module
        for name, module in modules.items()
        if is_quantized_module(module) or id(module.weight) not in reasons
    }

    quantized = {id(module.weight) for module in modules.values()}
    kept = [
        Kept(name, parameter, reasons.get(id(parameter)) or _reason_by_shape(parameter))
        for name, parameter in model.named_parameters()
        if id(parameter) not in quantized
    ]
    return ConversionPlan(modules, kept)


def _reason_to_keep(name: str, module: nn.Module, excluded: list[str]) -> str | None:
    """Why the weight of a module stays float; None if it is quantized."""
    if is_quantized_module(module):
        return None
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "embedding with max_norm, which rewrites its rows in forward"
        if module.sparse or module.scale_grad_by_freq:
            return "embedding with sparse or frequency-scaled gradients"
    if _is_excluded(name, excluded):
        return "listed in modules_to_not_convert"
    if type(module).__name__ in UNSUPPORTED_CLASSES:
        return "unsupported"
    if type(module) not in QUANTIZED_CLASSES:
        return f"parameter of {type(module).__name__}"
    return None


def _reason_by_shape(parameter: nn.Parameter) -> str:
    return "vector" if parameter.ndim < 2 else "not the weight of an nn.Linear or nn.Embedding"


def _is_excluded(name: str, excluded: list[str]) -> bool:
    return any(re.search(rf"(^|\.){re.escape(entry)}(\.|$)", name) for entry in excluded)


def _check_names(model: nn.Module, excluded: list[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    unknown = [entry for entry in excluded if not any(_is_excluded(n, [entry]) for n in names)]
    if unknown:
        raise ValueError(
            f"modules_to_not_convert names {unknown}, which match no module of "
            f"{type(model).__name__}. Give full module names or single components of them, such as "
            f"{names[-1]!r}."
        )


def kept_parameters(model: nn.Module) -> list[Kept]:
    """The float parameters of a converted model: a plain module left in it was excluded."""
    plain = [
        name
        for name, module in model.named_modules()
        if type(module) in QUANTIZED_CLASSES or type(module).__name__ in UNSUPPORTED_CLASSES
    ]
    return conversion_plan(model, plain).kept


def prepare_modules_(model: nn.Module, spec: QuantizationSpec) -> ConversionPlan:
    """Give the modules of the plan their quantized classes and products; weights are not touched.

    The class changes in place, so hooks, references and names of the modules stay.

    Raises:
        ValueError: The rule refuses the model, `spec.int8_products` names no module of it, or a
            weight was quantized for other products. The model is unchanged.
    """
    plan = conversion_plan(model, spec.modules_to_not_convert)
    choices = product_choices(model, plan, spec)
    for name, products in choices.items():
        weight = plan.modules[name].weight
        if products is not None and isinstance(weight, QFTWeight):
            check_shared_columns(f"{name}.weight", weight)
    for module in plan.modules.values():
        module.__class__ = QUANTIZED_CLASSES.get(type(module), type(module))
    for name, products in choices.items():
        linear: Any = plan.modules[name]
        linear.products = products
    mark_tables_(model)
    return plan


def mark_tables_(model: nn.Module) -> None:
    """Tell weights that embeddings look up; to be called when weights are in place and tied."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and isinstance(module.weight, QFTWeight):
            module.weight.is_table = True


def product_choices(
    model: nn.Module, plan: ConversionPlan, spec: QuantizationSpec
) -> dict[str, Int8Products | None]:
    """Which products of the linear modules of `plan` are INT8; None: none is."""
    names = [name for name, module in plan.modules.items() if isinstance(module, nn.Linear)]
    return int8_products(model, names, spec)


def quantize_modules_(model: nn.Module, spec: QuantizationSpec) -> ConversionPlan:
    """Quantize a model in place: classes, then weights.

    Parameters keep their identity: tied weights stay tied, and an optimizer or a parameter group
    that already holds a parameter now holds its quantized form.

    Raises:
        ValueError: A weight has NaN or infinite values (named), or the rule refuses the model. The
            model is unchanged.
        RuntimeError: A weight is in use by a graph that is still alive. The model is unchanged.
    """
    plan = conversion_plan(model, spec.modules_to_not_convert)
    product_choices(model, plan, spec)  # raises, before anything has changed
    for name, parameter in _float_weights(plan):
        if not parameter.is_meta and not bool(parameter.detach().isfinite().all()):
            QFTWeight.from_float(parameter, spec, name=name)  # raises, before anything has changed
    _check_replaceable(dict(_float_weights(plan)))
    for name, parameter in _float_weights(plan):
        _replace_(parameter, QFTWeight.from_float(parameter, spec, name=name))
    prepare_modules_(model, spec)
    return plan


def _float_weights(plan: ConversionPlan) -> Iterator[tuple[str, nn.Parameter]]:
    """Weights of the plan that are not quantized yet; a tied one once."""
    seen: set[int] = set()
    for name, module in plan.modules.items():
        weight = module.weight
        if (
            isinstance(weight, nn.Parameter)
            and not isinstance(weight, QFTWeight)
            and id(weight) not in seen
        ):
            seen.add(id(weight))
            yield f"{name}.weight", weight


def dequantize_modules_(model: nn.Module, dtype: torch.dtype) -> None:
    """Back to plain modules in place, with weights of `dtype`; float parameters are cast too.

    Raises:
        ValueError: `dtype` is not a float type.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"A dequantized model needs a float dtype, got {dtype}.")
    quantized = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if is_quantized_module(module) and isinstance(module.weight, QFTWeight)
    }
    _check_replaceable(quantized)
    for module in model.modules():
        if is_quantized_module(module):
            weight = module.weight
            if isinstance(weight, QFTWeight):
                _replace_(weight, weight.dequantize().to(dtype))
            module.__dict__.pop("products", None)
            module.__class__ = PLAIN_CLASSES[type(module)]
    for module in model.modules():
        _cast_(module, dtype)


def _cast_(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast what a checkpoint of this module alone would hold, as loading it in `dtype` does.

    Other buffers are tables that the model computes, such as rotary frequencies: a cast would cost
    them digits that a reloaded model has.
    """
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
            setattr(module, name, buffer.to(dtype))


def _check_replaceable(parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise if the value of a parameter cannot be replaced, before the first one is.

    Raises:
        RuntimeError: Something beside the model holds on to the inside of a parameter (named).
    """
    for name, parameter in parameters.items():
        other = nn.Parameter(torch.empty(0, dtype=parameter.dtype))
        try:
            torch.utils.swap_tensors(parameter, other)
        except RuntimeError as error:
            raise RuntimeError(
                f"{name} cannot be converted in place while something holds on to it, such as the "
                "graph of an earlier forward pass. Delete its outputs, or compute them under "
                "torch.no_grad(), and convert then."
            ) from error
        torch.utils.swap_tensors(parameter, other)


def _replace_(parameter: torch.Tensor, tensor: torch.Tensor) -> None:
    """Put `tensor` in the place of a parameter's value; everybody who holds it sees the new one.

    Hooks and attributes that others have put on the parameter stay.
    """
    attached = attachments(parameter)
    parameter.grad = None
    torch.utils.swap_tensors(parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
    attach_(parameter, attached)
