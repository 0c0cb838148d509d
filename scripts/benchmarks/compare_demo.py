"""Train the demo in four ways: FP32 AdamW, FP32 Lion, and QFT with each kind of product.

    python scripts/fetch_demo.py smollm2 chitchat
    python scripts/benchmarks/compare_demo.py                # minutes for each on 2 CPU cores
    python scripts/benchmarks/compare_demo.py --only int8    # adds to the figures that are there

All start from the same weights and see the same dialogues in the same order (the config `demo`).
Lion uses the learning rate of the config, AdamW that of `--adamw_learning_rate`. Reported is the
loss on held-out dialogues before and after training.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, where common/ is
from common import report
from common.command_line import chosen, command_line
from common.trainers import asset_flags, compared_trainer


def table(figures: dict[str, dict[str, float]]) -> str:
    """Return a table of losses, with the share of FP32 Lion's reduction if Lion was run."""
    baseline = figures.get("FP32 Lion")
    rows = []
    for name, way in figures.items():
        share = None
        if baseline and (reduction := baseline["before"] - baseline["after"]):
            share = f"{100 * (way['before'] - way['after']) / reduction:.1f} %"
        rows.append([name, f"{way['before']:.4f}", f"{way['after']:.4f}", share])
    head = ["way", "loss before", "loss after", "share of FP32 Lion's reduction"]
    return report.table(head, rows)


def main() -> None:
    """Train in the ways that `--only` selects, and write the report after each."""
    parser = command_line(__doc__, data=report.ROOT / "data", only=None, adamw_learning_rate=3e-4)
    options, flags = parser.parse_known_args()  # the others are flags of qft-hf finetune
    path = options.output / "figures.json"
    figures = json.loads(path.read_text())["ways"] if path.exists() else {}
    flags = [*asset_flags(options, "smollm2", "chitchat"), *flags]
    ways = {
        "FP32 AdamW": [f"--learning_rate={options.adamw_learning_rate}"],
        "FP32 Lion": [],
        "QFT, dequantize": [],
        "QFT, int8": ["--matmul=int8"],
    }
    for name, more in chosen(ways, options.only).items():
        print(f"== {name}", flush=True)
        trainer = compared_trainer(name, "demo", [*flags, *more])
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        figures[name] = {"before": before, "after": after, "training": steps}
        report.write(options, {"ways": figures}, table(figures))
    report.finish(options, table(figures))


if __name__ == "__main__":
    main()
