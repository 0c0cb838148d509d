"""Print the loss of an ordinary checkpoint, computed by plain transformers without qft_hf.

    python scripts/evaluate_plain.py runs/demo/bfloat16 runs/demo/eval_examples.jsonl

Each line of the examples is a JSON object with `input_ids` and `labels` (-100: not scored).
Arithmetic is FP32.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM


def main() -> None:
    """Print the mean loss over all scored tokens, in nats."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder of an ordinary checkpoint")
    parser.add_argument("examples", type=Path, help="jsonl file")
    arguments = parser.parse_args()

    model, loading = AutoModelForCausalLM.from_pretrained(
        arguments.checkpoint, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{arguments.checkpoint} has no values for {missing[0]} and {len(missing) - 1} more "
            "tensors, which would be random. Pass an ordinary checkpoint; export INT8 weights with "
            "`qft-hf export` first."
        )
    model.eval()
    total, n_tokens = 0.0, 0
    for line in arguments.examples.read_text(encoding="utf-8").splitlines():
        example = json.loads(line)
        labels = torch.tensor(example["labels"][1:])
        with torch.inference_mode():
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1]
        total += cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        n_tokens += int((labels != -100).sum())
    if "qft_hf" in sys.modules:
        raise RuntimeError("qft_hf was imported, so this proves nothing about plain transformers.")
    print(total / n_tokens)


if __name__ == "__main__":
    main()
