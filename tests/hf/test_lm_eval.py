"""The lm_eval command in docs/other-tools.md runs on a task of three rows."""

import json
import re
import shlex
from pathlib import Path

import pytest

from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import quantize_model_
from tests.finetune.chats import tiny_tokenizer
from tests.fresh import try_fresh
from tests.models import tiny_llama

ROWS = [
    {"question": "How are you", "answers": [" fine", " dog"], "right": 0},
    {"question": "The quick brown", "answers": [" today", " fox"], "right": 1},
    {"question": "what is the", "answers": [" answer", " lazy"], "right": 0},
]
TASK = """
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {rows}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: answers
doc_to_target: right
metric_list:
  - metric: acc
"""


def documented_command():
    text = (Path(__file__).parents[2] / "docs/other-tools.md").read_text()
    (command,) = re.findall(r"^python -c .*cli_evaluate.*(?:\n  .*)*", text, flags=re.MULTILINE)
    return shlex.split(command.replace("\\\n", ""))


@pytest.mark.slow
def test_the_documented_command_evaluates_an_int8_folder(tmp_path):
    tokenizer = tiny_tokenizer()
    quantize_model_(tiny_llama(vocab_size=len(tokenizer)), QFTConfig()).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(rows=rows))
    command = documented_command()
    assert command[0] == "python"
    changes = {"runs/demo": str(tmp_path), "hellaswag": "tiny"}
    command = [
        re.sub("|".join(changes), lambda found: changes[found.group()], part)
        for part in command[1:]
    ]

    option, program, *words = command
    assert option == "-c"
    words += ["--include_path", tmp_path, "--device", "cpu", "--output_path", tmp_path / "out"]
    result = try_fresh(program, *words, folder=tmp_path)

    assert result.returncode == 0, result.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(report.read_text())["results"]["tiny"]["acc,none"]
    assert accuracy in {0, 1 / 3, 2 / 3, 1}
    assert "Unknown quantization type" not in result.stderr
