"""Shared by the commands: a parser whose help is its module's docstring, and output of results."""

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any, NoReturn


def parser(module: str) -> argparse.ArgumentParser:
    """Return a parser of `qft-hf <name>` that shows the docstring of the module `module`."""
    name = module.rpartition(".")[2]
    return argparse.ArgumentParser(
        prog=f"qft-hf {name}",
        description=sys.modules[module].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--json`."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the flag `--trust_remote_code`."""
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run Python code that comes with the model"
    )


def take(argv: list[str], *names: str) -> bool:
    """Remove a switch from a command line; return whether it was there."""
    found = any(name in argv for name in names)
    argv[:] = [word for word in argv if word not in names]
    return found


def show_help(text: str) -> NoReturn:
    """Print a help text that is not from argparse, and exit as argparse does."""
    print(text, end="")
    raise SystemExit(0)


def output_for(*, as_json: bool) -> AbstractContextManager[Any]:
    """If `as_json`, send what libraries print to standard error: stdout has only the result."""
    return redirect_stdout(sys.stderr) if as_json else nullcontext()


def show(result: Any, text: object, *, as_json: bool) -> None:
    """Print the text; if `as_json`, the result, with null for inf and NaN, which JSON lacks."""
    if as_json:
        from qft_hf.hf.finetune.summary import finite

        text = json.dumps(finite(result), indent=2)
    print(text)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a text table; its first column is left-aligned, the others are right-aligned."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
