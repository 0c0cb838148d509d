"""The shapes of models and matrices that all commands measure."""

import json
from typing import Any

from transformers import LlamaConfig

from .report import ROOT

MODELS: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
    "tiny": {
        "vocab_size": 500,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
    },
}
MODELS |= {
    path.parent.name: json.loads(path.read_text())
    for path in sorted(ROOT.glob("qft_hf/configs/architectures/*/config.json"))
}

# Shapes of weights and number of rows of activations, by device type.
MATRICES = {
    "cuda": (["4096x4096", "11008x4096", "4096x11008"], 4096),
    "cpu": (["1536x576"], 512),
}


def model_config(name: str, layers: int | None = None) -> LlamaConfig:
    """Return the configuration of a model, cut to `layers` if given."""
    config = LlamaConfig(**{"tie_word_embeddings": False} | MODELS[name])
    if layers:
        config.num_hidden_layers = layers
    return config
