"""Loss of a small mixture of experts with INT8 routers, compared with float routers.

    python scripts/studies/routers.py

A byte-level Qwen3-MoE is pretrained on source code in FP32 and tuned on prose by Lion: in FP32, in
INT8 with float routers (the default), and in INT8 with INT8 routers, all from the same start and on
the same data. A seed is an order of the data. A router has one row for each expert, so its bytes do
not matter, but its decisions do.
"""

import sys
from pathlib import Path
from statistics import mean, stdev

from torch import nn
from transformers import Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.byte_llama import Size, build
from common.tuning_study import Run, Study, Way, grouped, study_line

from qft_hf import QFTConfig, QFTWeight


class Int8Routers(Way):
    """INT8 routers: they multiply by `F.linear`, so their weight may be a `QFTWeight`."""

    def model(self, start: nn.Module) -> nn.Module:
        """Return a copy of `start` to be tuned."""
        model = super().model(start)
        for name, parameter in list(model.named_parameters()):
            if name.endswith(".mlp.gate.weight"):
                module = model.get_submodule(name.removesuffix(".weight"))
                module.weight = nn.Parameter(QFTWeight.from_float(parameter, QFTConfig()))
        return model


WAYS = {
    "FP32 Lion": Way(),
    "QFT, float routers": Way(QFTConfig()),
    "QFT, INT8 routers": Int8Routers(QFTConfig()),
}


def mixture(size: Size) -> nn.Module:
    """Return an untrained model with 16 experts per layer, of which each token is sent to 4."""
    return build(
        size, Qwen3MoeForCausalLM, moe_intermediate_size=size.hidden // 2, head_dim=32,
        num_experts=16, num_experts_per_tok=4, norm_topk_prob=True,
    )  # fmt: skip


def table(runs: list[Run]) -> str:
    """Return a table with a row for each way."""
    whole = mean(run["reduction"] for run in runs if run["way"] == "FP32 Lion")
    rows = []
    for (way, _), found in grouped(runs).items():
        reductions = [run["reduction"] for run in found]
        share = f"{100 * mean(reductions) / whole:.1f} %"
        spread = f"{100 * stdev(reductions) / whole:.1f}" if len(reductions) > 1 else None
        rows.append([way, f"{mean(reductions):.4f}", share, spread])
    return report.table(["way", "loss reduction", "of FP32 Lion's", "+- points over seeds"], rows)


def main() -> None:
    """Tune in every way with every seed."""
    options = study_line(__doc__, seeds=[0, 1, 2, 3], learning_rate=1e-3).parse_args()
    order = [(way, options.learning_rate, seed) for seed in options.seeds for way in WAYS]
    Study(options, mixture).run(WAYS, order, table)


if __name__ == "__main__":
    main()
