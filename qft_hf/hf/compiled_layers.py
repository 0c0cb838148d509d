"""`torch_compile=True`: the layers of a model are compiled one by one, and share compiled code.

Accelerate would compile the whole model. Its backward pass would then return all gradients at once,
and `gradient="release"` would save nothing. A compiled layer returns only its own gradients.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import TrainingArguments

# By this variable the launcher has Accelerate compile models; `TrainingArguments` sets it, too.
BACKEND = "ACCELERATE_DYNAMO_BACKEND"
# Modes of Inductor that capture CUDA graphs.
CAPTURING_MODES = ("reduce-overhead", "max-autotune")


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers in each list of several of one class; of nested lists, the outer counts."""
    if isinstance(model, nn.ModuleList) and len({type(layer) for layer in model}) == 1 < len(model):
        return list(model)
    return [layer for child in model.children() for layer in repeated_layers(child)]


def compiler(args: TrainingArguments) -> dict[str, Any]:
    """Return the options of `torch.compile` that the arguments or the launcher set.

    They are empty if the model is not to be compiled.
    """
    if args.torch_compile:
        backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
    else:
        backend = os.environ.get(BACKEND, "no").lower()
        mode = os.environ.get("ACCELERATE_DYNAMO_MODE")
    if backend == "no":
        return {}
    return {"backend": backend} | ({} if mode in (None, "default") else {"mode": mode})


def refuse_uncompilable(args: TrainingArguments, model: nn.Module) -> None:
    """Raise ValueError if other options or the model rule out `torch_compile=True`."""
    options = compiler(args)
    if not options:
        return
    from torch._inductor import list_mode_options  # slow to import

    reasons = []
    if options["backend"].upper() not in DynamoBackend.__members__:
        known = ", ".join(DynamoBackend.__members__).lower()
        reasons.append(f"there is no backend {options['backend']!r}. Set one of {known}")
    if options["backend"] == "inductor" and options.get("mode", "default") not in (
        modes := list_mode_options()
    ):
        reasons.append(f"there is no mode {options['mode']!r}. Set one of {', '.join(modes)}")
    if getattr(args, "cuda_graph", False):
        reasons.append("cuda_graph=True captures only code that runs eagerly. Set one of the two")
    if (mode := options.get("mode")) in CAPTURING_MODES:
        reasons.append(
            f"in the mode {mode!r} the compiler captures CUDA graphs, whose gradients the next "
            "pass overwrites. Set 'default' or 'max-autotune-no-cudagraphs'"
        )
    if args.use_cache:
        reasons.append("use_cache=True needs other code for each layer. Set use_cache=False")
    if not repeated_layers(model):
        reasons.append(f"{type(model).__name__} has no list of layers of one class to compile")
    if reasons:
        raise ValueError(
            f"torch_compile=True, or {BACKEND}: {reasons[0]}; or leave the compiler off."
        )


def compile_layers_(model: nn.Module, options: dict[str, Any]) -> None:
    """Compile each layer of a model when it first runs.

    The names of modules and of tensors in the state dict do not change.

    Args:
        model: Modified.
        options: Arguments of `torch.compile`.
    """
    for layer in repeated_layers(model):
        layer.compile(**options)


def disable_accelerate_compile(args: TrainingArguments) -> dict[str, Any]:
    """Return the options of `compiler`, and keep Accelerate from compiling the model as well."""
    options = compiler(args)
    AcceleratorState().dynamo_plugin.backend = DynamoBackend.NO
    return options
