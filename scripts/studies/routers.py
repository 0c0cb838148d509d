"""Loss of a small mixture of experts with INT8 routers, compared with float routers.

    python scripts/studies/routers.py

A byte-level Qwen3-MoE is pretrained on source code in FP32 and tuned on prose by Lion: in FP32, in
INT8 with float routers (the default), and in INT8 with INT8 routers, all from the same start and on
the same data. A seed is an order of the data. A router has one row for each expert, so its bytes do
not matter, but its decisions do.
"""

import copy
import sys
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from byte_llama import Size, counter, held_out_loss, prose, source_code, train
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import command_line

from qft_hf import QFTConfig, QFTLion, QFTWeight, quantize_model_

N_HELD_OUT = 256  # sequences that are scored
WAYS = ("FP32 Lion", "QFT, float routers", "QFT, INT8 routers")


def build(size: Size, *, seed: int = 0) -> Qwen3MoeForCausalLM:
    """Return an untrained model with 16 experts per layer, of which each token is sent to 4."""
    config = Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=size.hidden,
        moe_intermediate_size=size.hidden // 2,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32,
        head_dim=32,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        max_position_embeddings=size.sequence,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3MoeForCausalLM(config)


def quantize_routers_(model: nn.Module) -> None:
    """Make routers INT8: they multiply by `F.linear`, so their weight may be a `QFTWeight`."""
    for name, parameter in list(model.named_parameters()):
        if name.endswith(".mlp.gate.weight"):
            module = model.get_submodule(name.removesuffix(".weight"))
            module.weight = nn.Parameter(QFTWeight.from_float(parameter, QFTConfig()))


def tuned(start: nn.Module, way: str, size: Size, *, seed: int, lr: float, steps: int) -> Any:
    """Return a copy of `start`, tuned on prose in one way."""
    model: Any = copy.deepcopy(start)
    if way != "FP32 Lion":
        quantize_model_(model, QFTConfig())
    if way == "QFT, INT8 routers":
        quantize_routers_(model)
    optimizer = QFTLion(model.parameters(), lr=lr, weight_decay=0.1, seed=seed)
    after_step = counter(f"{way}, seed {seed}")
    train(model, optimizer, prose(), size, n_steps=steps, seed=seed, after_step=after_step)
    return model


def table(runs: list[dict[str, Any]]) -> str:
    """Return a table with a row for each way."""
    found = {way: [run["reduction"] for run in runs if run["way"] == way] for way in WAYS}
    whole = mean(found["FP32 Lion"])
    rows = [
        [
            way,
            f"{mean(reductions):.4f}",
            f"{100 * mean(reductions) / whole:.1f} %",
            f"{100 * stdev(reductions) / whole:.1f}" if len(reductions) > 1 else "",
        ]
        for way, reductions in found.items()
        if reductions
    ]
    return report.table(["way", "loss reduction", "of FP32 Lion's", "+- points over seeds"], rows)


def main() -> None:
    """Run all ways and seeds, and write the report after each run."""
    parser = command_line(
        __doc__, seeds=[0, 1, 2, 3], steps=250, pretraining_steps=500, learning_rate=1e-3,
        hidden=Size().hidden, layers=Size().layers, threads=1,
    )  # fmt: skip
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    size = Size(hidden=options.hidden, layers=options.layers)
    start = build(size)
    adamw = torch.optim.AdamW(start.parameters(), lr=3e-3, weight_decay=0.1)
    train(start, adamw, source_code(), size, n_steps=options.pretraining_steps, seed=1234)
    before = held_out_loss(start, prose(), size, n=N_HELD_OUT)

    runs: list[dict[str, Any]] = []
    began = time.perf_counter()
    for seed in options.seeds:
        for way in WAYS:
            model = tuned(
                start, way, size, seed=seed, lr=options.learning_rate, steps=options.steps
            )
            reduction = before - held_out_loss(model, prose(), size, n=N_HELD_OUT)
            runs.append({"way": way, "seed": seed, "reduction": reduction})
            print(f"{time.perf_counter() - began:6.0f} s  {runs[-1]}", flush=True)
            report.write(options, {"loss_before": before, "runs": runs}, table(runs))
    report.finish(options, f"Loss before: {before:.4f}\n\n{table(runs)}")


if __name__ == "__main__":
    main()
