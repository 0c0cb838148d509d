"""The frozen base of a side network: the formats that it is stored and loaded in."""

import logging
from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..config import check_choice
from ..side import layer_stack
from .config import QUANT_METHOD, QFTConfig, quantization_method

logger = logging.getLogger(__name__)

BASES = ("nf4", "int8", "float")
DEFAULT_BASE = "nf4"  # for a float model
FORMS = {"bitsandbytes": "nf4", QUANT_METHOD: "int8", None: "float"}  # by `quantization_name`


def base_format(base: str, model: Any, *, config: QFTConfig | None = None) -> Any:
    """Return the `quantization_config` with which `from_pretrained` loads a base in a format.

    Args:
        base: `"nf4"`: 4 bits per weight with double quantization, by bitsandbytes (Dettmers et al.
            2023, "QLoRA"); `"int8"`: this package's weights; `"float"`.
        model: A model of the class that will be loaded, on any device, including meta. NF4 weights
            are multiplied in its dtype.
        config: The format for `"int8"`; None for the default.

    Returns:
        A configuration; None with `"float"`.

    Raises:
        ImportError: `base` is `"nf4"`, and bitsandbytes is not installed.
        ValueError: `base` is not one of `BASES`.
    """
    check_choice("base", base, BASES)
    if base == "float":
        return None
    if base == "int8":
        return config or QFTConfig()
    require_bitsandbytes()
    _warn_of_floats(model)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=_kept(model),  # for 4 bits, too
    )


def stored_format(config: Any) -> str:
    """Return how a configuration's model is stored: one of `BASES`, or the name of a format."""
    name = quantization_name(config)
    return FORMS.get(name, str(name))


def form_of_base(config: Any, asked: str | None, *, model: str = "the model") -> str | None:
    """Return how a base is to be stored: a quantized one as it is, a float one as `asked`.

    Args:
        config: The model's configuration.
        asked: One of `BASES`; None if nothing was asked for.
        model: The model, for the error.

    Raises:
        ValueError: The model is quantized already, in another format than was asked for.
    """
    stored = stored_format(config)
    if stored == "float":
        return asked
    if asked not in (None, stored):
        raise ValueError(
            f"base={asked} was asked for, but {model} is already stored in {stored}. Leave base "
            "out, or start from the float model."
        )
    return stored


def quantization_name(config: Any) -> str | None:
    """Return the name of the format that a model is stored in; None for float.

    It is the name of the quantization method, to which bitsandbytes' formats other than NF4 add
    theirs: `"bitsandbytes fp4"`, `"bitsandbytes int8"`.

    Args:
        config: The model's configuration or its quantizer: what holds a `quantization_config`.
    """
    method: str | None = quantization_method(config)
    if method != "bitsandbytes":
        return method
    said = config.quantization_config
    said = said if isinstance(said, dict) else said.to_dict()
    form = "int8" if said.get("load_in_8bit") else said.get("bnb_4bit_quant_type", "fp4")
    return method if form == "nf4" else f"{method} {form}"


def require_bitsandbytes() -> None:
    """Raise ImportError if bitsandbytes, which makes NF4 weights, is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "base='nf4' stores the frozen base with bitsandbytes, which is not installed. "
            "`pip install 'bitsandbytes>=0.50'`; or set base to 'int8', which needs no other "
            "package and twice the bytes, or to 'float'."
        ) from error


def nf4_weights(model: Any) -> list[Tensor]:
    """Return the weights that `base_format` has bitsandbytes store in 4 bits; others stay float.

    Args:
        model: A float model of transformers, on any device, including meta.
    """
    kept = [*_kept(model), *(model._keep_in_fp32_modules or [])]
    return [
        module.weight
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear)
        and should_convert_module(name, kept)
    ]


def _warn_of_floats(model: Any) -> None:
    """Warn if most of the layers stays float, as experts that are one parameter do."""
    _, layers = layer_stack(model)
    total = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    stored = sum(weight.numel() for weight in nf4_weights(model))
    if stored < total / 2:
        logger.warning(
            "base=nf4 stores only %.1f%% of the layers of %s in 4 bits: bitsandbytes leaves "
            "experts float. base=int8 stores them in INT8",
            100 * stored / total,
            type(model).__name__,
        )


def _kept(model: Any) -> list[str]:
    """Return names of linear modules outside layers, such as heads and poolers; they stay float.

    They come after the side network and pass gradients back to it, which bitsandbytes' CPU kernels
    cannot do. The default of transformers would also store a new classifier in 4 bits.
    """
    _, layers = layer_stack(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside
    ]
