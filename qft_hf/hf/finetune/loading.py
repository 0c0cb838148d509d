"""The tokenizer and the model of a run, checked against the data they will see."""

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import shipped
from ..config import QFTConfig
from .arguments import ModelArguments
from .task import Task


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """Load the tokenizer; give it a padding token and, if asked for, another chat template.

    Raises:
        FileNotFoundError: There is no such template file.
        ValueError: It has neither a padding token nor an end-of-text token to pad with.
    """
    tokenizer = AutoTokenizer.from_pretrained(
        arguments.tokenizer_name_or_path or arguments.model_name_or_path,
        revision=arguments.model_revision,
    )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has neither pad_token nor eos_token, "
                "so batches cannot be padded. Set pad_token in its tokenizer_config.json."
            )
        # Padding is masked by position, so learning to end a text is not disturbed.
        tokenizer.pad_token = tokenizer.eos_token
    if arguments.chat_template is not None:
        template = Path(arguments.chat_template)
        if not template.is_file():
            template = shipped.chat_template(arguments.chat_template) or template
        if not template.is_file():
            raise FileNotFoundError(
                f"no chat template {template} (looked from {Path.cwd()}). Set chat_template to a "
                "Jinja file."
            )
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """Load what the model says about itself."""
    return AutoConfig.from_pretrained(
        arguments.model_name_or_path, revision=arguments.model_revision
    )


def load_model(
    arguments: ModelArguments,
    quantization: QFTConfig,
    config: PreTrainedConfig,
    task: Task,
    *,
    max_length: int,
) -> PreTrainedModel:
    """Load a model with INT8 weights: a float checkpoint is quantized tensor by tensor.

    A checkpoint that is INT8 already keeps its format.

    Args:
        arguments: Which model.
        quantization: Format of the weights.
        config: The model's; the task's head is written into it.
        task: Says which class and head.
        max_length: Longest example in tokens.

    Raises:
        ValueError: The model is too short for the examples or has fewer embeddings than tokens.
    """
    _check_fit(config, max_length=max_length, n_tokens=len(task.tokenizer))
    task.configure(config)
    is_quantized = getattr(config, "quantization_config", None) is not None
    model: PreTrainedModel = task.model_class.from_pretrained(
        arguments.model_name_or_path,
        revision=arguments.model_revision,
        config=config,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attn_implementation,
        quantization_config=None if is_quantized else quantization,
    )
    # A classifier looks for the last token that is not padding, also before training begins. In the
    # config that a model is made of, it would keep this token's embedding from being learned.
    model.config.get_text_config().pad_token_id = task.tokenizer.pad_token_id
    return model


def _check_fit(config: PreTrainedConfig, *, max_length: int, n_tokens: int) -> None:
    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"max_length is {max_length}, but the model has {positions} positions. Set max_length "
            f"to {positions} or less."
        )
    if n_tokens > text_config.vocab_size:
        raise ValueError(
            f"the tokenizer knows {n_tokens} tokens and the model has {text_config.vocab_size} "
            "embeddings. Use the model's own tokenizer, or resize the model's embeddings first."
        )
