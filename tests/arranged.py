"""Tiny models with weights that are not plain matrices, one for each arrangement they come in."""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    GptOssConfig,
    JetMoeConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from qft_hf.quant import QFTWeight
from tests.models import VOCAB_SIZE

WIDTH = 48
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}

CONFIGS: dict[str, Any] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **COMMON, intermediate_size=72, moe_intermediate_size=40, num_experts=6,
        decoder_sparse_step=1, norm_topk_prob=True, mlp_only_layers=[1],
    ),
    "mixtral": lambda: MixtralConfig(**COMMON, intermediate_size=40, num_local_experts=5),
    "deepseek_v3": lambda: DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 2, "head_dim": 8},
        intermediate_size=72, moe_intermediate_size=40,
        n_routed_experts=8, n_shared_experts=1, n_group=2, topk_group=1, first_k_dense_replace=1,
        q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    ),
    "longcat_flash": lambda: LongcatFlashConfig(
        **{k: v for k, v in COMMON.items() if k not in ("num_hidden_layers", "num_experts_per_tok")}
        | {"num_key_value_heads": 2, "head_dim": 8}, num_layers=1, moe_topk=2, ffn_hidden_size=72,
        expert_ffn_hidden_size=40, n_routed_experts=5, zero_expert_num=3, q_lora_rank=24,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16,
    ),
    "llama4_text": lambda: Llama4TextConfig(
        **COMMON | {"num_experts_per_tok": 1}, intermediate_size=40, intermediate_size_mlp=72,
        num_local_experts=5, interleave_moe_layer_step=2,
    ),
    "jetmoe": lambda: JetMoeConfig(
        **COMMON | {"kv_channels": 16, "num_key_value_heads": 2, "num_experts_per_tok": 2},
        intermediate_size=40, num_local_experts=4,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=64, n_embd=WIDTH, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **COMMON, intermediate_size=40, num_local_experts=5, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
}  # fmt: skip


def tiny(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Return a small model in eval mode, equal at every call; all matrices have std 0.1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # zeros would hide a router or bias that is lost
                parameter.normal_(0, 0.1, generator=generator)
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def batch(seed: int = 0, shape: tuple[int, int] = (2, 11)) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def arranged(model: nn.Module) -> dict[str, QFTWeight]:
    """Return the weights that are not plain matrices: experts and transposed weights."""
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, QFTWeight)}
    return {name: weight for name, weight in weights.items() if not weight.arrangement.is_plain}
