"""`estimate_memory` and `estimate_side_memory`: predict the memory of a run, loading no weights."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ..config import check_choice
from ..memory import Base, MemoryEstimate, Workload, estimate, estimate_side
from ..nn import conversion_plan
from ..optim import QFTOptimizer
from ..side import QSTConfig, attach_side_network, side_config
from .base import BASES, DEFAULT_BASE, form_of_base, nf4_weights, stored_format
from .compatibility import quantization_config_of
from .config import QFTConfig, refuse_other_method
from .language_model import language_class, non_text_parts
from .missing_model import explain_loading_errors
from .optimizers import OPTIMIZERS, trial_optimizer
from .side_network import is_side_network

# Names of the width of a layer's MLP. BLOOM, GPT and GPT-Neo have 4 times the hidden size instead.
_MLP_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "dff")
# Names of the same as a multiple of the hidden size.
_MLP_MULTIPLES = ("expansion_ratio", "intermediate_multiple_size")
_BUILDING_FAULTS = (  # errors that making a model of a configuration can raise
    AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip

# A model, its configuration, a folder with a config.json, or a name on the hub.
ModelSource = nn.Module | PreTrainedConfig | str | Path


def estimate_memory(
    model_or_config: ModelSource,
    *,
    config: QFTConfig | None = None,
    gradient: str = "stack",
    momentum_bits: int | None = None,
    optimizer: str = "qft_lion",
    batch_size: int = 1,
    sequence_length: int = 2048,
    gradient_checkpointing: bool = True,
    chunked_loss: bool = False,
    n_processes: int = 1,
) -> MemoryEstimate:
    """Predict the memory of training a decoder model; no weight is loaded.

    Args:
        model_or_config: A model, on any device, whose frozen parameters have no gradients; or its
            configuration, a folder with a config.json or a name on the hub. From these a skeleton
            without storage is made, in the dtype that the configuration names or, without one,
            FP32.
        config: The weight format; None for that of the model if it is INT8, or the default.
        gradient: `"stack"` or `"release"`.
        momentum_bits: Bits of the momentum of `qft_lion`: 8 or 4; None for 8.
        optimizer: `"qft_lion"`, `"qft_adamw"` or `"qft_sgd"`, as in `TrainingArguments.optim`.
        batch_size: Sequences per micro-batch.
        sequence_length: Tokens per sequence.
        gradient_checkpointing: Whether layers keep only their input.
        chunked_loss: Whether logits never exist all at once; see `chunk_loss_`.
        n_processes: Processes that train together, with one GPU each. The bytes are those of the
            first, which owns the most rows; `batch_size` is per process.

    Returns:
        Bytes by kind. States are exact to the byte; activations are computed for a decoder with a
        gated MLP, with the widest layer's sizes for all layers if they differ. Those of parts for
        images or sound are not counted, and the parts are named.

    Raises:
        FileNotFoundError: Neither a folder with a config.json nor a model visible on the hub has
            this name.
        ValueError: `gradient`, `momentum_bits` or `optimizer` is not supported, `batch_size`,
            `sequence_length` or `n_processes` is below 1, or the model is INT8 in another format
            than `config` or quantized with another method, or the configuration is not that of a
            causal language model, or does not have a size of the decoder, or transformers cannot
            build the model.
    """
    if n_processes < 1:
        raise ValueError(f"n_processes must be 1 or more, got {n_processes}.")
    _refuse_sizes(batch_size, sequence_length)
    model = skeleton(model_or_config)
    refuse_other_method(model.config)
    workload = _workload(
        model.config.get_text_config(),
        compute_bytes=model.dtype.itemsize,
        tokens=batch_size * sequence_length,
        checkpointing=gradient_checkpointing,
        chunked_loss=chunked_loss,
    )
    return estimate(
        model,
        workload,
        _storage_format(model, config),
        optimizer=_trial_optimizer(optimizer, gradient, momentum_bits),
        n_processes=n_processes,
        not_counted=non_text_parts(model.config),
    )


def _trial_optimizer(name: str, gradient: str, momentum_bits: int | None) -> QFTOptimizer:
    check_choice("optimizer", name, OPTIMIZERS)
    arguments: dict[str, Any] = {"lr": 0.0, "gradient": gradient}
    if momentum_bits is not None:
        if "momentum_bits" not in OPTIMIZERS[name].options:
            raise ValueError(f"{name} has no momentum_bits, got {momentum_bits!r}. Leave it out.")
        arguments["momentum_bits"] = momentum_bits
    return trial_optimizer(name, **arguments)


def _storage_format(model: nn.Module, wanted: QFTConfig | None) -> QFTConfig:
    """Return the format of an INT8 model, with the products that are wanted; or the one wanted.

    Raises:
        ValueError: The model is INT8 in another format.
    """
    own = quantization_config_of(model)
    if own is None or wanted is None:
        return own or wanted or QFTConfig()
    own = deepcopy(own)
    for name, value in wanted.get_loading_attributes().items():
        setattr(own, name, value)
    return own


def skeleton(
    source: ModelSource, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> Any:
    """Return the model, or one without storage made from its configuration.

    Args:
        source: A model, its configuration, its folder, or its name on the hub.
        trust_remote_code: Whether code that comes with the model may run.
        dtype: Dtype of what stays float; None for the one that the configuration names, or FP32.

    Raises:
        FileNotFoundError: As in `estimate_memory`.
        ValueError: It is not a causal language model, or transformers cannot build it.
    """
    if isinstance(source, nn.Module):
        language_class(source.config)
        return source
    if isinstance(source, str | Path):
        folder = Path(source)
        if is_side_network(folder):
            raise ValueError(
                f"{folder} holds a side network without the model beside which it was trained. "
                "Name that model, and give --method qst, or in Python side=QSTConfig()."
            )
        with explain_loading_errors(source):
            if folder.is_dir() and not (folder / "config.json").is_file():
                raise FileNotFoundError(folder / "config.json")
            source = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    dtype = dtype or getattr(source, "dtype", None) or torch.float32
    make = language_class(source)
    return without_storage(make, source, dtype=dtype, trust_remote_code=trust_remote_code)


def without_storage(make: Any, config: Any, **how: Any) -> Any:
    """Return `make.from_config(config, **how)` without storage.

    Raises:
        ValueError: transformers cannot build the model.
    """
    try:
        with torch.device("meta"):
            return make.from_config(config, **how)
    except _BUILDING_FAULTS as error:
        advice = "Correct the config.json, or the setting that this names."
        if isinstance(error, ImportError):
            advice = "Install the package that this names."
        raise ValueError(
            f"transformers cannot build the model of {type(config).__name__}: "
            f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}. {advice}"
        ) from error


def estimate_side_memory(
    model_or_config: ModelSource,
    side: QSTConfig | None = None,
    *,
    base: str | None = None,
    config: QFTConfig | None = None,
    batch_size: int = 1,
    sequence_length: int = 2048,
    gradient_checkpointing: bool = True,
) -> MemoryEstimate:
    """Predict the memory of training a side network with AdamW; no weight is loaded.

    Args:
        model_or_config: As in `estimate_memory`.
        side: The side network; None for the default.
        base: How the frozen base is stored: `"nf4"`, `"int8"` or `"float"`, which means the dtype
            that the configuration names or, without one, FP32. None: as it is if it is quantized,
            otherwise in NF4.
        config: The format of an INT8 base, as in `estimate_memory`.
        batch_size: Sequences per micro-batch.
        sequence_length: Tokens per sequence.
        gradient_checkpointing: Whether side layers keep only their input.

    Returns:
        Bytes by kind. States are exact to the byte; activations are computed for a decoder with a
        gated MLP.

    Raises:
        FileNotFoundError: As in `estimate_memory`.
        ValueError: `base` is not supported or not how the model is quantized already, the model is
            quantized in another format than these, the side network does not fit the model, or as
            in `estimate_memory`.
    """
    estimator = SideEstimator(model_or_config, side or QSTConfig(), base, config)
    return estimator(
        batch_size=batch_size,
        sequence_length=sequence_length,
        gradient_checkpointing=gradient_checkpointing,
    )


class SideEstimator:
    """Predicts the memory of one side network on one base; the skeletons are made only once."""

    def __init__(
        self, source: ModelSource, side: QSTConfig, base: str | None, config: QFTConfig | None
    ) -> None:
        origin = skeleton(source)
        base = form_of_base(origin.config, base) or DEFAULT_BASE
        if base not in BASES and base == stored_format(origin.config):
            raise ValueError(
                f"The model is stored in {base}, and the memory of bases in other formats than "
                f"{', '.join(BASES)} is not estimated. A side network can be trained beside it "
                "without an estimate; or start from the float model."
            )
        check_choice("base", base, BASES)
        with torch.device("meta"):  # a second one, to modify
            model = type(origin)._from_config(origin.config, dtype=origin.dtype)
        self.base = Base()
        if base == "nf4":
            self.base = Base(nf4=nf4_weights(model))
        elif base == "int8":
            spec = _storage_format(origin, config)
            plan = conversion_plan(model, spec.modules_to_not_convert)
            self.base = Base(plan=plan, spec=spec)
        self.side = side
        self.sizes = (model.config.get_text_config(), side_config(model.config, side))
        self.model = attach_side_network(model, side)

    def __call__(
        self, *, batch_size: int, sequence_length: int, gradient_checkpointing: bool
    ) -> MemoryEstimate:
        """Return the memory with these sizes, as in `estimate_side_memory`."""
        _refuse_sizes(batch_size, sequence_length)
        work, side_work = (
            _workload(
                sizes,
                compute_bytes=self.model.dtype.itemsize,
                tokens=batch_size * sequence_length,
                checkpointing=gradient_checkpointing,
                chunked_loss=False,
            )
            for sizes in self.sizes
        )
        return estimate_side(self.model, self.base, work, side_work, self.side)


def _refuse_sizes(batch_size: int, sequence_length: int) -> None:
    if batch_size < 1 or sequence_length < 1:
        raise ValueError(
            f"batch_size and sequence_length must be 1 or more, got {batch_size} and "
            f"{sequence_length}."
        )


def _workload(
    config: Any, *, compute_bytes: int, tokens: int, checkpointing: bool, chunked_loss: bool
) -> Workload:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in names if _largest(config, name) is None]
    intermediate, choices = (None, 0) if missing else _mlp(config)
    if intermediate is None:
        lacking = ", ".join(missing or ["intermediate_size"])
        raise ValueError(
            f"{type(config).__name__} has no {lacking}, so its activations cannot be computed. A "
            "run of a few steps (--max_steps 3) measures its memory; in Python, memory_ledger "
            "measures any model."
        )
    heads = _largest(config, "num_attention_heads") or 1
    width = _largest(config, "head_dim") or config.hidden_size // heads
    return Workload(
        tokens=tokens,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        attention=heads * width,
        key_value=(_largest(config, "num_key_value_heads") or heads) * width,
        intermediate=intermediate,
        vocabulary=config.vocab_size,
        compute_bytes=compute_bytes,
        checkpointing=checkpointing,
        chunked_loss=chunked_loss,
        experts_per_token=choices,
    )


def _mlp(config: Any) -> tuple[int | None, int]:
    """Return the width of one token's activations in a layer's MLP, and how many experts it has."""
    mlp = getattr(config, "ffn_config", config)  # a section in DBRX
    of_expert = _largest(config, "moe_intermediate_size")
    width = _largest(mlp, *_MLP_WIDTHS) or of_expert
    if width is None and (multiple := _largest(config, *_MLP_MULTIPLES)):
        width = multiple * config.hidden_size
    elif width is None and (
        hasattr(config, "n_inner") or config.model_type in ("bloom", "gpt_neo", "openai-gpt")
    ):
        width = 4 * config.hidden_size
    choices = getattr(mlp, "num_experts_per_tok", None) or getattr(mlp, "moe_top_k", None) or 0
    shared = getattr(config, "n_shared_experts", None) or 0
    if width is None or not choices:
        return width, 0
    beside = _largest(config, "shared_expert_intermediate_size") or 0  # Qwen's shared expert
    # Some layers may have no experts.
    return max(width, (choices + shared) * (of_expert or width) + beside), choices


def _largest(config: Any, *names: str) -> int | None:
    """Return the first of these sizes that is set; if layers differ, that of the widest one."""
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    for name in names:
        values = [getattr(layer, name, None) for layer in layers]
        sizes = [
            size
            for value in values
            for size in (value if isinstance(value, list | tuple) else [value])
            if size is not None
        ]
        if sizes:
            return int(max(sizes))
    return None
