"""Dry run of a config: show what it reads, learns, writes and needs. Trains nothing.

    qft-hf check my.yaml
    qft-hf check demo --max_length 128 --json

Arguments are those of `qft-hf finetune`. It shows absolute paths, the rows that are used, cut and
dropped, the first example as the model sees it with the learned text in brackets, the steps, the
disk space and an estimate of the memory. It refuses what a run would refuse, as far as that shows
without the weights.
"""

from .command_line import output_for, show, show_help, take


def main(argv: list[str]) -> None:
    """Print what a run would do."""
    if take(argv, "-h", "--help"):
        show_help(__doc__)
    as_json = take(argv, "--json")
    from qft_hf.hf.finetune import parse_arguments
    from qft_hf.hf.finetune.check import check

    with output_for(as_json=as_json):
        found = check(parse_arguments(argv, command="check"))
    show(found.as_dict(), found, as_json=as_json)
