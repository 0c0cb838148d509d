"""`QFTConfig`: the storage format as `from_pretrained` takes it and `config.json` records it."""

import copy
from dataclasses import fields
from typing import Any

from torch import nn
from transformers.quantizers import auto
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..config import QuantizationSpec, check_type, names_module

QUANT_METHOD = "qft"


def quantization_method(config: Any) -> Any:
    """Return the quantization method that a model's configuration names; None if it names none."""
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict):  # of a configuration that was read from a file
        # Files that early versions of bitsandbytes wrote do not name it; transformers loads them.
        is_early = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
        return "bitsandbytes" if is_early else quantization.get("quant_method")
    method = getattr(quantization, "quant_method", None)
    return getattr(method, "value", method)


def refuse_other_method(config: Any) -> None:
    """Raise ValueError if a model is quantized, and not with this package.

    Args:
        config: The model's configuration or its quantizer, which has a `quantization_config` too.
    """
    method = quantization_method(config)
    if method not in (None, QUANT_METHOD):
        raise ValueError(
            f"The model is quantized with {method}. QFT starts from float weights: load the model "
            "without that quantization, or train a side network beside it (attach_side_network, "
            "or method qst of `qft-hf finetune`)."
        )


def passing_to_parts(
    read: Any, cls: type[Any], *args: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make the configuration of a part, such as CLIP's text model, say that its weights are INT8.

    It is read from the `config.json` of the whole model, which says so outside of the part.
    """
    values, others = read(cls, *args, **kwargs)
    part, quantization = values.get(cls.base_config_key), values.get("quantization_config")
    if isinstance(part, dict) and isinstance(quantization, dict):
        if quantization.get("quant_method") == QUANT_METHOD:
            part["quantization_config"] = quantization
    return values, others


@register_quantization_config(QUANT_METHOD)
class QFTConfig(QuantizationSpec, QuantizationConfigMixin):
    """INT8 weights for `from_pretrained(quantization_config=...)` and `quantize_model_`.

    Arguments and ranges are those of `QuantizationSpec`.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is out of its range.
    """

    quant_method: Any
    _user_set_products: bool = False  # whether the user passed `int8_products`

    def __post_init__(self) -> None:
        """Check types before ranges: values also come from JSON, YAML and command lines."""
        for name, types, wanted in (
            ("group_size", (int, type(None)), "an integer or None"),
            ("outlier_fraction", (int, float), "a number"),
            ("modules_to_not_convert", (list, type(None)), "a list of module names or None"),
            ("matmul", (str,), "a string"),
            ("int8_products", (dict, type(None)), "a dictionary of module names or None"),
            ("seed", (int,), "an integer"),
            ("strict", (bool,), "True or False"),
        ):
            check_type(name, getattr(self, name), types, wanted)
        if not all(isinstance(one, str) and one for one in self.modules_to_not_convert or []):
            raise TypeError(
                "modules_to_not_convert must be a list of module names or None, got "
                f"{self.modules_to_not_convert!r}."
            )
        for name, products in (self.int8_products or {}).items():
            if not isinstance(products, list) or not all(isinstance(p, str) for p in products):
                raise TypeError(
                    f"int8_products must give each module a list of products, got {products!r} for "
                    f"{name!r}."
                )
        super().__post_init__()
        if self.int8_products is not None and self.matmul != "int8":
            raise ValueError(
                "int8_products chooses among INT8 products, and there are none with "
                f"matmul={self.matmul!r}. Set matmul='int8', or leave int8_products out."
            )
        self.quant_method = QUANT_METHOD

    @classmethod
    def from_dict(
        cls,
        config_dict: dict[str, Any],
        return_unused_kwargs: bool = False,  # noqa: FBT001, FBT002 transformers' signature
        **kwargs: Any,
    ) -> Any:
        """Return the configuration that a dictionary, such as `to_dict` returns, describes.

        Args:
            config_dict: Values by name; names left out keep their defaults.
            return_unused_kwargs: Whether to also return the ignored `kwargs`.
            kwargs: Values that override those of the dictionary; other names are ignored.

        Raises:
            ValueError: A name is unknown, or the dictionary is for another quantization method.
        """
        values = dict(config_dict)
        method = values.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(
                f"QFTConfig is for quant_method={QUANT_METHOD!r}, got {method!r}. Read the "
                "dictionary with the configuration class of that method."
            )
        names = [field.name for field in fields(cls)]
        unknown = sorted(values.keys() - names)
        if unknown:
            raise ValueError(
                f"QFTConfig has no {', '.join(unknown)}; its names are {', '.join(names)}. If the "
                "name is from a checkpoint, a newer qft_hf wrote that: install that version."
            )
        values |= {name: kwargs.pop(name) for name in names if name in kwargs}
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Return the values that `config.json` records."""
        names = ["quant_method", *(field.name for field in fields(self) if field.compare)]
        return {name: copy.deepcopy(getattr(self, name)) for name in names}

    def forget_absent(self, model: nn.Module) -> list[str]:
        """Drop names of the checkpoint that match no module of `model`, and return them.

        A classifier or a bare encoder has no `lm_head`, which its checkpoint may name. A module of
        a bare encoder may have a prefix in the checkpoint, and vice versa: such a name is replaced.
        Names that the user passed are kept and raise an error later.
        """
        names = [name for name, _ in model.named_modules()]
        prefix = f"{getattr(model, 'base_model_prefix', '')}."

        def own(entry: str) -> str | None:
            for form in (entry, entry.removeprefix(prefix), prefix + entry):
                if form == "*" or any(names_module(form, name) for name in names):
                    return form
            return None

        found = {name: own(name) for name in self.modules_to_not_convert or []}
        absent = [name for name, form in found.items() if form is None]
        if list(found.values()) != list(found):
            self.modules_to_not_convert = [form for form in found.values() if form] or None
        if self.int8_products is not None and not self._user_set_products:
            forms = {name: own(name) for name in self.int8_products}
            absent += [name for name, form in forms.items() if form is None]
            chosen = {form: self.int8_products[name] for name, form in forms.items() if form}
            self.int8_products = chosen or None
        return absent

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field, or a default; transformers reads a passed `config` in this way."""
        return getattr(self, name, default)

    @property
    def storage_format(self) -> dict[str, Any]:
        """The values that decide which tensors a checkpoint holds.

        Assigning another format raises an error. transformers assigns to a checkpoint's
        configuration the format of the configuration that the user passed to `from_pretrained`.
        """
        return {
            "group_size": self.group_size,
            "outlier_fraction": self.outlier_fraction,
            "modules_to_not_convert": sorted(self.modules_to_not_convert or []),
        }

    @storage_format.setter
    def storage_format(self, wanted: dict[str, Any]) -> None:
        own = self.storage_format
        different = [name for name in own if own[name] != wanted[name]]
        if different:
            raise ValueError(
                "The checkpoint is already quantized with "
                f"{', '.join(f'{name}={own[name]!r}' for name in different)}, and "
                f"{', '.join(f'{name}={wanted[name]!r}' for name in different)} was asked for. "
                "Leave quantization_config out to read it as it is; for another format load it, "
                "call dequantize_model_, save, and quantize the float checkpoint."
            )
        self._user_set_products = True  # assigned next: see `get_loading_attributes`

    def get_loading_attributes(self) -> dict[str, Any]:
        """Return the attributes of a user's configuration that apply to an INT8 checkpoint."""
        # The format comes first, so that nothing else is assigned if it is another one.
        return {
            "storage_format": self.storage_format,
            "matmul": self.matmul,
            "int8_products": self.int8_products,
            "seed": self.seed,
            "strict": self.strict,
        }


# transformers reads loading attributes of these classes only. For others it drops the user's
# configuration with a warning, whatever its values are.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (  # type: ignore[assignment]
    *auto.LOADING_ATTRIBUTES_CONFIG_TYPES,
    QFTConfig,
)
