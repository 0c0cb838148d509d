"""The rule that decides what is quantized, and the conversion of a model in both directions.

Loading, converting and estimating all use `conversion_plan`, so they cannot disagree.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..config import QuantizationSpec, names_module
from ..kernels.checks import FLOATS
from ..quant import Arrangement, QFTWeight, check_quantizable
from .attachments import replace_
from .kinds import arrangement_of, kind_of, own_weights
from .modules import QuantizedModule, quantized_class, uses_our_forward
from .products import Int8Products, int8_products
from .state import check_shared_columns

LISTED = "listed in modules_to_not_convert"


@dataclass(frozen=True, slots=True)
class Kept:
    """A parameter that stays float, and the reason."""

    name: str
    parameter: nn.Parameter
    reason: str


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """Which parameters of a model are quantized and which stay float."""

    # Modules with weights that are or will be `QFTWeight`, by full name.
    modules: dict[str, nn.Module]
    weights: dict[str, nn.Parameter]  # these weights by full name; a tied weight is listed once
    # How each of them is stored as a matrix, by the same names.
    arrangements: dict[str, Arrangement]
    kept: list[Kept]  # parameters that stay float, each listed once


def conversion_plan(model: nn.Module, modules_to_not_convert: list[str] | None) -> ConversionPlan:
    """Apply the rule: weights of modules of one of `KINDS` are quantized, if possible.

    Works on float models, on models already quantized, and on the meta device; changes nothing.

    Raises:
        ValueError: Modules share a weight that only some of them hold transposed, or a name in
            `modules_to_not_convert` matches no module.
    """
    excluded = modules_to_not_convert or []
    modules = {}
    reasons: dict[int, str] = {}
    for name, module in model.named_modules():
        reason = _reason_to_keep(name, module, excluded)
        if reason is None:
            modules[name] = module
        else:
            reasons |= {id(parameter): reason for parameter in module.parameters(recurse=False)}
    _check_names(model, excluded)
    # A tied weight stays float if one of its modules does: that module cannot compute with codes.
    modules = {
        name: module
        for name, module in modules.items()
        if isinstance(module, QuantizedModule)
        or not any(id(weight) in reasons for weight in own_weights(module).values())
    }
    quantized: dict[int, Arrangement] = {}
    for name, module in modules.items():
        for own, weight in own_weights(module).items():
            arrangement = arrangement_of(module, own)
            if quantized.setdefault(id(weight), arrangement) != arrangement:
                raise ValueError(
                    f"{name}.{own} is shared with a module that holds it transposed. List one of "
                    "them in modules_to_not_convert, which keeps the weight float."
                )
    plan = ConversionPlan(modules, {}, {}, [])
    for name, parameter in model.named_parameters():  # lists a tied one by its first name
        if id(parameter) in quantized:
            plan.weights[name], plan.arrangements[name] = parameter, quantized[id(parameter)]
        else:
            reason = reasons.get(id(parameter)) or _beside(parameter)
            plan.kept.append(Kept(name, parameter, reason))
    return plan


def _reason_to_keep(name: str, module: nn.Module, excluded: list[str]) -> str | None:
    """Return why the parameters of a module stay float; None if its weights are quantized."""
    if isinstance(module, QuantizedModule):
        return None
    kind = type(module).__name__
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "embedding with max_norm, which rewrites its rows in forward"
        if module.sparse or module.scale_grad_by_freq:
            return "embedding with sparse or frequency-scaled gradients"
        if "Sinusoidal" in kind:
            return f"table of {kind}, which is computed and not trained"
    if any(names_module(entry, name) for entry in excluded):
        return LISTED
    if kind_of(module) is None:
        return f"parameter of {kind}"
    if own := [name for name in ("products", "spec") if hasattr(module, name)]:
        return f"parameter of {kind}, whose attribute {own[0]!r} INT8 modules would overwrite"
    weights = own_weights(module)
    if not weights:
        # Parametrizations, such as torch's weight_norm, compute the weight from other parameters.
        return f"parameter of {kind}, whose weight is computed from others"
    for own_name, weight in weights.items():
        if type(weight) not in (nn.Parameter, QFTWeight):  # QFTWeight: tied to a quantized module
            return f"{own_name} of {kind} is a {type(weight).__name__}"
        if weight.dtype not in FLOATS:
            return f"{own_name} of {kind} is {weight.dtype}"
        if not weight.numel():
            return f"{own_name} of {kind} is empty"
    return None


def _beside(parameter: nn.Parameter) -> str:
    """Return why a parameter stays float that is next to the quantized weights of a module."""
    return "vector" if parameter.ndim < 2 else "next to the weight of its module"


def _check_names(model: nn.Module, excluded: list[str]) -> None:
    names = [name for name, _ in model.named_modules()]
    unknown = [entry for entry in excluded if not any(names_module(entry, n) for n in names)]
    if unknown:
        raise ValueError(
            f"modules_to_not_convert names {unknown}, which match no module of "
            f"{type(model).__name__}. Give full module names or single components of them, such as "
            f"{names[-1]!r}."
        )


def kept_parameters(model: nn.Module) -> list[Kept]:
    """Return the float parameters of a converted model, also those that the rule would quantize."""
    specs = [m.spec for m in model.modules() if isinstance(m, QuantizedModule) and m.spec]
    excluded = (specs[0].modules_to_not_convert if specs else None) or []
    reasons: dict[int, str] = {}
    for name, module in model.named_modules():
        reason = _reason_to_keep(name, module, excluded)
        for parameter in module.parameters(recurse=False):
            if reason is not None:
                reasons[id(parameter)] = reason
            elif not isinstance(module, QuantizedModule):  # added since
                added = f"parameter of {type(module).__name__}, which is not quantized"
                reasons.setdefault(id(parameter), added)
    return [
        Kept(name, parameter, reasons.get(id(parameter)) or _beside(parameter))
        for name, parameter in model.named_parameters()
        if not isinstance(parameter, QFTWeight)
    ]


def prepare_modules_(model: nn.Module, spec: QuantizationSpec) -> ConversionPlan:
    """Give the modules of the plan their quantized classes and products; weights are not changed.

    The class changes in place, so hooks, references and names of the modules stay valid.

    Raises:
        ValueError: The rule refuses the model, a name in `spec.int8_products` matches no module of
            it, or a weight was quantized for other products. The model is unchanged.
    """
    plan = conversion_plan(model, spec.modules_to_not_convert)
    choices = product_choices(model, plan, spec)
    for name, products in choices.items():
        for own, weight in own_weights(plan.modules[name]).items():
            if products is not None and isinstance(weight, QFTWeight):
                check_shared_columns(f"{name}.{own}", weight)
    for name, module in plan.modules.items():
        prepared: Any = module
        prepared.spec = spec
        if name in choices:
            prepared.products = choices[name]
        kind = kind_of(module)
        if kind is not None and not isinstance(module, QuantizedModule):
            prepared.__class__ = quantized_class(type(module), kind)
    mark_tables_(model)
    return plan


def mark_tables_(model: nn.Module) -> None:
    """Set `is_table` on the weights of embeddings; call when weights are in place and tied."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and isinstance(module.weight, QFTWeight):
            module.weight.is_table = True


def product_choices(
    model: nn.Module, plan: ConversionPlan, spec: QuantizationSpec
) -> dict[str, Int8Products | None]:
    """Return which products of the linear modules and experts of `plan` are INT8; None: none.

    Modules whose own forward reads the weight are not listed: it uses the dequantized weight.
    """
    names = [
        name
        for name, module in plan.modules.items()
        if uses_our_forward(module) or ((kind := kind_of(module)) and kind.replaces_forward)
    ]
    return int8_products(model, names, spec)


def quantize_modules_(model: nn.Module, spec: QuantizationSpec) -> ConversionPlan:
    """Quantize a model in place: classes, then weights.

    Parameters keep their identity: tied weights stay tied, and an optimizer or a parameter group
    that already holds a parameter now holds its quantized form. After an interrupt, modules whose
    weights are still float refuse to run, and another call with the same `spec` quantizes these.

    Raises:
        ValueError: A weight has NaN or infinite values, or too many (it is named), or the rule
            refuses the model. The model is unchanged.
        RuntimeError: A weight is in use by a graph that is still alive. The model is unchanged.
    """
    plan = conversion_plan(model, spec.modules_to_not_convert)
    product_choices(model, plan, spec)  # may raise, before anything has changed
    weights = {n: weight for n, weight in plan.weights.items() if not isinstance(weight, QFTWeight)}
    for name, parameter in weights.items():
        check_quantizable(name, parameter.detach(), plan.arrangements[name])
    _check_replaceable(weights)
    prepare_modules_(model, spec)
    for name, parameter in weights.items():
        transposed = plan.arrangements[name].transposed
        weight = QFTWeight.from_float(parameter, spec, name=name, transposed=transposed)
        replace_(parameter, weight)
    mark_tables_(model)
    return plan


def dequantize_modules_(model: nn.Module, dtype: torch.dtype) -> None:
    """Restore plain modules in place, with weights of `dtype`; float parameters are cast too.

    Raises:
        ValueError: `dtype` is not a float type.
        RuntimeError: An operator outside of the weight's module has saved it for backward, or only
            some of its fields were loaded. The model is unchanged.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"A dequantized model needs a float dtype, got {dtype}.")
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, QFTWeight)}
    for name, weight in weights.items():
        weight.check_complete(name)
    _check_replaceable(weights)
    for weight in weights.values():
        replace_(weight, weight.values().to(dtype))
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            for name in ("products", "spec"):
                module.__dict__.pop(name, None)
            quantized: Any = module
            quantized.__class__ = type(module).plain_class
    for module in model.modules():
        _cast_(module, dtype)


def _cast_(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters and persistent buffers of this module, as loading it in `dtype` does.

    Other buffers are tables that the model computes, such as rotary frequencies: a cast would
    reduce their precision below that of a reloaded model.
    """
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
            setattr(module, name, buffer.to(dtype))


def _check_replaceable(parameters: Mapping[str, torch.Tensor]) -> None:
    """Raise RuntimeError if any parameter cannot be replaced, before one is replaced."""
    for name, parameter in parameters.items():
        other = nn.Parameter(torch.empty(0, dtype=parameter.dtype))
        try:
            torch.utils.swap_tensors(parameter, other)
        except RuntimeError as error:
            raise RuntimeError(
                f"{name} cannot be converted in place while something refers to it, such as the "
                "graph of an earlier forward pass. Delete the outputs of that pass, or run it "
                "under torch.no_grad(), before you convert the model. An interactive session keeps "
                "the last error, too, which may refer to it: try once more."
            ) from error
        torch.utils.swap_tensors(parameter, other)
