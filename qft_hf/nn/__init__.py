"""Modules with quantized weights, and the rule that decides which modules are quantized."""

from .attachments import replace_
from .convert import (
    LISTED,
    ConversionPlan,
    Kept,
    conversion_plan,
    dequantize_modules_,
    mark_tables_,
    prepare_modules_,
    product_choices,
    quantize_modules_,
)
from .experts import QFTExperts
from .functional import embedding, linear
from .grouped import Groups, grouped_linear
from .kinds import arrangement_of, own_weights, weight_names, weight_of
from .loss import DeferredLogits, linear_cross_entropy
from .modules import QFTEmbedding, QFTLinear, QuantizedModule, uses_our_forward
from .products import Int8Products
from .state import state_fields, state_names

__all__ = [
    "LISTED",
    "ConversionPlan",
    "DeferredLogits",
    "Groups",
    "Int8Products",
    "Kept",
    "QFTEmbedding",
    "QFTExperts",
    "QFTLinear",
    "QuantizedModule",
    "arrangement_of",
    "conversion_plan",
    "dequantize_modules_",
    "embedding",
    "grouped_linear",
    "linear",
    "linear_cross_entropy",
    "mark_tables_",
    "own_weights",
    "prepare_modules_",
    "product_choices",
    "quantize_modules_",
    "replace_",
    "state_fields",
    "state_names",
    "uses_our_forward",
    "weight_names",
    "weight_of",
]
