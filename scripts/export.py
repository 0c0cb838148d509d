"""Write the model of an INT8 checkpoint as an ordinary checkpoint.

    python scripts/export.py runs/demo runs/demo-bf16 --dtype bfloat16

The result loads with plain transformers, without qft_hf.
"""

import argparse
from pathlib import Path

import torch

from qft_hf.hf.finetune import export_checkpoint


def main() -> None:
    """Export one checkpoint as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="folder with INT8 weights")
    parser.add_argument("target", type=Path, help="folder to write; must not hold anything")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    arguments = parser.parse_args()
    export_checkpoint(arguments.checkpoint, arguments.target, dtype=getattr(torch, arguments.dtype))
    print(f"written to {arguments.target}")


if __name__ == "__main__":
    main()
