"""Will it fit? The memory of full-parameter INT8 training, by arithmetic; no weight is loaded.

    python scripts/estimate_memory.py configs/architectures/llama-2-7b
    python scripts/estimate_memory.py meta-llama/Llama-2-7b-hf --sequence_length 4096 --gpu 24 48
    python scripts/estimate_memory.py configs/architectures/* --markdown
    python scripts/estimate_memory.py data/smollm2 --live    # load it, take a step, compare

A model is a folder with a config.json or a name on the hub.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from common.report import table
from transformers import AutoModelForCausalLM

from qft_hf import (
    QFTSGD,
    MemoryLedger,
    QFTConfig,
    QFTLion,
    estimate_memory,
    memory_ledger,
    recommend,
)
from qft_hf.layout import MOMENTUM_BITS
from qft_hf.memory.ledger import FP32_ADAM_BYTES
from qft_hf.optim.flow import GRADIENTS as MODES


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="folders with a config.json, or hub names")
    parser.add_argument("--batch_size", type=int, default=1, help="of a micro-batch (default 1)")
    parser.add_argument("--sequence_length", type=int, default=2048, help="tokens (default 2048)")
    parser.add_argument("--chunked_loss", action="store_true", help="logits never exist whole")
    parser.add_argument(
        "--matmul", default="dequantize", help="dequantize, or int8, which keeps INT8 activations"
    )
    parser.add_argument(
        "--gpu", type=float, nargs="+", default=[24, 48, 80], help="cards, GB (default 24 48 80)"
    )
    parser.add_argument(
        "--momentum_bits",
        type=int,
        choices=MOMENTUM_BITS,
        default=8,
        help="8 (default); 4, experimental; 0: none, which is qft_sgd",
    )
    parser.add_argument("--markdown", action="store_true", help="one table of all models")
    parser.add_argument(
        "--live", action="store_true", help="load the models, and set measured states beside these"
    )
    return parser.parse_args()


def live_ledger(name: str | Path, gradient: str, momentum_bits: int) -> MemoryLedger:
    """Load a model, and measure its states where they are largest: just before the second step."""
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=QFTConfig())
    make = partial(QFTLion, momentum_bits=momentum_bits) if momentum_bits else QFTSGD
    optimizer = make(model.parameters(), gradient=gradient)
    ids = torch.arange(8)[None]
    for _ in range(2):
        optimizer.step()
        model(input_ids=ids, labels=ids).loss.backward()
    return memory_ledger(model, optimizer)


def compare(name: str) -> None:
    """Print estimated and measured bytes of all states in each mode."""
    for mode in MODES:
        for bits in MOMENTUM_BITS:
            estimated = estimate_memory(name, gradient=mode, momentum_bits=bits).state_bytes
            measured = live_ledger(name, mode, bits).total_bytes
            print(
                f"gradient={mode}, momentum_bits={bits}: states {estimated:,} bytes by arithmetic, "
                f"{measured:,} measured, {100 * (estimated / measured - 1):+.2f} %"
            )


def main() -> None:
    """Print what each model takes in each mode, and how it fits each card."""
    options = parse()
    work = {
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "chunked_loss": options.chunked_loss,
        "config": QFTConfig(matmul=options.matmul),
        "momentum_bits": options.momentum_bits,
    }
    rows = []
    for name in options.models:
        stack, release = (estimate_memory(name, gradient=mode, **work) for mode in MODES)
        if options.markdown:
            n_bytes = [stack.state_bytes, release.state_bytes, release.total_bytes]
            n_bytes.append(FP32_ADAM_BYTES * stack.n_parameters)
            size = f"{stack.n_parameters / 1e9:.2f} B"
            rows.append([Path(name).name, size, *(f"{n / 1e9:.1f} GB" for n in n_bytes)])
            continue
        print(f"{name}: {stack.n_parameters:,} parameters")
        for mode, figures in zip(MODES, (stack, release), strict=True):
            print(
                f"\ngradient={mode}, gradient_checkpointing=True, "
                f"momentum_bits={options.momentum_bits}\n{figures}"
            )
        print()
        for gpu in options.gpu:
            print(f"{gpu:g} GB card: {recommend(name, gpu, **work)}")
        print()
        if options.live:
            compare(name)
    if rows:
        head = ["model", "parameters", "states, `stack`", "states, `release`"]
        print(table([*head, "in all, `release`", "FP32 Adam's states"], rows))


if __name__ == "__main__":
    main()
