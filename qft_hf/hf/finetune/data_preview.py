"""Shows what a run is about to learn: counts of its rows, and one example as the model sees it."""

import logging
import sys
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from ...nn.loss import IGNORED
from ..atomic_writes import atomic_path
from .classification import Classification
from .data import TaskData

logger = logging.getLogger(__name__)

LEARNED = ("\u27e6", "\u27e7")  # white square brackets, which are rare in text
EXAMPLE = f"The first example, with the learned parts in {LEARNED[0]}brackets{LEARNED[1]}:"
SHOWN_CHARACTERS = 4000


def data_preview(data: TaskData) -> str:
    """Return counts of rows, examples, tokens, cut tokens and dropped rows, and an example."""
    counts = [f"{'training data':<24}{data.train.counts}"]
    if data.evaluation is not None:
        counts.append(f"{'evaluation data':<24}{data.evaluation.counts}")
        if data.evaluation.counts.held_out is not None:
            counts.append(f"{'held-out rows':<24}fingerprint {data.evaluation.counts.held_out}")
    if data.task.names:
        counts.append(f"{'classes':<24}{', '.join(data.task.names)}")
    return "\n".join([*counts, "", EXAMPLE, "", example_text(data)])


def show(data: TaskData, path: Path) -> None:
    """Write the preview to stderr, in a way that keeps progress bars intact, and to a file."""
    text = f"{data_preview(data)}\n"
    tqdm.write(text, file=sys.stderr)
    before = path.read_bytes() if path.is_file() else b""
    if before == text.encode():
        return  # a resumed run
    if before and (changed := _changes(before.decode(errors="replace"), text)):
        logger.warning(
            "the run in %s continues with other data than before: %s. It has learned from the "
            "earlier rows, and with eval_fraction some of them may now be scored as held out. "
            "Restore the data, or start again with overwrite_output",
            path.parent,
            "; ".join(changed),
        )
    with atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _changes(before: str, now: str) -> list[str]:
    """Return how previews differ; a line that only one of two versions writes does not count."""
    counts_before, _, example_before = before.partition("\n\n")
    counts_now, _, example_now = now.partition("\n\n")
    was = {line[:24]: line[24:] for line in counts_before.splitlines()}
    changed = [
        f"{name.strip()} {count}, was {was[name]}"
        for name, count in ((line[:24], line[24:]) for line in counts_now.splitlines())
        if was.get(name, count) != count
    ]
    return changed or ["another first example"] * (example_before != example_now)


def example_text(data: TaskData) -> str:
    """Return the first training example as text, with the learned parts in brackets.

    Of a packed block, only its first example is shown. The middle of a text longer than
    `SHOWN_CHARACTERS` is left out.
    """
    example, tokenizer = data.train.dataset[0], data.task.tokenizer
    ids, labels = example["input_ids"], example["labels"]
    if isinstance(data.task, Classification):
        parts = [f"{tokenizer.decode(ids)}\n{LEARNED[0]}{data.task.describe(labels)}{LEARNED[1]}"]
    else:
        positions = example.get("position_ids", range(len(ids)))
        first = [i for i, position in enumerate(positions) if position == i]
        # The first token has no predecessor, so it is never learned.
        pairs = [(ids[i], i > 0 and labels[i] != IGNORED) for i in first]
        parts = []
        for is_learned, run in groupby(pairs, key=lambda pair: pair[1]):
            text = str(tokenizer.decode([token for token, _ in run]))
            parts.append(f"{LEARNED[0]}{text}{LEARNED[1]}" if is_learned else text)
    text = "".join(parts)
    half = SHOWN_CHARACTERS // 2
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:half]} [...] {text[-half:]}"
