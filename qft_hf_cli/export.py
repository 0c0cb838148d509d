"""Convert an INT8 checkpoint to an ordinary one, which loads without qft_hf.

qft-hf export runs/demo runs/demo-bf16 --dtype bfloat16
"""

from pathlib import Path

from .command_line import add_trust, parser


def main(argv: list[str]) -> None:
    """Export one checkpoint."""
    arguments = parser(__name__)
    arguments.add_argument("checkpoint", type=Path, help="folder with INT8 weights")
    arguments.add_argument("target", type=Path, help="folder to write; must not hold anything")
    arguments.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of all weights (default bfloat16)",
    )
    add_trust(arguments)
    options = arguments.parse_args(argv)

    import torch

    from qft_hf.hf.finetune import export_checkpoint

    export_checkpoint(
        options.checkpoint,
        options.target,
        dtype=getattr(torch, options.dtype),
        trust_remote_code=options.trust_remote_code,
    )
    print(f"written to {options.target}")
