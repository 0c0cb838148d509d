"""The command `qft-hf`; each of its sub-commands is the module of the same name.

This package is not part of qft_hf, because importing anything from qft_hf imports PyTorch and
transformers, which takes seconds, and help texts should not wait for that. The modules here import
qft_hf only when a command begins to work.
"""

import errno
import linecache
import os
import re
import select
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

COMMANDS = ("plan", "check", "finetune", "evaluate", "chat", "export", "inspect", "card", "report")
_PERMISSION = ". Ask its owner for permission, or choose another place."
# What `torch.save` says if it cannot write all of a file.
_TORCH_WROTE_A_PART = re.compile(r"PytorchStreamWriter|unexpected pos \d+ vs|iostream error")
ADVICE = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENAMETOOLONG: ". Is it a text in place of a path? Correct or shorten it.",
}
_USAGE = """\
Fine-tune every parameter of a language model in INT8.

usage: qft-hf COMMAND [...]

{commands}

`qft-hf COMMAND --help` explains a command, and `qft-hf --version` prints the version. Commands
that have a result print it as JSON with `--json`.
"""


@contextmanager
def _output_may_fail() -> Iterator[None]:
    """End without a traceback if the reader has left, as in `| head -1`, or a disk is full.

    Raises:
        SystemExit: With 141, a shell's status for SIGPIPE; or with 1, after printing the error.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_has_left():  # another pipe is broken, and the traceback shows which
            raise
        _print_no_more()
        raise SystemExit(141) from None
    except Exception as error:
        if not _is_full_disk(error):
            raise
        _print_no_more()
        notes = getattr(error, "__notes__", ["The command did not finish. Free some space."])
        said = "torch.save could not write a file" if type(error) is RuntimeError else error
        print(f"qft-hf: {said}. {' '.join(notes)}", file=sys.stderr)
        raise SystemExit(1) from error


def _print_no_more() -> None:
    """Discard further output: flushing it when Python ends would fail and print an error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_full_disk(error: Exception) -> bool:
    """Return whether a file cannot grow.

    Other libraries give the error number only in the text, and PyTorch does not give it.
    """
    if type(error) is RuntimeError:
        return bool(_TORCH_WROTE_A_PART.search(str(error)))
    said = re.search(r"os error (\d+)", str(error))
    number = int(said[1]) if said else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _reader_has_left() -> bool:
    """Return whether the reader of this process's output has left."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


@_output_may_fail()
def main(argv: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        argv: The command line without the program's name; None: that of the process.

    Raises:
        SystemExit: With 0 after a help text; with 1 after a text that says what to do, if the run
            was refused; with 2 for a wrong command line.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {name:<10} {_headline(_module(name))}" for name in COMMANDS]
        print(_USAGE.format(commands="\n".join(lines)), end="")
    elif name == "--version":
        print(f"qft_hf {_version()}")
    elif name not in COMMANDS:
        print(f"qft-hf: no command {name!r}. Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    else:
        _run(_module(name), rest)


def _run(command: ModuleType, argv: list[str]) -> None:
    """Run a command; an error raised by qft_hf itself is shown as its text, without a traceback.

    So are the errors of files in `ADVICE`, whoever raises them.

    Raises:
        SystemExit: With 1 if qft_hf refused the command or a file has such an error, with 130 if
            Ctrl-C stopped it.
    """
    name = command.__name__.rpartition(".")[2]
    try:
        command.main(argv)
    except KeyboardInterrupt:
        print(f"\nqft-hf {name}: stopped.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise
    except (
        FloatingPointError, ImportError, OSError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        advice = _advice(error)
        if _is_full_disk(error) or not (advice or _is_refusal(error)):
            raise
        print(f"qft-hf {name}: {error}{advice or ''}", file=sys.stderr)
        raise SystemExit(1) from error


def _advice(error: Exception) -> str | None:
    """Return what to do about an error of a file; None for any other error."""
    if not isinstance(error, OSError) or error.filename is None:
        return None
    return ADVICE.get(error.errno or 0)


def _is_refusal(error: BaseException) -> bool:
    """Return whether qft_hf itself raised the error: only its texts are written for users.

    What a function in C raises, such as one of PyTorch, has the line of qft_hf that called it. Only
    an OSError of one is for users: it names the file.
    """
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    file = frame.f_code.co_filename
    folders = (Path(__file__).parent, _library())
    if not any(Path(file).resolve().is_relative_to(folder) for folder in folders):
        return False
    return isinstance(error, OSError) or linecache.getline(file, line).lstrip().startswith("raise ")


def _library() -> Path:
    """Return the folder of qft_hf without importing it."""
    spec = find_spec("qft_hf")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package qft_hf is not installed next to qft_hf_cli.")
    return Path(spec.origin).resolve().parent


def _version() -> str:
    values: dict[str, str] = {}
    exec((_library() / "version.py").read_text(encoding="utf-8"), values)
    return values["__version__"]


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")


def _headline(command: ModuleType) -> str:
    return (command.__doc__ or "").splitlines()[0]
