"""Make the tables of docs/families.md: which model families train in INT8, and how much of each.

    python scripts/studies/families.py

A tiny model of each family is quantized, trained, saved, loaded and exported. The parameters of
real models are counted from their configurations, without weights. A test compares the tables with
the page.
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
from common.tiny_models import OF_IMAGES_AND_SOUND, OF_TEXT, TINY, Causal, Tiny

from qft_hf import QFTConfig, QFTLion, dequantize_model_, quantize_model_
from qft_hf.hf.estimate import without_storage
from qft_hf.nn import conversion_plan

STEPS, LR = 6, 2e-3

# Shapes of commonly trained models, from their configurations; other settings do not matter here.
REAL: dict[str, tuple[Any, Any]] = {
    "Falcon-7B": (Causal, hf.FalconConfig(
        vocab_size=65024, hidden_size=4544, num_hidden_layers=32, num_attention_heads=71,
        multi_query=True, bias=False, parallel_attn=True,
    )),
    "Gemma-3-1B": (Causal, hf.Gemma3TextConfig(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256,
    )),
    "Gemma-3n-E4B": (Causal, hf.Gemma3nTextConfig()),
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
    "ViT-L/16": (hf.AutoModelForImageClassification, hf.ViTConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
    )),
    "Qwen2.5-VL-7B": (hf.AutoModelForImageTextToText, hf.Qwen2_5_VLConfig(
        vision_config={
            "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "out_hidden_size": 3584, "patch_size": 14,
        },
        text_config={
            "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
            "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        },
        tie_word_embeddings=False,
    )),
    "Whisper-large-v3": (hf.AutoModelForSpeechSeq2Seq, hf.WhisperConfig(
        vocab_size=51866, num_mel_bins=128, d_model=1280, encoder_layers=32, decoder_layers=32,
        encoder_attention_heads=20, decoder_attention_heads=20, encoder_ffn_dim=5120,
        decoder_ffn_dim=5120,
    )),
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Whether each feature works for a family; one table column per field."""

    learns: bool
    release: bool
    int8_products: bool
    reload: bool
    export: bool
    generate: bool | None  # None: it generates no text


def measured(name: str) -> Family:
    """Try every feature on a tiny model of a family."""
    family = TINY[name]
    stack, release = (trained(family, gradient=gradient) for gradient in ("stack", "release"))
    products = trained(family, matmul="int8")
    model: Any = stack.model.eval()
    generated = None
    if family.prompt is not None:
        text = model.generate(**family.prompt(), max_new_tokens=3, do_sample=False)
        generated = len(text) == 2 and text.shape[1] > 1
    return Family(
        learns=stack.losses[-1] < stack.losses[0],
        release=same(stack.model, release.model),
        int8_products=products.losses[-1] < products.losses[0],
        reload=same(reloaded(family, model), model),
        export=exported(family, copy.deepcopy(model)),
        generate=generated,
    )


@dataclass
class Run:
    """A trained model and its losses."""

    model: nn.Module
    losses: list[float]


def trained(family: Tiny, *, gradient: str = "stack", matmul: str = "dequantize") -> Run:
    """Return the INT8 model after `STEPS` steps on one batch, with its losses."""
    model = quantize_model_(family.model(), QFTConfig(matmul=matmul))
    optimizer = QFTLion(model.parameters(), lr=LR, gradient=gradient)
    losses = []
    torch.manual_seed(0)  # seeds dropout, of layers as well
    for _ in range(STEPS):
        loss = model(**family.batch()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    optimizer.eval()
    return Run(model, losses)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two models have the same bits."""
    state = other.state_dict()
    own = one.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[n], state[n]) for n in state)


def reloaded(family: Tiny, model: Any) -> Any:
    """Save the model, and return the model loaded from that checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return family.auto.from_pretrained(folder)


@torch.no_grad()
def exported(family: Tiny, model: Any) -> bool:
    """Return whether the dequantized model and its plain checkpoint have equal outputs."""
    dequantize_model_(model, torch.float32)
    plain = reloaded(family, model).eval()
    one, other = (
        {name: value for name, value in m(**family.batch()).items() if isinstance(value, Tensor)}
        for m in (model, plain)
    )
    is_equal = all(torch.equal(one[name], other[name]) for name in one)
    return is_equal and not hasattr(plain, "hf_quantizer")


def float_share(model: nn.Module) -> tuple[float, dict[str, float]]:
    """Return the percentage of parameters that stay float, in total and by reason."""
    plan = conversion_plan(model, None)
    total = sum(p.numel() for p in model.parameters())
    reasons: dict[str, float] = {}
    for kept in plan.kept:
        share = 100 * kept.parameter.numel() / total
        reasons[kept.reason] = reasons.get(kept.reason, 0.0) + share
    return sum(reasons.values()), reasons


def real(name: str) -> nn.Module:
    """Return a model of real size on the meta device."""
    return without_storage(*REAL[name])


def row(name: str, family: Family) -> list[str]:
    """Return a row of the table of families."""
    cells = [getattr(family, column) for column in Family.__dataclass_fields__]
    return [name, *({True: "yes", False: "no", None: ""}[cell] for cell in cells)]


def real_row(name: str) -> list[str]:
    """Return a row of the table of real models."""
    model = real(name)
    share, reasons = float_share(model)
    largest = max(reasons, key=lambda reason: reasons[reason])
    parameters = sum(p.numel() for p in model.parameters()) / 1e9
    return [name, f"{parameters:.2f}", f"{share:.3f} %", largest]


HEAD = ["family", "learns", "release = stack", "INT8 products", "reload", "export", "generate"]
REAL_HEAD = ["model", "billion parameters", "float", "most of it"]


def main() -> None:
    """Make both tables, and write the report."""
    options = command_line(__doc__, only=None).parse_args()
    families = {name: measured(name) for name in chosen(TINY, options.only)}
    text = "\n\n".join(
        table(HEAD, [row(name, family) for name, family in families.items() if name in kind])
        for kind in (OF_TEXT, OF_IMAGES_AND_SOUND)
    )
    text += "\n\n" + table(REAL_HEAD, [real_row(name) for name in chosen(REAL, options.only)])
    report.write(options, {name: vars(family) for name, family in families.items()}, text)
    report.finish(options, text)


if __name__ == "__main__":
    main()
