"""Will it fit? Estimate the memory of a run before anything is loaded.

    qft-hf plan org/model --gpu 24 48                  GPUs of 24 and of 48 GB
    qft-hf plan llama-2-13b --gpu 24 --gpus 2          two GPUs that train together
    qft-hf plan llama-2-7b --sequence_length 4096      an architecture that ships with qft_hf
    qft-hf plan my.yaml                                the run that a config describes

    qft-hf plan llama-2-70b --gpu 48 --method qst --side_r 32      a side network on a frozen base

MODEL is a folder with a config.json, a name on the hub, an architecture that ships with qft_hf, or
a config of a run, whose settings apply as far as flags do not set others.
"""

import argparse
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

from .command_line import add_json, add_trust, parser, show, table

LENGTH = 2048  # default tokens of a sequence, if the model has as many positions
OF_FULL = ("gpus", "optim", "momentum_bits", "matmul", "chunked_loss")


def main(argv: list[str]) -> None:
    """Print the memory of each model in each mode, and whether it fits each card."""
    options = _parse(argv)
    results = []
    for name in options.models:
        source, work = _model(name, options)
        result = {"model": name, "command": _command(name, options.gpus or 1)}
        results.append(result | _plan(source, options.gpu, **work))
    text = _markdown(results) if options.markdown else "\n\n".join(map(_text, results))
    show(results, text, as_json=options.json)


def _parse(argv: list[str]) -> argparse.Namespace:
    arguments = parser(__name__)
    arguments.add_argument("models", nargs="+", metavar="MODEL")
    arguments.add_argument(
        "--gpu",
        type=float,
        nargs="+",
        default=[24, 48, 80],
        help="GPU memory in GB (default 24 48 80)",
    )
    arguments.add_argument(
        "--gpus", type=int, metavar="N", help="GPUs that train together (default 1)"
    )
    arguments.add_argument(
        "--batch_size", type=int, metavar="N", help="sequences per micro-batch (default 1)"
    )
    arguments.add_argument(
        "--sequence_length",
        type=int,
        metavar="N",
        help=f"tokens (default {LENGTH}, or the model's positions if fewer)",
    )
    arguments.add_argument(
        "--method", choices=("full", "qst"), help="full (default), or qst: a side network"
    )
    arguments.add_argument("--side_r", type=int, help="for qst: width of base over side network")
    arguments.add_argument("--base", help="for qst: nf4, int8 or float; default: all of them")
    arguments.add_argument("--optim", help="qft_lion (default), qft_adamw or qft_sgd")
    arguments.add_argument("--momentum_bits", type=int, help="for qft_lion: 8 (default) or 4")
    arguments.add_argument("--matmul", help="dequantize (default) or int8")
    arguments.add_argument("--chunked_loss", action="store_true", help="never store all logits")
    arguments.add_argument("--markdown", action="store_true", help="one table of all models")
    add_trust(arguments)
    add_json(arguments)
    options = arguments.parse_args(argv)
    for gpu in options.gpu:
        if not 0 < gpu < inf:
            arguments.error(f"--gpu must be a positive, finite number of GB, got {gpu:g}")
    for flag in ("gpus", "batch_size", "sequence_length"):
        if (value := getattr(options, flag)) is not None and value < 1:
            arguments.error(f"--{flag} must be 1 or more, got {value}")
    if options.momentum_bits is not None and options.optim not in (None, "qft_lion"):
        arguments.error(f"--momentum_bits is for qft_lion, got --optim {options.optim}")
    return options


def _model(name: str, options: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return a model without storage, and arguments of `recommend`; flags override a config."""
    import torch

    from qft_hf.hf.compatibility import format_with
    from qft_hf.hf.estimate import skeleton
    from qft_hf.hf.finetune.arguments import MethodArguments
    from qft_hf.hf.language_model import freeze_non_text_parts
    from qft_hf.hf.positions import n_positions
    from qft_hf.hf.shipped import architecture

    place, trust = name, options.trust_remote_code
    dtype: torch.dtype | None = None  # that of the model's configuration
    work: dict[str, Any] = {"batch_size": 1, "sequence_length": None}
    asked: dict[str, Any] = {}  # fields of the format of the weights
    if _is_config(name):
        from qft_hf.hf.finetune.data import LANGUAGE_TASKS
        from qft_hf.hf.finetune.forecast import workload_of
        from qft_hf.hf.finetune.parsing import parse_arguments

        # Nothing is computed here, so the machine need not have the GPU that `bf16` asks for.
        arguments = parse_arguments([name, "--use_cpu=true"])
        if (task := arguments.data.task) not in LANGUAGE_TASKS:
            raise ValueError(
                f"{name} has task {task!r}, but memory is estimated only for causal language "
                "models. `qft-hf check` shows its data, its parameters and the disk space, and a "
                "run of a few steps (--max_steps 3) measures its memory."
            )
        place = arguments.model.model_name_or_path
        dtype = getattr(torch, arguments.model.dtype)
        trust |= arguments.model.trust_remote_code
        work, asked = workload_of(arguments), arguments.training.format_fields
    elif not Path(name).exists() and (folder := architecture(name)) is not None:
        place = str(folder)
    if options.method is not None or _side_fields(options):
        method = MethodArguments(method=options.method or "full", **_side_fields(options))
        work |= {"side": method.side, "base": method.base}
    of_full = [f"--{field}" for field in OF_FULL if getattr(options, field)]
    if work.get("side") is not None and of_full:
        raise ValueError(
            f"{', '.join(of_full)} is for training every parameter, and {name} is planned with a "
            "side network (method qst). Omit the flag, or the method."
        )
    flags = {
        "batch_size": options.batch_size,
        "sequence_length": options.sequence_length,
        "optimizer": options.optim,
        "momentum_bits": options.momentum_bits,
        "chunked_loss": options.chunked_loss or None,
        "n_processes": options.gpus,
    }
    work |= {key: value for key, value in flags.items() if value is not None}
    asked = asked | ({"matmul": options.matmul} if options.matmul else {})
    source = skeleton(place, trust_remote_code=trust, dtype=dtype)
    freeze_non_text_parts(source, source.config)  # as a run does
    length = _sequence_length(place, work["sequence_length"], n_positions(source.config))
    return source, work | {"config": format_with(source, asked), "sequence_length": length}


def _is_config(name: str) -> bool:
    """Return whether this is a config of a run: a file, or one that ships with qft_hf."""
    from qft_hf.hf.shipped import shipped_file

    return Path(name).suffix in (".yaml", ".yml") or shipped_file(name, ".yaml") is not None


def _side_fields(options: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(options, name) for name in ("side_r", "base")}
    return {name: value for name, value in values.items() if value is not None}


def _plan(source: Any, gpus: list[float], *, sequence_length: int, **work: Any) -> dict[str, Any]:
    """Return the bytes of each way to train, and the choice for each card."""
    from qft_hf import recommend
    from qft_hf.hf.positions import n_positions
    from qft_hf.hf.recommendation import ways_to_train

    ways = []
    for way, of in ways_to_train(source, **work):
        estimate = of(sequence_length=sequence_length)
        ways.append(way | estimate.sums)
    cards = []
    for gpu in gpus:
        choice = recommend(source, gpu, sequence_length, **work)
        cards.append(
            {
                "gb": gpu,
                "fits": choice.fits,
                "base": choice.base,
                "gradient": choice.gradient,
                "gradient_checkpointing": choice.gradient_checkpointing,
                "total_bytes": choice.estimate.total_bytes,
                "longest_sequence": choice.longest_sequence,
                "missing_bytes": choice.missing_bytes,
                "text": str(choice),
            }
        )
    return {
        "parameters": estimate.n_parameters,
        "gpus": estimate.n_processes,
        "received_bytes": estimate.received_bytes,
        "not_counted": estimate.not_counted,
        "batch_size": work["batch_size"],
        "sequence_length": sequence_length,
        "positions": n_positions(source.config),
        "rows": [asdict(row) for row in (*estimate.rows, *estimate.activation_rows)],
        "ways": ways,
        "cards": cards,
    }


def _sequence_length(place: str, asked: int | None, positions: int | None) -> int:
    """Return the sequence length: the one asked for, if the model has as many positions.

    Raises:
        ValueError: The model has fewer positions.
    """
    if asked is None:
        return min(LENGTH, positions or LENGTH)
    if positions is not None and asked > positions:
        raise ValueError(
            f"sequences of {asked:,} tokens were requested, but {place} has {positions:,} "
            f"positions. Set --sequence_length, or max_length in a config, to {positions} or less."
        )
    return asked


def _text(result: dict[str, Any]) -> str:
    """Return a table by way, and the choice for each card."""
    from qft_hf.hf.recommendation import USABLE
    from qft_hf.memory.estimate import without_activations

    n, many = result["gpus"], f"{result['gpus']} x " if result["gpus"] > 1 else ""
    usable = {card["gb"]: USABLE * card["gb"] * 1e9 for card in result["cards"]}
    first = "gradient" if "gradient" in result["ways"][0] else "base"
    head = [first, "checkpointing", "states", "activations", "in all"]
    rows = [
        [
            way[first],
            "on" if way["gradient_checkpointing"] else "off",
            *(_gb(way[f"{what}_bytes"]) for what in ("state", "activation", "total")),
            *("fits" if way["total_bytes"] <= most else "no" for most in usable.values()),
        ]
        for way in result["ways"]
    ]
    lines = [
        f"{result['model']}: {result['parameters']:,} parameters, micro-batches of "
        f"{result['batch_size']} x {result['sequence_length']:,} tokens, by arithmetic"
        + (f", on each of {n} GPUs" if n > 1 else ""),
        "",
        table([*head, *(f"{many}{gb:g} GB" for gb in usable)], rows),
        "",
        *(f"best on {many}{card['gb']:g} GB: {card['text']}" for card in result["cards"]),
    ]
    if result["not_counted"]:
        lines += ["", without_activations(result["not_counted"])]
    if n > 1:
        lines += [
            "",
            f"each GPU receives {_gb(result['received_bytes'])} from the others in a step; start "
            f"them with\n    {result['command']}",
        ]
    return "\n".join(lines)


def _command(name: str, n: int) -> str:
    """Return the command that starts a run on `n` GPUs; a model's has a placeholder config."""
    config = name if _is_config(name) else "my.yaml"
    launcher = f"accelerate launch --multi_gpu --num_processes {n} -m" if n > 1 else "python -m"
    return f"{launcher} qft_hf finetune {config}"


def _markdown(results: list[dict[str, Any]]) -> str:
    """Return a Markdown table of one line per model, with gradient checkpointing."""
    from qft_hf.memory.ledger import FP32_ADAM_BYTES

    lines: list[list[str]] = []
    each = f", each of {results[0]['gpus']}" if results[0]["gpus"] > 1 else ""
    for result in results:
        ways = [way for way in result["ways"] if way["gradient_checkpointing"]]
        adam = {"FP32 Adam's states": FP32_ADAM_BYTES * result["parameters"]}
        if "base" in ways[0]:
            figures = {f"in all, {way['base']} base": way["total_bytes"] for way in ways} | adam
        else:
            stack, release = ways
            figures = {
                f"states, `stack`{each}": stack["state_bytes"],
                f"states, `release`{each}": release["state_bytes"],
                f"in all, `release`{each}": release["total_bytes"],
                **adam,
            }
        head = ["model", "parameters", *figures]
        if head not in lines:
            lines += [head, ["---"] * len(head)]
        size = f"{result['parameters'] / 1e9:.2f} B"
        lines.append([Path(result["model"]).name, size, *map(_gb, figures.values())])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
