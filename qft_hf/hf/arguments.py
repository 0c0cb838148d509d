"""`QFTTrainingArguments`: the Trainer's arguments and the options of INT8 training."""

import json
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from ..config import QuantizationSpec
from .config import QFTConfig
from .liger import settle_loss_
from .optimizers import (
    DEFAULT_OPTIMIZER,
    FIELDS,
    OPTIMIZERS,
    describe,
    given_options,
    named_optimizer,
    names,
    optimizer_name,
)
from .unsupported import refuse_arguments, refuse_deepspeed

_DEFAULTS = QuantizationSpec()
# Options of the storage format.
FORMAT = ("group_size", "outlier_fraction", "modules_to_not_convert", "matmul", "int8_products")
# Fields that are JSON on a command line, each with an example.
_DICTIONARIES = {
    "int8_products": '{"lm_head": ["forward"]}',
    "liger_kernel_config": '{"rope": false}',
}


def setting(help: str, *, default: Any = None) -> Any:
    """Return the field of a setting with its help text; it must be set if `default` is MISSING."""
    return field(default=default, metadata={"help": help})


@dataclass
class QFTTrainingArguments(TrainingArguments):
    """`TrainingArguments` with the options of INT8 training as fields.

    They are also the keys of a config file and the flags of a command line. With an unset field
    (None), the optimizer uses its own default, and a model that is INT8 already keeps the format
    that it was quantized with. A field that is set takes effect, or raises an error if it has none:
    an option of another optimizer, a format other than the model's, or clipping without release.

    In the stock arguments, `optim_args="nonfinite=skip,beta2=0.98"` sets the same options of the
    optimizer, with `seed` for `quantization_seed`, and they are checked in the same way; both may
    be used together as long as they agree. `adam_beta1`, `adam_beta2` and `adam_epsilon` are not
    read, and raise an error unless they have Adam's defaults.

    With `use_liger_kernel=True`, Liger's kernels work with INT8 weights, except its fused loss:
    `chunked_loss=True` replaces that, unless `liger_kernel_config` or `chunked_loss` is set.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is out of its range, or has no effect together with the others.
    """

    optim: str = setting(
        f"The optimizer: {' or '.join(OPTIMIZERS)} trains INT8 weights.", default=DEFAULT_OPTIMIZER
    )
    learning_rate: float = setting(  # `__post_init__` sets it if it is None
        "The highest rate of the schedule. Unset: "
        + ", ".join(f"{o.learning_rate or 'an error'} for {n}" for n, o in OPTIMIZERS.items())
        + "."
    )
    gradient: str | None = setting(describe("gradient"))
    clipping: str | None = setting(describe("clipping"))
    accumulation: str | None = setting(describe("accumulation"))
    nonfinite: str | None = setting(describe("nonfinite"))
    momentum_bits: int | None = setting(describe("momentum_bits"))
    beta1: float | None = setting(describe("beta1"))
    beta2: float | None = setting(describe("beta2"))
    eps: float | None = setting(describe("eps"))
    stochastic_rounding: bool | None = setting(describe("stochastic_rounding"))
    quantization_seed: int | None = setting(describe("seed"))
    group_size: int | None = setting(
        "Inputs that share an FP32 weight scale; unset for one scale per row."
    )
    outlier_fraction: float | None = setting(
        "Share of each row kept in FP32: its largest magnitudes. Unset: "
        f"{_DEFAULTS.outlier_fraction}."
    )
    modules_to_not_convert: list[str] | None = setting(
        "Modules that stay float, by full name or component."
    )
    matmul: str | None = setting(
        f"How products with a weight are computed: dequantize, or int8. Unset: {_DEFAULTS.matmul}."
    )
    int8_products: dict[str, Any] | str | None = setting(
        "With matmul int8: INT8 products by module, as in "
        """'{"lm_head": ["forward"], "down_proj": []}'. Unset: all but those of the head."""
    )
    chunked_loss: bool = setting(  # `__post_init__` sets it if it is None
        "Compute the next-token loss in chunks of the vocabulary, so that logits never "
        "exist all at once; costs one more product with the output head. Unset: only in place "
        "of the fused loss of use_liger_kernel."
    )
    liger_kernel_config: dict[str, bool] | str | None = setting(  # type: ignore[assignment]  # text
        "With use_liger_kernel: kernels that are switched off or on, as in "
        """'{"rope": false, "cross_entropy": true}'. All but fused_linear_cross_entropy, """
        "which chunked_loss replaces, and swiglu of experts work with INT8 weights."
    )
    # A parser of flags takes the first type if the second is None, and of lists only a factory.
    report_to: list[str] | None | str = field(  # noqa: RUF036
        default_factory=lambda: ["none"],
        metadata={"help": "Integrations that receive the logs, such as wandb; or all, or none."},
    )
    cuda_graph: bool = setting(
        "Capture forward and backward, clipping and the update as CUDA graphs, and "
        "replay them at every step, for batches of one shape: with few tokens the host takes "
        "longer than the GPU. Experimental; QFTTrainer only.",
        default=False,
    )

    @property
    def optimizer_fields(self) -> dict[str, Any]:
        """The optimizer's options that are set here, under the names that optimizers use."""
        values = {option: getattr(self, name) for option, name in FIELDS.items()}
        return {option: value for option, value in values.items() if value is not None}

    @property
    def format_fields(self) -> dict[str, Any]:
        """The options of the storage format that are set here, by name."""
        values = {name: getattr(self, name) for name in FORMAT}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def quantization_config(self) -> QFTConfig:
        """The format that a float model is quantized to."""
        seed = self.quantization_seed
        if named_optimizer(self) is not None:
            seed = given_options(self).get("seed")  # optim_args may set it, too
        return QFTConfig(**self.format_fields, seed=_DEFAULTS.seed if seed is None else seed)

    def __post_init__(self) -> Any:
        """Check options and format immediately, before a model is loaded."""
        for name, example in _DICTIONARIES.items():
            if isinstance(value := getattr(self, name), str):  # of a command line or a config file
                try:
                    setattr(self, name, json.loads(value))
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{name} must be a JSON dictionary such as '{example}', got {value!r}."
                    ) from error
        self._set_learning_rate()
        if named_optimizer(self) is not None:
            refuse_deepspeed(self)
        super().__post_init__()
        if named_optimizer(self) is None:
            self._refuse_without_effect()
        else:
            if self.use_liger_kernel:
                settle_loss_(self)
            refuse_arguments(self)
        self.chunked_loss = bool(self.chunked_loss)
        _ = self.quantization_config

    def _set_learning_rate(self) -> None:
        """Use the optimizer's own rate if none is set."""
        if self.learning_rate is not None:
            return
        optimizer = named_optimizer(self)
        if optimizer is None:
            self.learning_rate = TrainingArguments.learning_rate
        elif optimizer.learning_rate is None:
            raise ValueError(
                f"optim={optimizer_name(self)!r} has no default rate. Set learning_rate."
            )
        else:
            self.learning_rate = optimizer.learning_rate
        self.default_rate = self.learning_rate  # tells a run that resumes that none was given

    def _refuse_without_effect(self) -> None:
        options = [FIELDS[option] for option in self.optimizer_fields]
        given = [
            *options,
            *self.format_fields,
            *(name for name in ("chunked_loss", "cuda_graph") if getattr(self, name)),
        ]
        if given:
            raise ValueError(
                f"optim={optimizer_name(self)!r} leaves {', '.join(given)} without an effect. "
                f"Leave that out, or set optim={names()}."
            )
