"""All commands on a tiny model, one after the other, from a folder of the user's own."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BlipConfig,
    BloomConfig,
    BloomForCausalLM,
    DbrxConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma4TextConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
)

from qft_hf import QFTTrainer
from qft_hf_cli import main
from tests.finetune.chats import chat, tiny_tokenizer
from tests.fresh import run_fresh
from tests.hf.checkpoints import edit_config
from tests.models import tiny_llama

CONFIG = """\
model_name_or_path: base
train_data: train.jsonl
eval_data: eval.jsonl
max_length: 48
output_dir: runs/first
max_steps: 6
per_device_train_batch_size: 2
learning_rate: 1e-3
save_strategy: no
use_cpu: true
disable_tqdm: true
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current folder, with a model, chats and a config."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(vocab_size=320, tied=True).save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    for name, count in (("train", 9), ("eval", 3)):
        rows = [{"messages": chat("how are you?", "fine, " * n)} for n in range(1, count + 1)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("my.yaml").write_text(CONFIG)
    return tmp_path


def test_from_plan_to_a_model_without_qft_hf(home, capsys, result_of):
    (plan,) = result_of("plan", "my.yaml", "--gpu", "24")
    assert plan["cards"][0]["fits"] is True

    before = sorted(path.name for path in home.iterdir())
    found = result_of("check", "my.yaml")
    assert sorted(path.name for path in home.iterdir()) == before  # it writes nothing
    assert found["paths"]["train_data"] == str(home / "train.jsonl")
    assert found["output_dir"] == str(home / "runs" / "first")
    assert found["parameters"] == plan["parameters"]
    assert found["train_data"]["rows"] == 9
    assert (found["steps"], found["steps_per_epoch"]) == (6, 5)
    # The end of the turn is learned, and nothing before the answer.
    assert found["example"].count("\u27e6") == 1
    assert found["example"].endswith("\u27e6fine, <|im_end|>\u27e7\n")
    assert found["total_bytes"] == plan["ways"][0]["total_bytes"]

    summary = result_of("finetune", "my.yaml")
    assert summary["steps"] == 6
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert summary["train_data"] == found["train_data"]

    scores = result_of("evaluate", "runs/first")["scores"]
    assert scores == summary["after"]
    assert result_of("evaluate", "my.yaml")["scores"]["loss"] == pytest.approx(
        summary["before"]["loss"], rel=0.01
    )  # scores of the float model, which was not rounded

    main(["report", "runs/first"])
    page = Path("report.html").read_text()
    assert f"{summary['before']['loss']:.4g} → {summary['after']['loss']:.4g}" in page
    assert "model.layers.1" in page

    main(["export", "runs/first", "plain", "--dtype", "float32"])
    flags = ["--eval_data=eval.jsonl", "--max_length=48", "--use_cpu", "--disable_tqdm=true"]
    plain = result_of("evaluate", "plain", *flags)["scores"]
    assert plain["loss"] == pytest.approx(scores["loss"], rel=1e-5)

    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M\n"
        "ids = torch.arange(20)[None]\n"
        "torch.save(M.from_pretrained('plain')(ids).logits, 'logits.pt')\n"
        "assert 'qft_hf' not in sys.modules"
    )
    run_fresh(program, folder=home)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained("runs/first")(torch.arange(20)[None]).logits
    torch.testing.assert_close(torch.load("logits.pt"), logits, rtol=1e-4, atol=1e-4)

    capsys.readouterr()
    main(["chat", "runs/first", "--prompt", "how are you?", "--max_new_tokens", "5"])
    printed = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained("runs/first")
    assert 0 < len(tokenizer(printed).input_ids) <= 12


def test_five_ways_to_write_the_same_chats_are_checked_to_the_same(home, result_of):
    asked = [(f"how are you, {n}?", f"fine, {n}") for n in range(4)]
    dialogues = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in asked]
    files = {
        "messages.jsonl": [{"messages": chat(*pair)} for pair in asked],
        "sharegpt.jsonl": [{"conversations": turns} for turns in dialogues],
        "completion.jsonl": [{"prompt": q, "completion": a} for q, a in asked],
        "alpaca.csv": "instruction,input,output\n" + "".join(f'"{q}",,"{a}"\n' for q, a in asked),
        "asked.tsv": "question\tanswer\n" + "".join(f"{q}\t{a}\n" for q, a in asked),
    }
    found = []
    for name, rows in files.items():
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        Path(name).write_text(text)
        result = result_of("check", "my.yaml", "--train_data", name)
        found.append((result["example"], result["train_data"], result["total_bytes"]))
    assert found[0][0].endswith("\u27e6fine, 0<|im_end|>\u27e7\n")
    assert found[0][1]["examples"] == 4
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize(
    ("task", "name", "text", "example"),
    [
        ("text", "plain.txt", "one line\nand another\n", "o\u27e6ne line<|im_end|>\u27e7"),
        ("classification", "c.csv", "text,label\nhi,greets\nwhy,asks\n", "hi\n\u27e6greets\u27e7"),
        (
            "multi_label",
            "m.csv",
            'text,label\nhi?,"greets, asks"\nwhy,asks\n',
            "hi?\n\u27e6asks, greets\u27e7",
        ),
        ("regression", "r.tsv", "text\tlabel\nhi\t0.5\nwhy\t2\n", "hi\n\u27e60.5\u27e7"),
    ],
)
def test_other_tasks_are_checked_from_files(task, name, text, example, home, result_of):
    Path(name).write_text(text)
    flags = [f"--task={task}", "--train_data", name, "--eval_data", name]
    result = result_of("check", "my.yaml", *flags)
    assert result["example"].strip() == example
    assert result["train_data"]["examples"] == 2


def test_what_a_run_refuses_check_refuses(home, refused):
    for flags, text in {
        ("--max_length=65",): "the model has 64 positions",
        ("--output_dir=base",): "output_dir is the folder of model_name_or_path itself",
        ("--train_data=nowhere.jsonl",): "nowhere.jsonl",
        ("--eval_strategy=steps", "--eval_data", "none.jsonl"): "none.jsonl",
        ("--lr=1",): "Here it is called 'learning_rate'",
        ("--model_name_or_path=no/such-model",): "No model 'no/such-model': neither a folder",
        ("--model_name_or_path=/no/such/folder",): "No model '/no/such/folder': neither a folder",
        ("--tokenizer_name_or_path=no/such-model",): "No model 'no/such-model': neither a folder",
        ("--model_name_or_path=data/absent",): "read the folder data, which `python scripts/fetch",
    }.items():
        assert text in refused("check", "my.yaml", *flags)


def test_check_refuses_a_loss_that_the_model_has_not_before_it_is_loaded(home, capsys, refused):
    """Only a Trainer or its first step once refused it, after everything was loaded and scored."""
    main(["check", "my.yaml", "--chunked_loss"])
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    config = Gemma2Config(vocab_size=320, intermediate_size=40, num_key_value_heads=1, **sizes)
    Gemma2ForCausalLM(config).save_pretrained("base")
    main(["check", "my.yaml"])
    capsys.readouterr()
    for flags in (["--chunked_loss"], ["--use_liger_kernel"]):
        said = refused("check", "my.yaml", *flags)
        assert "Gemma2ForCausalLM scales or caps its own" in said
        assert ("leaves out both" in said) is (flags == ["--use_liger_kernel"])


def test_check_refuses_a_model_of_another_quantization_before_it_is_loaded(home, refused):
    """Only the Trainer once refused it, after the data were read and the model was loaded."""
    gptq = {"quant_method": "gptq", "bits": 4}
    edit_config(home / "base", lambda config: config.update(quantization_config=gptq))
    assert "quantized with gptq. QFT starts from float weights" in refused("check", "my.yaml")


def test_check_asks_whether_packed_examples_stay_apart(home, capsys, refused):
    main(["check", "my.yaml", "--packing"])
    assert "in blocks; no example sees another" in capsys.readouterr().out

    BloomForCausalLM(
        BloomConfig(vocab_size=320, hidden_size=32, n_layer=3, n_head=4)
    ).save_pretrained("base")
    main(["check", "my.yaml"])
    assert "none: examples are padded" in capsys.readouterr().out
    assert "packing would let examples see each other: Bloom" in refused(
        "check", "my.yaml", "--packing"
    )


def test_a_model_that_is_not_there_is_refused_by_name(home, refused):
    QFTTrainer(model=AutoModelForCausalLM.from_pretrained("base")).save_model("int8")
    for words in (
        ["chat", "no/such-model", "--prompt", "hi"],
        ["inspect", "int8", "--original", "no/such-model"],
        ["plan", "no/such-model"],
    ):
        assert "No model 'no/such-model': neither a folder" in refused(*words)
    Path("base/tokenizer.json").unlink()
    assert "base cannot be loaded" in refused("check", "my.yaml")


def test_a_model_without_a_template_is_refused_for_chat(home, refused):
    tiny_tokenizer(chat_template=None).save_pretrained("base")
    (home / "base" / "chat_template.jinja").unlink(missing_ok=True)
    assert "has no chat template" in refused("chat", "base", "--prompt", "hi")


def test_a_classifier_is_refused_for_chat(home, refused):
    """The classifier's body would be loaded under an untrained head and would answer."""
    LlamaForSequenceClassification.from_pretrained("base").save_pretrained("labels")
    tiny_tokenizer().save_pretrained("labels")
    assert "labels is a LlamaForSequenceClassification: it labels texts" in refused(
        "chat", "labels", "--prompt", "hi"
    )


COMMANDS = [
    ["plan", "base"],
    ["plan", "my.yaml"],
    ["check", "my.yaml"],
    ["finetune", "my.yaml"],
    ["evaluate", "my.yaml"],
    ["chat", "base", "--prompt", "hi"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_an_encoder_is_refused_before_the_data_are_read(command, home, refused):
    """RoBERTa was tuned on answers that it saw, and its loss fell to nearly zero."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=320, intermediate_size=40, pad_token_id=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained("base")
    for name in ("train", "eval"):
        Path(f"{name}.jsonl").write_text("no JSON\n")
    assert "the model of RobertaConfig is an encoder: each token" in refused(*command)
    assert not Path("runs").exists()


def test_an_encoder_classifies(home, capsys):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=320, intermediate_size=40, pad_token_id=1, **sizes)
    RobertaForMaskedLM(config).save_pretrained("base")
    Path("train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n')
    main(["check", "my.yaml", "--task=classification", "--eval_data=train.jsonl"])
    assert "RobertaForSequenceClassification" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "finetune"])
def test_a_model_that_needs_images_is_refused_before_the_data_are_read(command, home, refused):
    """It was loaded, and its first step ended in a TypeError."""
    BlipConfig().save_pretrained("base")
    Path("train.jsonl").write_text("no JSON\n")
    assert "BlipForConditionalGeneration needs an image with each" in refused(command, "my.yaml")
    assert not Path("runs").exists()


def test_a_configuration_that_cannot_be_built_is_named(home, refused):
    """It was a traceback of transformers."""
    DbrxConfig().save_pretrained("base")
    said = refused("plan", "base")
    assert "transformers cannot build the model of DbrxConfig: AttributeError" in said


def test_layers_of_many_sizes_are_checked_and_planned(home, result_of):
    """Gemma 4 was refused by both, although it trains."""
    config = Gemma4TextConfig(
        vocab_size=320, vocab_size_per_layer_input=320, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        global_head_dim=16, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"], max_position_embeddings=64,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained("base")
    found = result_of("check", "my.yaml")
    (planned,) = result_of("plan", "my.yaml")
    assert found["total_bytes"] == planned["ways"][0]["total_bytes"]
    assert {card["longest_sequence"] for card in planned["cards"]} == {64}
