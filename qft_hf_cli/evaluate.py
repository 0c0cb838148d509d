"""Score a checkpoint, INT8 or float, on held-out data.

    qft-hf evaluate runs/demo                                the data that the run held out
    qft-hf evaluate runs/demo --eval_data test.jsonl         other data
    qft-hf evaluate runs/demo-bf16 --eval_data test.jsonl    an exported or any other model
    qft-hf evaluate my.yaml                                  the model that a config starts from

Flags are those of `qft-hf finetune`; flags of model and data, --seed, --per_device_eval_batch_size,
--label_smoothing_factor, --bf16 and --use_cpu have an effect. --json prints the scores as JSON.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from .command_line import output_for, show, show_help, take


def main(argv: list[str]) -> None:
    """Print the scores of one checkpoint."""
    if not argv or take(argv, "-h", "--help"):
        show_help(__doc__)
    as_json = take(argv, "--json")
    from qft_hf.hf.finetune import parse_arguments
    from qft_hf.hf.finetune.evaluate import evaluate_checkpoint

    with output_for(as_json=as_json):
        found = evaluate_checkpoint(parse_arguments(flags_of(argv), command="evaluate"))
    show(asdict(found), found, as_json=as_json)


def flags_of(argv: list[str]) -> list[str]:
    """Return flags of `qft-hf finetune`: a folder becomes the model, and its run.yaml the config.

    Without a config, the evaluation data are also passed as training data, which scoring ignores.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The folder is not that of a run, and no data are given.
    """
    folder = Path(argv[0])
    if not folder.is_dir():
        from qft_hf.hf.shipped import shipped_file

        # Otherwise a missing folder would be reported as a missing config.
        is_path = not argv[0].startswith("-") and shipped_file(argv[0], ".yaml") is None
        if is_path and not folder.exists() and folder.suffix not in {".yaml", ".yml"}:
            raise FileNotFoundError(
                f"No folder {folder} (looked from {Path.cwd()}). Give the folder of a run or of a "
                "checkpoint, or a config."
            )
        return argv
    config, flags = folder / "run.yaml", [*argv[1:], "--model_name_or_path", str(folder)]
    if config.is_file():
        return [str(config), *flags]
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--eval_data", nargs="+", default=[])
    known, _ = reader.parse_known_args(flags)
    if not known.eval_data and not any(flag.startswith("--train_data") for flag in flags):
        raise ValueError(
            f"{folder} has no {config.name}, so it is not the folder of a run, and the data to "
            "evaluate on are unknown. Give --eval_data, and --task if the model is not for chats."
        )
    if known.eval_data:
        flags += ["--train_data", *known.eval_data]
    return flags
