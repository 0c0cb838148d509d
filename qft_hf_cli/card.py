"""Rewrite the model card of a finished run, with facts that only you know.

    qft-hf card runs/demo --license apache-2.0 --language en
    qft-hf card runs/demo --name org/my-model --base_model org/model --dataset org/chats

Each run writes a card with all that it knows: results, data, hyperparameters, memory, format.
What an earlier command has added stays, except the name.
"""

import sys
from pathlib import Path

from .command_line import parser


def main(argv: list[str]) -> None:
    """Write one card."""
    arguments = parser(__name__)
    arguments.add_argument("run", type=Path, help="output folder of a finished run")
    arguments.add_argument("--license", help="identifier that the Hub knows, such as apache-2.0")
    arguments.add_argument("--name", help="name of the model on the Hub: org/name")
    arguments.add_argument("--base_model", help="name on the Hub of the model that was fine-tuned")
    arguments.add_argument("--dataset", nargs="+", dest="datasets", help="names on the Hub")
    arguments.add_argument("--language", nargs="+", help="language codes such as en")
    arguments.add_argument("--tags", nargs="+", help="tags in addition to the usual ones")
    known = vars(arguments.parse_args(argv))

    from qft_hf.hf.finetune.run_card import facts_of_card, write_run_card
    from qft_hf.hf.licenses import license_warning

    run = known.pop("run")
    if known["license"] is not None and (doubtful := license_warning(known["license"])):
        print(f"qft-hf card: {doubtful}", file=sys.stderr)
    given = {key: value for key, value in known.items() if value is not None}
    print(f"written to {write_run_card(run, facts_of_card(run) | given)}")
