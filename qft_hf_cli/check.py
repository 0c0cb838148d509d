"""A dry run of a config: what it reads, learns, writes and takes. Trains nothing.

    qft-hf check my.yaml
    qft-hf check demo --max_length 128 --json

It takes what `qft-hf finetune` takes. Shown are whole paths, rows that are used, cut and dropped,
the first example as the model sees it with what is learned in brackets, the steps, the room on the
disk, and the memory by arithmetic. What a run would refuse is refused here.
"""

from .command_line import output_for, show_help, show_json, take


def main(argv: list[str]) -> None:
    """Print what a run would do."""
    if take(argv, "-h", "--help"):
        show_help(__doc__)
    as_json = take(argv, "--json")
    from qft_hf.hf.finetune import parse_arguments
    from qft_hf.hf.finetune.check import check

    with output_for(as_json=as_json):
        found = check(parse_arguments(argv))
    if as_json:
        show_json(found.as_dict())
    else:
        print(found)
