"""Tiny models with awkward sizes: no dimension is a multiple of a group, a tile or another one."""

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

VOCAB_SIZE = 131


def tiny_llama(
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> LlamaForCausalLM:
    """A Llama of two layers in eval mode, the same values at every call.

    Args:
        tied: Whether `lm_head` shares the embedding table.
        dtype: Dtype of all parameters.
        seed: Seed of the initial values; the global random state is left as it was.
        overrides: Fields of `LlamaConfig`.
    """
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 44,
            "intermediate_size": 75,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **overrides,
        }
    )
    return _build(LlamaForCausalLM, config, dtype, seed)


def tiny_bert(
    *,
    num_labels: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **overrides: Any,
) -> BertForSequenceClassification:
    """A BERT classifier of two layers in eval mode, with biases; otherwise as `tiny_llama`."""
    config = BertConfig(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 42,
            "intermediate_size": 77,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "max_position_embeddings": 50,
            "num_labels": num_labels,
            **overrides,
        }
    )
    return _build(BertForSequenceClassification, config, dtype, seed)


def _build(model_class: Any, config: Any, dtype: torch.dtype, seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero hides a bias that is lost on the way
                parameter.copy_(torch.linspace(-0.5, 0.5, parameter.numel()))
            # Not model.to(dtype): it would cast rotary frequencies, which from_pretrained does not.
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()
