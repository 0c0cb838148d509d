"""Write one HTML page that shows finished runs side by side.

    qft-hf report runs/demo
    qft-hf report runs/first runs/second --output compared.html

It shows loss, learning rate, memory compared with other ways to train, health, codes before and
after training, movement by layer and settings that differ. It needs no network and no other file.
"""

from pathlib import Path

from .command_line import parser


def main(argv: list[str]) -> None:
    """Write one page."""
    arguments = parser(__name__)
    arguments.add_argument("runs", nargs="+", type=Path, help="output folders of finished runs")
    arguments.add_argument(
        "--output", type=Path, default=Path("report.html"), help="default report.html"
    )
    options = arguments.parse_args(argv)

    from qft_hf.hf.report import read_runs, write_report

    write_report(read_runs(options.runs), options.output)
    print(f"written to {options.output}")
