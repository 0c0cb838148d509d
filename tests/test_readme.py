"""Checks of the README and docs/: Python blocks run, and paths, links and options exist."""

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from datasets import Dataset

import qft_hf
from qft_hf.hf.optimizers import OPTIMIZERS
from tests.finetune.chats import TEXTS, tiny_tokenizer
from tests.hf.test_trainer import sequences
from tests.models import tiny_llama
from tests.scripts.commands import COMMANDS, help_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = {
    path.name: path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
}
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Return lines of shell blocks and code between backticks, which may span two lines."""
    lines = [line.split("#")[0] for block in blocks(text, "sh") for line in block.splitlines()]
    inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return lines + [" ".join(part.split()) for part in inline]


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub derives from headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_python_blocks_run_in_order_on_a_small_model(tmp_path, monkeypatch):
    model = tmp_path / "model"
    tiny_llama(tied=True).save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    names = {"dataset": sequences()}
    for number, block in enumerate(blocks(README, "python")):
        here = block.replace(MODEL, str(model))
        if not torch.cuda.is_available():  # transformers needs `use_cpu`
            here = here.replace("bf16=True", "bf16=True, use_cpu=True")
        exec(compile(here, f"README block {number}", "exec"), names)

    assert MODEL in README
    assert names["qft_hf"] is qft_hf
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "bf16")
    assert type(plain.lm_head).__name__ == "Linear"


@pytest.mark.parametrize("page", [page for page in DOCS if page != "README.md"])
def test_the_python_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    dataset = Dataset.from_dict({"text": TEXTS})
    names = {"qft_hf": qft_hf, "model": model, "tokenizer": tokenizer, "dataset": dataset}
    for number, block in enumerate(blocks(DOCS[page], "python")):
        here = block
        if not torch.cuda.is_available():  # transformers needs `use_cpu`
            here = block.replace('"runs/sft"', '"runs/sft", use_cpu=True')
        exec(compile(here, f"{page} block {number}", "exec"), names)


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_the_optimizer_that_contributing_shows_is_qft_sgd(gradient):
    names = {}
    for block in blocks(DOCS["CONTRIBUTING.md"], "python"):
        exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    tensors = []
    for optimizer_class in (names["SGD"], qft_hf.QFTSGD):
        model = qft_hf.quantize_model_(tiny_llama(), qft_hf.QFTConfig())
        optimizer = optimizer_class(model.parameters(), 1e-2, weight_decay=0.1, gradient=gradient)
        ids = torch.arange(24).view(2, 12)
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        tensors.append(model.state_dict())

    assert all(torch.equal(tensors[0][name], tensor) for name, tensor in tensors[1].items())
    fresh = qft_hf.quantize_model_(tiny_llama(), qft_hf.QFTConfig()).state_dict()
    assert any(not torch.equal(fresh[name], tensor) for name, tensor in tensors[1].items())


@pytest.mark.parametrize("page", DOCS)
def test_every_file_it_names_is_there(page):
    named = set(re.findall(r"\b(?:scripts|configs|tests|qft_hf|docs)/[\w/.-]*\w", DOCS[page]))
    named -= {"tests/kernels/test_"}  # followed by <name>, to be filled in
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", DOCS)
def test_its_links_lead_somewhere(page):
    folder = ROOT if (ROOT / page).exists() else ROOT / "docs"
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", DOCS[page])
    for target, anchor in links:
        path = folder / target if target else folder / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), (target, anchor)


def test_the_readme_is_short_and_links_every_page():
    assert len(README.splitlines()) < 150
    assert [page for page in DOCS if page != "README.md" and f"{page})" not in README] == []


def test_every_optimizer_option_is_described():
    text = DOCS["modes.md"]
    rows = text[text.index("| `optim_args` |") :]
    options = {option for entry in OPTIMIZERS.values() for option in entry.options}
    assert [name for name in sorted(options) if f"`{name}" not in rows] == []


@pytest.mark.parametrize("page", DOCS)
def test_every_option_of_a_script_that_it_shows_exists(page):
    for line in commands(DOCS[page]):
        if found := re.search(r"scripts/(?:\w+/)?(\w+)\.py(?= |$)(.*)", line):
            name, rest = found.groups()
            if name in COMMANDS:
                flags = set(re.findall(r"--[\w-]+", rest)) - {"--help"}
                known = set(re.findall(r"--[\w-]+", help_of(name)))
                if name in ("demo", "quality"):  # which pass flags on
                    known |= set(re.findall(r"--[\w-]+", help_of("finetune")))
                assert sorted(flags - known) == [], line


def test_it_names_the_oldest_python_that_is_supported():
    assert "Python 3.11 or newer" in README
    assert sys.version_info >= (3, 11)


def test_the_citation_names_the_method_and_its_authors():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == qft_hf.__version__
    sources = {
        entry["identifiers"][0]["value"]: entry["authors"][0]["family-names"]
        for entry in citation["references"]
    }
    assert sources == {
        "arXiv:2310.07147": "Li",
        "arXiv:2302.06675": "Chen",
        "arXiv:2306.09782": "Lv",
    }
