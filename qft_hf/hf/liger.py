"""Liger's kernels on a model with INT8 weights: all except the two that multiply by weights.

transformers binds the kernels to the modules of a model when training begins. Norms, activations
and rotary embeddings are computed on floats, whatever the format of the weights. The fused linear
cross-entropy multiplies by the head and makes a float gradient of the whole head: `chunk_loss_`
replaces it. The kernel for experts reads their weights as floats and is refused.
"""

import inspect
import logging
import os
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
WHOLE = "cross_entropy"  # needs all logits in memory; off by default
_REASON = (
    "Liger's fused linear cross-entropy makes a float gradient of the whole head, which with INT8 "
    "weights is the largest tensor of a step"
)

WITHOUT_FUSED = (
    "With use_liger_kernel=True a chunked loss replaces Liger's fused linear cross-entropy; "
    f"liger_kernel_config={{'{FUSED}': False}} leaves out both."
)


def settle_loss_(args: "QFTTrainingArguments") -> None:
    """Replace Liger's fused loss by a chunked loss, unless `args` says otherwise.

    Args:
        args: Arguments of a run with Liger's kernels and one of our optimizers. `chunked_loss` and
            `liger_kernel_config` are modified.

    Raises:
        TypeError: A value of `liger_kernel_config` is not a bool.
        ValueError: `args` asks for the fused loss, or for two kinds of loss.
    """
    kernels = _kernels(args)
    if kernels.get(FUSED):
        raise ValueError(
            f"liger_kernel_config={{'{FUSED}': True}}: {_REASON}. Leave it out: chunked_loss=True "
            "then takes its place."
        )
    if kernels.get(WHOLE) and args.chunked_loss:
        raise ValueError(
            f"liger_kernel_config={{'{WHOLE}': True}} needs all logits at once, which a run with "
            "chunked_loss=True never has. Leave one of the two out."
        )
    if FUSED in kernels:
        return
    if args.chunked_loss is None:
        args.chunked_loss = not (kernels.get(WHOLE) or args.label_smoothing_factor)
    args.liger_kernel_config = {**kernels, FUSED: False}
    logger.warning(
        "use_liger_kernel=True: %s. %s",
        _REASON,
        "chunked_loss=True takes its place; chunked_loss=False computes all logits instead"
        if args.chunked_loss
        else "It is left out, and all logits are computed",
    )


def refuse_without_gpu(args: TrainingArguments) -> None:
    """Raise ValueError if Liger's kernels would run on a CPU, except in Triton's interpreter."""
    if not args.use_liger_kernel:
        return
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("use_liger_kernel needs a GPU, and there is none. Leave it out.")


def refuse_kernels(args: TrainingArguments, model: nn.Module) -> None:
    """Raise for options that Liger cannot honor or would silently ignore.

    If Liger is not installed, its kernels are not known here, and transformers raises when training
    begins.

    Raises:
        TypeError: A value of `liger_kernel_config` is not a bool.
        ValueError: Liger would compute the fused loss, has no kernels for this family of models, or
            has none of a name in `liger_kernel_config` for it.
    """
    kernels = _kernels(args)
    if kernels.get(FUSED, True) and side_network_of(model) is None:
        raise ValueError(
            f"use_liger_kernel=True: {_REASON}. Set liger_kernel_config={{'{FUSED}': False}}; "
            "QFTTrainingArguments(use_liger_kernel=True) does so, and uses a chunked loss instead."
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
    """Raise if Liger would multiply by INT8 experts, whose weights it reads as floats.

    The kernel's option is `swiglu`. It has to be off also for a family whose experts Liger leaves
    alone.

    Raises:
        TypeError: A value of `liger_kernel_config` is not a bool.
        ValueError: `swiglu` is on, and the model has INT8 experts.
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
    """Return, by name, whether each kernel that Liger has for a model is on by default."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as OF_FAMILIES

    apply = OF_FAMILIES.get(_family(model))
    parameters = inspect.signature(apply).parameters.values() if apply else ()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool)}


def _kernels(args: TrainingArguments) -> dict[str, bool]:
    """Return, by name, whether each kernel that `args` names is on.

    Raises:
        TypeError: A value is not a bool.
    """
    kernels: Any = args.liger_kernel_config or {}
    if not isinstance(kernels, dict) or not all(isinstance(v, bool) for v in kernels.values()):
        raise TypeError(
            "liger_kernel_config must map names of kernels to True or False, as in "
            f"{{'rope': False}}, got {kernels!r}."
        )
    return kernels
