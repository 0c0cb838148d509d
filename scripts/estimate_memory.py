"""Will it fit? The memory of full-parameter INT8 training, by arithmetic; no weight is loaded.

    python scripts/estimate_memory.py configs/architectures/llama-2-7b
    python scripts/estimate_memory.py meta-llama/Llama-2-7b-hf --sequence_length 4096 --gpu 24 48
    python scripts/estimate_memory.py configs/architectures/* --markdown
    python scripts/estimate_memory.py data/smollm2 --live    # load it, take a step, compare

A model is a folder with a config.json or a name on the hub.
"""

import argparse
from pathlib import Path

import torch
from common.report import table
from transformers import AutoModelForCausalLM

from qft_hf import MemoryLedger, QFTConfig, estimate_memory, memory_ledger, recommend
from qft_hf.hf.optimizers import OPTIMIZERS as CLASSES
from qft_hf.layout import OPTIMIZERS
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
        "--optim", choices=OPTIMIZERS, default=OPTIMIZERS[0], help=f"default {OPTIMIZERS[0]}"
    )
    parser.add_argument(
        "--momentum_bits",
        type=int,
        choices=[8, 4],
        default=8,
        help="of qft_lion: 8 (default), or 4, experimental",
    )
    parser.add_argument("--markdown", action="store_true", help="one table of all models")
    parser.add_argument(
        "--live", action="store_true", help="load the models, and set measured states beside these"
    )
    options = parser.parse_args()
    if options.momentum_bits != 8 and options.optim != "qft_lion":
        parser.error(f"--momentum_bits is of qft_lion, and {options.optim} was asked for")
    return options


def live_ledger(name: str | Path, gradient: str, optim: str, **settings: int) -> MemoryLedger:
    """Load a model, and measure its states where they are largest: just before the second step."""
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=QFTConfig())
    make = CLASSES[optim].optimizer_class
    optimizer = make(model.parameters(), gradient=gradient, **settings)
    ids = torch.arange(8)[None]
    for _ in range(2):
        optimizer.step()
        model(input_ids=ids, labels=ids).loss.backward()
    return memory_ledger(model, optimizer)


def compare(name: str) -> None:
    """Print estimated and measured bytes of all states in each mode."""
    ways = [(optim, {}) for optim in OPTIMIZERS] + [("qft_lion", {"momentum_bits": 4})]
    for mode in MODES:
        for optim, settings in ways:
            options = {"gradient": mode, "optimizer": optim, **settings}
            estimated = estimate_memory(name, **options).state_bytes
            measured = live_ledger(name, mode, optim, **settings).total_bytes
            print(
                f"{', '.join(f'{key}={value}' for key, value in options.items())}: states "
                f"{estimated:,} bytes by arithmetic, {measured:,} measured, "
                f"{100 * (estimated / measured - 1):+.2f} %"
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
        "optimizer": options.optim,
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
                f"\noptim={options.optim}, gradient={mode}, gradient_checkpointing=True"
                f"{'' if options.momentum_bits == 8 else ', momentum_bits=4'}\n{figures}"
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
