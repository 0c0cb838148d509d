"""Show scales, saturation and outliers of each layer of an INT8 checkpoint.

    qft-hf inspect runs/demo
    qft-hf inspect runs/demo --original org/model    also compares with the float model

"error" is the norm of the difference divided by that of the original. For a model that was only
quantized it is due to rounding; for one that was trained, to rounding and learning together.
"""

from dataclasses import asdict
from pathlib import Path

from .command_line import add_json, add_trust, parser, show, table


def main(argv: list[str]) -> None:
    """Print a line for each INT8 weight."""
    arguments = parser(__name__)
    arguments.add_argument("checkpoint", type=Path, help="folder with INT8 weights")
    arguments.add_argument("--original", help="model to compare with: a folder or a hub name")
    add_trust(arguments)
    add_json(arguments)
    options = arguments.parse_args(argv)

    from qft_hf.hf.inspection import inspect_checkpoint

    weights = inspect_checkpoint(
        options.checkpoint, options.original, trust_remote_code=options.trust_remote_code
    )
    head = ["weight", "shape", "MB", "scale", "from", "to", "zero", "at 127", "outliers"]
    head += ["largest outlier"]
    rows = [
        [
            weight.name,
            " x ".join(map(str, weight.shape)),
            f"{weight.stored_bytes / 1e6:.2f}",
            f"{weight.median_scale:.1e}",
            f"{weight.smallest_scale:.1e}",
            f"{weight.largest_scale:.1e}",
            f"{100 * weight.zero_share:.1f} %",
            f"{100 * weight.saturated_share:.2f} %",
            f"{100 * weight.outlier_share:.2f} %",
            f"{weight.largest_outlier:.3g}",
        ]
        for weight in weights
    ]
    if options.original:
        head += ["error", "largest error, in scales"]
        for row, weight in zip(rows, weights, strict=True):
            row += [f"{100 * (weight.error or 0):.2f} %", f"{weight.largest_error:.2f}"]
    show([asdict(weight) for weight in weights], table(head, rows), as_json=options.json)
