"""The README is run: its Python, its paths and its options."""

import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

import qft_hf
from qft_hf.hf.optimizers import OPTIMIZERS
from tests.hf.test_trainer import sequences
from tests.models import tiny_llama

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_the_python_blocks_run_in_order_on_a_small_model(tmp_path, monkeypatch):
    model = tmp_path / "model"
    tiny_llama(tied=True).save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    names = {"dataset": sequences()}
    for number, block in enumerate(blocks("python")):
        here = block.replace(MODEL, str(model))
        if not torch.cuda.is_available():  # transformers wants to be told
            here = here.replace("bf16=True", "bf16=True, use_cpu=True")
        exec(compile(here, f"README block {number}", "exec"), names)

    assert MODEL in README
    assert names["qft_hf"] is qft_hf
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "bf16")
    assert type(plain.lm_head).__name__ == "Linear"


def test_every_file_it_names_is_there():
    named = set(re.findall(r"\b(?:scripts|configs|tests|qft_hf)/[\w/.-]*\w", README))
    assert len(named) > 5
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_optimizer_option_is_described():
    rows = README[README.index("| `optim_args` |") :]
    options = {option for entry in OPTIMIZERS.values() for option in entry.options}
    assert [name for name in sorted(options) if f"`{name}" not in rows] == []


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.stem)
def test_every_option_of_a_script_that_it_shows_exists(script):
    """By the source: importing all scripts for their --help would take a minute."""
    text = script.read_text()
    for block in blocks("sh"):
        for line in block.splitlines():
            if f"scripts/{script.name}" not in line or script.stem == "finetune":
                continue  # the flags of finetune are fields of dataclasses, tested with the configs
            flags = re.findall(r"--[\w-]+", line.split("#")[0].partition(script.name)[2])
            assert [flag for flag in flags if flag != "--help" and f'"{flag}"' not in text] == []


def test_it_names_the_oldest_python_that_is_supported():
    assert "Python 3.11 or newer" in README
    assert sys.version_info >= (3, 11)
