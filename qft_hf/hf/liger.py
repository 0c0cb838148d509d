"""Liger's kernels on a model with INT8 weights: all of them but two that multiply with weights.

transformers binds them to the modules of a model when training begins. Norms, activations and
rotations are of floats, whatever the weights are. Its fused linear cross-entropy multiplies with
the head and makes a float gradient of all of it: `chunk_loss_` takes its place. Its kernel for
experts reads their weights as floats, and is refused.
"""

import inspect
import logging
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainingArguments
from transformers.utils.import_utils import is_liger_kernel_available

from ..nn.experts import GroupedModule
from ..side import side_network_of

if TYPE_CHECKING:
    from .arguments import QFTTrainingArguments

logger = logging.getLogger(__name__)

FUSED = "fused_linear_cross_entropy"  # keys of `liger_kernel_config`, which is on by default
WHOLE = "cross_entropy"  # of logits that exist, off by default
_REASON = (
    "Liger's fused linear cross-entropy makes a float gradient of the whole head, which with INT8 "
    "weights is the largest tensor of a step"
)

WITHOUT_FUSED = (
    "With use_liger_kernel=True it takes the place of Liger's fused linear cross-entropy; "
    f"liger_kernel_config={{'{FUSED}': False}} leaves out both."
)


def settle_loss_(args: "QFTTrainingArguments") -> None:
    """Have a chunked loss take the place of Liger's fused one, unless `args` says otherwise.

    Args:
        args: Of a run with Liger's kernels and one of our optimizers; `chunked_loss` and
            `liger_kernel_config` are modified.

    Raises:
        TypeError: A kernel is neither on nor off.
        ValueError: The fused loss is asked for, or two kinds of loss are.
    """
    kernels = _kernels(args)
    if kernels.get(FUSED):
        raise ValueError(
            f"liger_kernel_config={{'{FUSED}': True}}: {_REASON}. Leave it out: chunked_loss=True "
            "then takes its place."
        )
    if kernels.get(WHOLE) and args.chunked_loss:
        raise ValueError(
            f"liger_kernel_config={{'{WHOLE}': True}} is a kernel for logits that exist whole, and "
            "with chunked_loss=True they do not. Leave one of them out."
        )
    if FUSED in kernels:
        return
    if args.chunked_loss is None:
        args.chunked_loss = not kernels.get(WHOLE)
    args.liger_kernel_config = {**kernels, FUSED: False}
    logger.warning(
        "use_liger_kernel=True: %s. %s",
        _REASON,
        "chunked_loss=True takes its place; chunked_loss=False computes all logits instead"
        if args.chunked_loss
        else "It is left out, and all logits are computed",
    )


def refuse_kernels(args: TrainingArguments, model: nn.Module) -> None:
    """Raise for what Liger cannot do, or would leave out without a word.

    Where it is not installed nothing is known of its kernels, and transformers says so when
    training begins.

    Raises:
        TypeError: A kernel is neither on nor off.
        ValueError: It would compute the loss itself, it knows no model of this family, or the
            family has no kernel of a name in `liger_kernel_config`.
    """
    kernels = _kernels(args)
    if kernels.get(FUSED, True) and side_network_of(model) is None:
        raise ValueError(
            f"use_liger_kernel=True: {_REASON}. Set liger_kernel_config={{'{FUSED}': False}}; "
            "QFTTrainingArguments(use_liger_kernel=True) does, and takes a chunked loss instead."
        )
    if not is_liger_kernel_available():
        return
    family, known = _family(model), _kernels_of_family(model)
    if not known:
        raise ValueError(
            f"use_liger_kernel=True: Liger has no kernels for models of type {family!r}. Leave "
            "use_liger_kernel off."
        )
    if unknown := sorted(kernels.keys() - known.keys() - {FUSED}):
        raise ValueError(
            f"liger_kernel_config has {', '.join(unknown)}, and Liger's kernels for {family!r} are "
            f"{', '.join(sorted(known))}. Leave {', '.join(unknown)} out."
        )


def refuse_experts(args: TrainingArguments, model: nn.Module) -> None:
    """Raise if Liger would multiply with experts that are INT8, whose weights it reads as floats.

    It does so under `swiglu`; where Liger leaves a family's experts alone, that has to be off too.

    Raises:
        TypeError: A kernel is neither on nor off.
        ValueError: It would.
    """
    if not is_liger_kernel_available():
        return
    if not (_kernels_of_family(model) | _kernels(args)).get("swiglu"):
        return
    for name, module in model.named_modules():
        if isinstance(module, GroupedModule):
            raise ValueError(
                f"use_liger_kernel=True: Liger's kernel for experts reads float weights, and those "
                f"of {name} are INT8. Set liger_kernel_config={{'swiglu': False}}."
            )


def _family(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _kernels_of_family(model: nn.Module) -> dict[str, bool]:
    """Names of the kernels that Liger has for a model, and whether each is on by default."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as OF_FAMILIES

    apply = OF_FAMILIES.get(_family(model))
    parameters = inspect.signature(apply).parameters.values() if apply else ()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool)}


def _kernels(args: TrainingArguments) -> dict[str, bool]:
    """Whether Liger's kernels are taken, by name, as far as `args` says.

    Raises:
        TypeError: A value is no bool.
    """
    kernels: Any = args.liger_kernel_config or {}
    if not isinstance(kernels, dict) or not all(isinstance(v, bool) for v in kernels.values()):
        raise TypeError(
            "liger_kernel_config must say True or False of names of kernels, as in "
            f"{{'rope': False}}, got {kernels!r}."
        )
    return kernels
