"""Checks of the user documentation: quickstart commands, quoted error messages, memory figures."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qft_hf import QSTConfig, estimate_memory, estimate_side_memory, recommend
from qft_hf.hf import shipped
from qft_hf.hf.estimate import skeleton
from qft_hf.hf.health import Health
from qft_hf.hf.positions import n_positions
from qft_hf.hf.recommendation import USABLE
from qft_hf_cli import main
from tests.finetune.chats import tiny_tokenizer
from tests.models import tiny_llama
from tests.test_readme import DOCS, MODEL, ROOT, blocks

QUICKSTART = DOCS["quickstart.md"]
NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text())
TRAINING = ("check", "finetune", "evaluate")


def test_the_quickstart_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_llama(vocab_size=320, tied=True).save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    (config,) = blocks(QUICKSTART, "yaml")
    (chats,) = blocks(QUICKSTART, "json")
    assert MODEL in config
    Path("my.yaml").write_text(config.replace(MODEL, "model") + "use_cpu: true\n")
    Path("chats.jsonl").write_text(chats)

    ran = []
    for line in "".join(blocks(QUICKSTART, "sh")).splitlines():
        program, name, *flags = shlex.split(line, comments=True)
        assert program == "qft-hf"
        if name == "chat":
            flags += ["--max_new_tokens", "3"]
        capsys.readouterr()
        main([name, *flags])
        ran.append((name, capsys.readouterr().out))

    outputs = {name: out for name, out in ran}
    assert len(outputs) == 9  # every command
    assert "best on 24 GB" in outputs["plan"]
    assert "⟦" in outputs["check"]
    for name in ("run.yaml", "summary.json", "loss_curve.png", "README.md", "model.safetensors"):
        assert f"`{name}`" in QUICKSTART or name == "model.safetensors"
        assert (tmp_path / "runs" / "second" / name).is_file()
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "plain" / "config.json").is_file()


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """Run its cells in order, on a tiny model saved under the name of the real one."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(vocab_size=320, tied=True).save_pretrained(MODEL)
    tiny_tokenizer().save_pretrained(MODEL)
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]

    names = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)

    assert f'MODEL = "{MODEL}"' in "".join(cells[0]["source"])
    assert names["summary"].steps == 12
    printed = capsys.readouterr().out
    assert printed.count("⟦I am Pebble, and I fit into eight bits.<|im_end|>⟧") == 1
    assert "pebble-bf16: 0 MB" in printed
    plain = AutoModelForCausalLM.from_pretrained("pebble-bf16")
    assert type(plain.lm_head) is torch.nn.Linear


def test_the_notebook_is_saved_as_it_ran_through():
    """It is small, has the real model's answers and names nothing of the machine it ran on."""
    cells = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = "".join(line for c in cells for out in c["outputs"] for line in out["text"])
    assert "134,515,008 parameters" in outputs
    assert "runs/pebble: I am Pebble, and I fit into eight bits." in outputs
    assert len(json.dumps(NOTEBOOK)) < 20_000
    assert not re.search(r"/(tmp|work|root)\b", outputs)


def test_the_quickstart_explains_every_figure_of_health():
    """Checks the figures of `Health.figures` and those that the Trainer adds."""
    source = ast.parse(Path(ROOT / "qft_hf" / "hf" / "health.py").read_text())
    (figures,) = [
        node
        for node in ast.walk(source)
        if isinstance(node, ast.FunctionDef) and node.name == Health.figures.__name__
    ]
    keys = {
        node.value
        for node in ast.walk(figures)
        if isinstance(node, ast.Constant) and re.fullmatch(r"[a-z]+(_[a-z]+)+", str(node.value))
    }
    assert len(keys) == 8
    shown = set(re.findall(r"`qft/(\w+)`", QUICKSTART))
    sizes = {"weights_gb", "gradients_gb", "momentum_gb", "peak_memory_gb"}
    assert shown == keys | sizes | {"skipped_steps"}


def texts() -> str:
    """Return all string literals of the package, with `*` for each placeholder."""
    found = []
    for folder in ("qft_hf", "qft_hf_cli"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else "*" for p in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def test_refusals_that_the_page_names_are_in_the_code():
    named = re.findall(r"^\| `([^`]+)` \|", DOCS["troubleshooting.md"], re.MULTILINE)
    assert len(named) >= 14
    written = texts()
    assert [text for text in named if text not in written] == []


ROW = r"^\| (\d+) GB \| (\S+) \| ([\d,]+) \| (stack|release) \| (true|false) \| ([\d.]+) GB \|$"


@pytest.mark.parametrize("row", re.findall(ROW, DOCS["recipes.md"], re.MULTILINE), ids=" ".join)
def test_a_recipe_is_what_qft_hf_recommends(row):
    """Some recipes once had sequences longer than their model takes, which a run refuses."""
    card, model, *others = row
    source = skeleton(shipped.architecture(model))
    longest = n_positions(source.config)
    found = recommend(source, float(card), longest, chunked_loss=True)
    assert found.fits
    assert others == [
        f"{longest:,}",
        found.gradient,
        str(found.gradient_checkpointing).lower(),
        f"{found.estimate.total_bytes / 1e9:.1f}",
    ]


def test_there_are_recipes_for_each_card():
    rows = re.findall(ROW, DOCS["recipes.md"], re.MULTILINE)
    assert len(rows) >= 9
    assert {row[0] for row in rows} == {"24", "32", "48", "80", "96"}


def test_the_arithmetic_of_side_tuning_is_that_of_the_estimate():
    rows = re.findall(
        r"^\| (\d+) GB \| ([\w-]+) \| (\d+) \| ([\d,]+) \| ([\d.]+) GB \| ([\d.]+) GB \|$",
        DOCS["side-tuning.md"],
        re.MULTILINE,
    )
    assert len(rows) == 4
    for card, name, r, tokens, states, everything in rows:
        figures = estimate_side_memory(
            skeleton(shipped.architecture(name)),
            QSTConfig(r=int(r)),
            sequence_length=int(tokens.replace(",", "")),
        )
        assert f"{figures.state_bytes / 1e9:.1f}" == states
        assert f"{figures.total_bytes / 1e9:.1f}" == everything
        assert figures.total_bytes <= USABLE * float(card) * 1e9


GPUS = r"^\| (\S+) \| (\d) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$"


@pytest.mark.parametrize("row", re.findall(GPUS, DOCS["processes.md"], re.MULTILINE), ids=" ".join)
def test_what_each_gpu_holds_is_what_the_arithmetic_says(row):
    model, n, *figures = row
    source = skeleton(shipped.architecture(model))
    stack, release = (
        estimate_memory(source, gradient=gradient, n_processes=int(n), chunked_loss=True)
        for gradient in ("stack", "release")
    )
    found = [stack.total_bytes, release.total_bytes, stack.received_bytes]
    assert [f"{n_bytes / 1e9:.1f}" for n_bytes in found] == figures


def test_the_page_of_several_gpus_has_models_on_one_and_more():
    rows = re.findall(GPUS, DOCS["processes.md"], re.MULTILINE)
    assert {n for _, n, *_ in rows} == {"1", "2", "4", "8"}
    assert len(rows) == 16
    source, two = skeleton(shipped.architecture("llama-2-13b")), {"n_processes": 2}
    eight, four = (
        recommend(source, 24, chunked_loss=True, momentum_bits=bits, **two) for bits in (8, 4)
    )
    assert f"up to {eight.longest_sequence:,} tokens" in DOCS["processes.md"]
    assert f"up to its {four.longest_sequence:,} positions" in DOCS["processes.md"]


@pytest.mark.parametrize("package", ["kernels", "side", "optim", "hf"])
def test_the_map_of_a_package_has_every_file(package):
    page = DOCS["architecture.md"]
    section = page.partition(f"## Inside `{package}/`")[2].partition("\n## ")[0]
    files = {path.name for path in (ROOT / "qft_hf" / package).glob("*.py")} - {"__init__.py"}
    assert files - set(re.findall(r"`(\w+\.py)`", section)) == set()


def test_the_number_of_families_is_that_of_their_page():
    n = len(re.findall(r"^\| .* \| yes \|", DOCS["families.md"], re.MULTILINE))
    assert n >= 50
    assert f"[{n} families](families.md)" in DOCS["modes.md"]
