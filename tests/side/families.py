"""Tiny random models of the families that side tuning is tested on."""

import copy
from typing import Any

import torch
import transformers as hf

VOCABULARY = 131
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"moe_intermediate_size": 40, "num_experts_per_tok": 2, "num_experts": 4}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}  # fmt: skip
WINDOWS = {"head_dim": 12, "sliding_window": 8}  # shorter than the texts of the tests

DECODERS: dict[str, Any] = {
    "Llama": hf.LlamaConfig(**SIZES),
    "Mistral": hf.MistralConfig(**SIZES, sliding_window=8),
    "Qwen2": hf.Qwen2Config(**SIZES),
    "Qwen3": hf.Qwen3Config(**SIZES, head_dim=16),
    "Gemma": hf.GemmaConfig(**SIZES, head_dim=12),
    "Gemma 2": hf.Gemma2Config(**SIZES, **WINDOWS),
    "Gemma 3": hf.Gemma3TextConfig(**SIZES, **WINDOWS),
    "OPT": hf.OPTConfig(**SIZES, ffn_dim=72, word_embed_proj_dim=48),
    "GPT-NeoX": hf.GPTNeoXConfig(**SIZES),
    "GPT-2": hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=3, n_head=4, n_positions=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "Mixtral": hf.MixtralConfig(**SIZES, num_experts_per_tok=2, num_local_experts=4),
    "Qwen3-MoE": hf.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "Qwen3.5": hf.Qwen3_5TextConfig(
        **SIZES, **LINEAR_ATTENTION, head_dim=12,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "GLM-4.7-Flash": hf.Glm4MoeLiteConfig(
        **SIZES | {"num_key_value_heads": 4}, moe_intermediate_size=40, num_experts_per_tok=2,
        n_routed_experts=4, n_group=2, topk_group=1, q_lora_rank=24, kv_lora_rank=16,
        qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    ),
}  # fmt: skip


def decoder(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a causal language model in eval mode, with the same values at every call."""
    return _built(hf.AutoModelForCausalLM, DECODERS[family], seed, dtype)


def wide_decoder() -> Any:
    """A Llama whose sizes are multiples of the blocks of 4-bit weights of bitsandbytes."""
    config = hf.LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128})
    return _built(hf.AutoModelForCausalLM, config, 0, torch.float32)


def classifier(family: str = "BERT", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Return a classifier of three classes, made in the same way."""
    if family == "BERT":
        sizes = {name: SIZES[name] for name in SIZES if "key_value" not in name}
        config = hf.BertConfig(**sizes, num_labels=3)
    else:
        config = type(DECODERS[family])(**DECODERS[family].to_dict() | {"num_labels": 3})
    return _built(hf.AutoModelForSequenceClassification, config, seed, dtype)


def _built(auto: Any, config: Any, seed: int, dtype: torch.dtype) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto.from_config(copy.deepcopy(config), dtype=dtype)
    # Initial values of 0.02 make tiny models almost linear, which would hide many errors.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def texts(rows: int = 3, tokens: int = 14, *, seed: int = 1) -> torch.Tensor:
    """Return token ids `[rows, tokens]`, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
