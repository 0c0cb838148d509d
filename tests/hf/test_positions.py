"""The maximum sequence length is what a model accepts, whatever its configuration calls it."""

import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    BloomConfig,
    Gemma3Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedConfig,
    XLNetConfig,
)

from qft_hf.hf.positions import n_positions

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 20,
}  # fmt: skip
TABLES = {
    "GPT2": ({"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}, 20),
    "Mpt": ({"vocab_size": 40, "d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 20}, 20),
    "OPT": (SIZES | {"ffn_dim": 16, "word_embed_proj_dim": 16}, 20),
    "Bert": (SIZES, 20),
    "Roberta": (SIZES, 18),  # positions are counted from behind the padding token's number, 1
    "MPNet": (SIZES | {"pad_token_id": 3}, 18),
}


@pytest.mark.parametrize(
    ("family", "options", "n"), [(k, *v) for k, v in TABLES.items()], ids=TABLES
)
def test_a_model_takes_as_many_tokens_and_not_one_more(family, options, n):
    """RoBERTa was once allowed two tokens more and failed in its first batch of that length."""
    config = getattr(transformers, f"{family}Config")(**options)
    assert n_positions(config) == n

    model = AutoModel.from_config(config)
    model(input_ids=torch.full((1, n), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, n + 1), 5))


SCALED = {
    "what it says": ({"rope_type": "default"}, 2048, 2048),
    "the factor was never told": ({"rope_type": "linear", "factor": 2.0}, 2048, 4096),
    "of the length before": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, 2048, 4096,
    ),
    "further than the factor": (
        {
            "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        },
        16_384,
        16_384,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("scaling", "said", "n"), SCALED.values(), ids=SCALED)
def test_scaled_rotary_positions_reach_further(scaling, said, n):
    assert n_positions(LlamaConfig(max_position_embeddings=said, rope_parameters=scaling)) == n


def test_factors_of_single_kinds_of_layers_are_in_what_the_config_says():
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    sliding = {"rope_type": "default", "rope_theta": 1e4}
    rope = {"full_attention": full, "sliding_attention": sliding}
    config = Gemma3Config(text_config={"rope_parameters": rope, "max_position_embeddings": 4096})
    assert n_positions(config) == 4096


@pytest.mark.parametrize("config", [BloomConfig(), MambaConfig(), XLNetConfig()], ids=type)
def test_a_family_without_a_limit_has_none(config: PreTrainedConfig):
    assert n_positions(config) is None
