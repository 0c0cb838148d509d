"""`torch_compile=True`: the layers of a model compiled one by one, all by the code of the first.

Accelerate would compile the model whole. Its backward pass would then hand all gradients over at
once, and `gradient="release"` save nothing. Of a layer it hands over those of the layer.
"""

import os
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from torch import nn
from transformers import TrainingArguments

# By this the launcher has Accelerate compile every model; `TrainingArguments` sets it too.
BACKEND = "ACCELERATE_DYNAMO_BACKEND"
# Those of Inductor that capture CUDA graphs.
CAPTURING_MODES = ("reduce-overhead", "max-autotune")


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of each list of several of one class; of lists in lists, those of the outer."""
    if isinstance(model, nn.ModuleList) and len({type(layer) for layer in model}) == 1 < len(model):
        return list(model)
    return [layer for child in model.children() for layer in repeated_layers(child)]


def compiler(args: TrainingArguments) -> dict[str, Any]:
    """How the arguments or the launcher want the model compiled, as `torch.compile` takes it.

    Empty: not at all.
    """
    if args.torch_compile:
        backend, mode = args.torch_compile_backend, args.torch_compile_mode
    else:
        backend = os.environ.get(BACKEND, "no").lower()
        mode = os.environ.get("ACCELERATE_DYNAMO_MODE")
    if backend == "no":
        return {}
    return {"backend": backend} | ({} if mode in (None, "default") else {"mode": mode})


def refuse_uncompilable(args: TrainingArguments, model: nn.Module) -> None:
    """Raise for what a run cannot have beside `torch_compile=True`.

    Raises:
        ValueError: The text says what to do instead.
    """
    options = compiler(args)
    if not options:
        return
    reasons = []
    if getattr(args, "cuda_graph", False):
        reasons.append("cuda_graph=True captures what runs eagerly. Take one of the two")
    if (mode := options.get("mode")) in CAPTURING_MODES:
        reasons.append(
            f"in the mode {mode!r} the compiler captures CUDA graphs, whose gradients the next "
            "pass overwrites. Take 'default' or 'max-autotune-no-cudagraphs'"
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
    """Have the layers of a model compiled when they first run.

    Names of modules and states stay as they are.

    Args:
        model: Modified.
        options: What `torch.compile` takes.
    """
    for layer in repeated_layers(model):
        layer.compile(**options)


def take_from_accelerate(args: TrainingArguments) -> dict[str, Any]:
    """What `compiler` says; Accelerate, which was told the same, compiles nothing then."""
    options = compiler(args)
    AcceleratorState().dynamo_plugin.backend = DynamoBackend.NO
    return options
