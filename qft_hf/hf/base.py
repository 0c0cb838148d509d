"""The frozen base of a side network: how it is stored, and what loads it so."""

from typing import Any

from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from ..side import layer_stack
from .config import QUANT_METHOD, QFTConfig

BASES = ("nf4", "int8", "float")
FORMS = {"bitsandbytes": "nf4", QUANT_METHOD: "int8", None: "float"}  # by quantization method


def base_format(base: str, model: Any, *, config: QFTConfig | None = None) -> Any:
    """Return what `from_pretrained` takes as `quantization_config` to store a base so.

    Args:
        base: `"nf4"`: 4 bits a weight with double quantization, by bitsandbytes (Dettmers et al.
            2023, "QLoRA"); `"int8"`: this package's weights; `"float"`.
        model: Of the class that will be loaded, on any device; the meta device will do. Its dtype
            is the one that NF4 weights are multiplied in.
        config: The format with `"int8"`; None: the default.

    Returns:
        A configuration; None with `"float"`.

    Raises:
        ImportError: `"nf4"` was asked for, and bitsandbytes is not installed.
        ValueError: `base` is none of these.
    """
    if base not in BASES:
        raise ValueError(f"base must be {' or '.join(map(repr, BASES))}, got {base!r}.")
    if base == "float":
        return None
    if base == "int8":
        return config or QFTConfig()
    require_bitsandbytes()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=_kept(model),  # also of 4 bits
    )


def form_of(config: Any) -> str:
    """Return how the model of a configuration is stored: one of `BASES`, or another method."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return "float"
    if not isinstance(quantization, dict):  # of a configuration that was read, it is one
        quantization = quantization.to_dict()
    method = quantization.get("quant_method")
    return FORMS.get(getattr(method, "value", method), str(method))


def require_bitsandbytes() -> None:
    """Raise if NF4 weights cannot be made here.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "base='nf4' stores the frozen base with bitsandbytes, which is not installed. "
            "`pip install 'bitsandbytes>=0.50'`; or set base to 'int8', which needs nothing more "
            "and twice the bytes, or to 'float'."
        ) from error


def nf4_weights(model: Any) -> list[Tensor]:
    """Return the weights that `base_format` has bitsandbytes store in 4 bits; others stay float.

    Args:
        model: Of transformers, float, on any device; the meta device will do.
    """
    kept = [*_kept(model), *(model._keep_in_fp32_modules or [])]
    return [
        module.weight
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear)
        and should_convert_module(name, kept)
    ]


def _kept(model: Any) -> list[str]:
    """Linear modules that stay float: those that are in no layer, such as heads and poolers.

    They come after the side network and pass gradients on to it, which the kernels of bitsandbytes
    for CPUs do not; and transformers' own choice would put a new classifier into 4 bits.
    """
    _, layers = layer_stack(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) not in inside
    ]
