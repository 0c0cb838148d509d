"""`QFTTrainingArguments`: the Trainer's arguments with the INT8 format beside them."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..config import QuantizationSpec
from .config import QFTConfig
from .support import OPTIMIZER_NAME

_DEFAULTS = QuantizationSpec()


@dataclass
class QFTTrainingArguments(TrainingArguments):
    """`TrainingArguments` whose optimizer is `qft_lion`; the format fields apply to float models.

    A model that is INT8 already keeps the format it was quantized with.
    """

    optim: str = field(
        default=OPTIMIZER_NAME, metadata={"help": "The optimizer: qft_lion, INT8 Lion."}
    )
    group_size: int | None = field(
        default=_DEFAULTS.group_size,
        metadata={"help": "Inputs that share an FP32 weight scale; unset for one scale per row."},
    )
    outlier_fraction: float = field(
        default=_DEFAULTS.outlier_fraction,
        metadata={"help": "Share of each row kept in FP32: its largest magnitudes."},
    )
    modules_to_not_convert: list[str] | None = field(
        default=None, metadata={"help": "Modules that stay float, by full name or component."}
    )
    matmul: str = field(
        default=_DEFAULTS.matmul,
        metadata={"help": "How products with a weight are computed: dequantize, or int8."},
    )
    int8_products: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "With matmul int8: INT8 products by module, as in "
            """'{"lm_head": ["forward"], "down_proj": []}'. Unset: all, and none of the head."""
        },
    )
    quantization_seed: int = field(
        default=_DEFAULTS.seed,
        metadata={"help": "Key of the random numbers that round the updates."},
    )
    nonfinite: str = field(
        default="raise",
        metadata={"help": "On a NaN or infinite gradient: raise, or skip the step and count it."},
    )
    chunked_loss: bool = field(
        default=False,
        metadata={
            "help": "Compute the next-token loss run by run of the vocabulary, so that logits "
            "never exist whole; costs one more product with the output head."
        },
    )

    @property
    def quantization_config(self) -> QFTConfig:
        """The format a float model gets."""
        return QFTConfig(
            group_size=self.group_size,
            outlier_fraction=self.outlier_fraction,
            modules_to_not_convert=self.modules_to_not_convert,
            matmul=self.matmul,
            int8_products=self.int8_products,  # type: ignore[arg-type]  # checked there
            seed=self.quantization_seed,
        )

    def __post_init__(self) -> Any:
        """Check the format at once, before a model is loaded."""
        if isinstance(self.int8_products, str):  # of a command line or a config file
            try:
                self.int8_products = json.loads(self.int8_products)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"int8_products must be a JSON dictionary such as "
                    f"""'{{"lm_head": ["forward"]}}', got {self.int8_products!r}."""
                ) from error
        super().__post_init__()
        _ = self.quantization_config
