"""Which families of models train in INT8, and how much of each: the tables of docs/families.md.

    python scripts/studies/families.py

Tiny models of each family are quantized, trained, saved, loaded and exported; of real ones the
parameters are counted, from their configuration, without a weight. A test compares both with the
page.
"""

import copy
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import chosen, command_line
from common.report import table

from qft_hf import QFTConfig, QFTLion, dequantize_model_, quantize_model_
from qft_hf.nn import conversion_plan

STEPS, LR = 6, 2e-3

VOCABULARY = 131
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_DROPOUT = {"attention_dropout": 0.0, "dropout": 0.0, "activation_dropout": 0.0}
EXPERTS = {"moe_intermediate_size": 40, "num_experts_per_tok": 2}
SEQ2SEQ = {
    **NO_DROPOUT, "d_model": 48, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 72,
    "decoder_ffn_dim": 72, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2,
}  # fmt: skip
ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

Causal, Masked, Seq2Seq = (
    hf.AutoModelForCausalLM,
    hf.AutoModelForMaskedLM,
    hf.AutoModelForSeq2SeqLM,
)

# Name: how it is loaded, its configuration, and what that takes beside SIZES.
TINY: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "Llama": (Causal, hf.LlamaConfig, {}),
    "Mistral": (Causal, hf.MistralConfig, {}),
    "Qwen2": (Causal, hf.Qwen2Config, {}),
    "Qwen3": (Causal, hf.Qwen3Config, {"head_dim": 16}),
    "SmolLM3": (Causal, hf.SmolLM3Config, {}),
    "Phi-3": (Causal, hf.Phi3Config, {}),
    "OLMo 2": (Causal, hf.Olmo2Config, {}),
    "Granite": (Causal, hf.GraniteConfig, {}),
    "Cohere 2": (Causal, hf.Cohere2Config, {"head_dim": 12}),
    "GLM-4": (Causal, hf.Glm4Config, {"head_dim": 12}),
    "Gemma": (Causal, hf.GemmaConfig, {"head_dim": 12}),
    "Gemma 2": (Causal, hf.Gemma2Config, {"head_dim": 12}),
    "Gemma 3": (Causal, hf.Gemma3TextConfig, {"head_dim": 12}),
    "Falcon": (Causal, hf.FalconConfig, {"new_decoder_architecture": False, "num_kv_heads": 4}),
    "GPT-2": (Causal, hf.GPT2Config, {
        "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }),
    "GPT-NeoX": (Causal, hf.GPTNeoXConfig, {}),
    "OPT": (Causal, hf.OPTConfig, {
        **NO_DROPOUT, "ffn_dim": 72, "word_embed_proj_dim": 48,
    }),
    "BLOOM": (Causal, hf.BloomConfig, {"n_layer": 2, "n_head": 4}),
    "Mamba": (Causal, hf.MambaConfig, {"state_size": 8}),
    "Mixtral": (Causal, hf.MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3-MoE": (Causal, hf.Qwen3MoeConfig, {**EXPERTS, "num_experts": 4, "head_dim": 12}),
    "DeepSeek-V3": (Causal, hf.DeepseekV3Config, {
        **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1,
        "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 24,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    }),
    "gpt-oss": (Causal, hf.GptOssConfig, {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12,
    }),
    "Llama 4": (Causal, hf.Llama4TextConfig, {
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 72,
        "head_dim": 12,
    }),
    "BERT": (Masked, hf.BertConfig, ENCODER),
    "RoBERTa": (Masked, hf.RobertaConfig, ENCODER),
    "DeBERTa-v2": (Masked, hf.DebertaV2Config, {**ENCODER, "relative_attention": True}),
    "ModernBERT": (Masked, hf.ModernBertConfig, {}),
    "BART": (Seq2Seq, hf.BartConfig, SEQ2SEQ),
    "T5": (Seq2Seq, hf.T5Config, {
        "d_model": 48, "d_kv": 12, "d_ff": 72, "num_layers": 1, "num_heads": 4,
        "dropout_rate": 0.0, "decoder_start_token_id": 0,
    }),
}  # fmt: skip

# Shapes of models that people train, from their configurations; other numbers do not matter here.
REAL: dict[str, tuple[Any, Any]] = {
    "Falcon-7B": (Causal, hf.FalconConfig(
        vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71,
        multi_query=True, bias=False, parallel_attn=True,
    )),
    "Gemma-3-1B": (Causal, hf.Gemma3TextConfig(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256,
    )),
    "GPT-2": (Causal, hf.GPT2Config()),
    "Qwen3-30B-A3B": (Causal, hf.Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, decoder_sparse_step=1, tie_word_embeddings=False,
    )),
    "Mixtral-8x7B": (Causal, hf.MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_local_experts=8,
    )),
    "gpt-oss-20b": (Causal, hf.GptOssConfig(
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, num_local_experts=32,
    )),
    "DeepSeek-V3": (Causal, hf.DeepseekV3Config(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048,
        num_hidden_layers=61, num_attention_heads=128, num_key_value_heads=128,
        n_routed_experts=256, n_shared_experts=1, first_k_dense_replace=3, q_lora_rank=1536,
        kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
    )),
    "Llama-4-Scout": (Causal, hf.Llama4TextConfig(
        vocab_size=202048, hidden_size=5120, intermediate_size=8192, intermediate_size_mlp=16384,
        num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, head_dim=128,
        num_local_experts=16, num_experts_per_tok=1, interleave_moe_layer_step=1,
    )),
}  # fmt: skip


def tiny(name: str) -> Any:
    """A model of the family, in training mode; the same values at every call."""
    auto, config, beside = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config(**SIZES | beside), dtype=torch.float32).train()


def ids() -> Tensor:
    """Two sequences of 24 tokens, as many as INT8 products want."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, 24), generator=generator)


@dataclass(frozen=True)
class Family:
    """What a family can do, a column each."""

    learns: bool
    release: bool
    int8_products: bool
    reload: bool
    export: bool
    generate: bool | None  # None: it makes no text


def measured(name: str) -> Family:
    """Try all of it on a tiny model."""
    stack, release = (trained(tiny(name), gradient=gradient) for gradient in ("stack", "release"))
    products = trained(tiny(name), matmul="int8")
    model: Any = stack.model.eval()
    generated = None
    if TINY[name][0] is not Masked:
        text = model.generate(input_ids=ids()[:, :5], max_new_tokens=3, do_sample=False)
        generated = len(text) == 2 and text.shape[1] > 1
    return Family(
        learns=stack.losses[-1] < stack.losses[0],
        release=same(stack.model, release.model),
        int8_products=products.losses[-1] < products.losses[0],
        reload=same(reloaded(name, model), model),
        export=exported(name, copy.deepcopy(model)),
        generate=generated,
    )


@dataclass
class Run:
    """A trained model and its losses."""

    model: nn.Module
    losses: list[float]


def trained(model: Any, *, gradient: str = "stack", matmul: str = "dequantize") -> Run:
    """The model in INT8 after some steps on one batch."""
    quantize_model_(model, QFTConfig(matmul=matmul))
    optimizer = QFTLion(model.parameters(), lr=LR, gradient=gradient)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.eval()
    return Run(model, losses)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same bits."""
    state = other.state_dict()
    own = one.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[n], state[n]) for n in state)


def reloaded(name: str, model: Any) -> nn.Module:
    """What a checkpoint of the model is read as."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return TINY[name][0].from_pretrained(folder)


@torch.no_grad()
def exported(name: str, model: Any) -> bool:
    """Whether the plain checkpoint of the model computes what the model does."""
    dequantize_model_(model, torch.float32)
    plain = reloaded(name, model).eval()
    logits = [m(input_ids=ids(), labels=ids()).logits for m in (model, plain)]
    return torch.equal(*logits) and not hasattr(plain, "hf_quantizer")


def float_share(model: nn.Module) -> tuple[float, dict[str, float]]:
    """Share of the parameters that stays float, in percent, and of it by reason."""
    plan = conversion_plan(model, None)
    total = sum(p.numel() for p in model.parameters())
    reasons: dict[str, float] = {}
    for kept in plan.kept:
        share = 100 * kept.parameter.numel() / total
        reasons[kept.reason] = reasons.get(kept.reason, 0.0) + share
    return sum(reasons.values()), reasons


def real(name: str) -> nn.Module:
    """A model of real size, without storage."""
    auto, config = REAL[name]
    with torch.device("meta"):
        return auto.from_config(config)


def row(name: str, family: Family) -> list[str]:
    """A line of the table of families."""
    cells = [getattr(family, column) for column in Family.__dataclass_fields__]
    return [name, *({True: "yes", False: "no", None: ""}[cell] for cell in cells)]


def real_row(name: str) -> list[str]:
    """A line of the table of real sizes."""
    model = real(name)
    share, reasons = float_share(model)
    largest = max(reasons, key=lambda reason: reasons[reason])
    parameters = sum(p.numel() for p in model.parameters()) / 1e9
    return [name, f"{parameters:.2f}", f"{share:.3f} %", largest]


HEAD = ["family", "learns", "release = stack", "INT8 products", "reload", "export", "generate"]
REAL_HEAD = ["model", "billion parameters", "float", "most of it"]


def main() -> None:
    """Write both tables."""
    options = command_line(__doc__, only=None).parse_args()
    families = {name: measured(name) for name in chosen(TINY, options.only)}
    text = table(HEAD, [row(name, family) for name, family in families.items()])
    text += "\n\n" + table(REAL_HEAD, [real_row(name) for name in chosen(REAL, options.only)])
    report.write(options, {name: vars(family) for name, family in families.items()}, text)
    report.finish(options, text)


if __name__ == "__main__":
    main()
