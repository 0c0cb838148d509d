"""The tokenizer and the model of a run, checked against the data they will see."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .. import shipped
from ..config import QFTConfig
from .arguments import ModelArguments


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


def load_model(
    arguments: ModelArguments,
    quantization: QFTConfig,
    *,
    max_length: int,
    n_tokens: int,
    label_names: Sequence[str],
) -> PreTrainedModel:
    """Load a model with INT8 weights: a float checkpoint is quantized tensor by tensor.

    A checkpoint that is INT8 already keeps its format.

    Args:
        arguments: Which model.
        quantization: Format of the weights.
        max_length: Longest example in tokens.
        n_tokens: Size of the tokenizer's vocabulary.
        label_names: Classes of a classifier; none for a language model.

    Raises:
        ValueError: The model is too short for the examples or has fewer embeddings than tokens.
    """
    config = AutoConfig.from_pretrained(
        arguments.model_name_or_path, revision=arguments.model_revision
    )
    _check_fit(config, max_length=max_length, n_tokens=n_tokens)
    model_class: Any = AutoModelForCausalLM
    if label_names:
        model_class = AutoModelForSequenceClassification
        config.num_labels = len(label_names)
        config.id2label = dict(enumerate(label_names))
        config.label2id = {name: index for index, name in enumerate(label_names)}
    is_quantized = getattr(config, "quantization_config", None) is not None
    model: PreTrainedModel = model_class.from_pretrained(
        arguments.model_name_or_path,
        revision=arguments.model_revision,
        config=config,
        dtype=getattr(torch, arguments.dtype),
        attn_implementation=arguments.attn_implementation,
        quantization_config=None if is_quantized else quantization,
    )
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
