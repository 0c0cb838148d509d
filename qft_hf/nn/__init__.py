"""Modules with quantized weights, and the rule that says which modules get them."""

from .convert import (
    ConversionPlan,
    conversion_plan,
    dequantize_modules_,
    mark_tables_,
    prepare_modules_,
    product_choices,
    quantize_modules_,
)
from .functional import embedding, linear
from .loss import DeferredLogits, linear_cross_entropy
from .modules import QFTEmbedding, QFTLinear, is_quantized_module
from .products import Int8Products
from .state import STATE_NAMES, state_fields

__all__ = [
    "STATE_NAMES",
    "ConversionPlan",
    "DeferredLogits",
    "Int8Products",
    "QFTEmbedding",
    "QFTLinear",
    "conversion_plan",
    "dequantize_modules_",
    "embedding",
    "is_quantized_module",
    "linear",
    "linear_cross_entropy",
    "mark_tables_",
    "prepare_modules_",
    "product_choices",
    "quantize_modules_",
    "state_fields",
]
