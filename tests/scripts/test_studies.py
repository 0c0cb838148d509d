"""The studies run at toy size, where their figures mean nothing."""

import json
from types import SimpleNamespace

import pytest
from transformers import BertConfig, BertModel

from qft_hf import kernels
from tests.finetune.chats import chat, tiny_tokenizer
from tests.models import tiny_llama
from tests.scripts.commands import load


def test_every_way_of_the_study_is_tuned(run):
    quantize_gradient = kernels.quantize_gradient

    figures, text = run(
        "int8_products", "--seeds", "0", "--steps", "2", "--pretraining_steps", "1",
        "--hidden", "32", "--held_out", "8",
    )  # fmt: skip

    losses = {run["way"]: run["loss"] for run in figures["runs"]}
    assert len(losses) == 10
    # All ways differ in their arithmetic, and all learn nearly the same in two steps.
    assert len(set(losses.values())) == 10
    assert max(losses.values()) < figures["loss_before"]
    assert "| FP32 Lion | " in text
    assert kernels.quantize_gradient is quantize_gradient  # the ablation is undone


def test_the_study_of_momentum_runs_every_kind(run):
    figures, text = run(
        "momentum_bits", "--seeds", "0", "--steps", "2", "--pretraining_steps", "2",
        "--hidden", "32", "--layers", "1", "--learning_rate", "1e-3", "--held_out", "8",
        "--variants",
    )  # fmt: skip

    ways = [run["way"] for run in figures["runs"]]
    assert ways[:5] == ["float", "8 bits", "4 bits", "float SGD", "0 bits (SGD)"]
    assert len({run["reduction"] for run in figures["runs"][:5]}) == 5  # each is another optimizer
    errors = {run["way"]: run["error"] for run in figures["runs"][5:]}
    assert [*errors] == [*load("momentum_bits").VARIANTS]
    assert all(0 < error < 1 for error in errors.values())
    assert "| float | 0.001 | 100.0 % |" in text
    assert all(f"| {way} |" in text for way in ways)


def test_the_study_of_adamw_runs_every_kind(run):
    figures, text = run(
        "adamw_moments", "--seeds", "0", "--steps", "2", "--pretraining_steps", "1",
        "--hidden", "32", "--layers", "1", "--learning_rate", "1e-3",
        "--adamw_learning_rate", "1e-3", "2e-3",
    )  # fmt: skip

    reductions = {(row["way"], row["lr"]): row["reduction"] for row in figures["runs"]}
    assert len(set(reductions.values())) == len(reductions) == 2 * 3
    assert "| QFTAdamW | 0.002 | " in text


def test_the_study_of_routers_tunes_every_way(run):
    figures, text = run(
        "routers", "--seeds", "0", "--steps", "3", "--pretraining_steps", "1", "--layers", "1"
    )

    reductions = {run["way"]: run["reduction"] for run in figures["runs"]}
    assert len(set(reductions.values())) == len(reductions) == 3  # each is another model
    assert "| QFT, INT8 routers | " in text


@pytest.fixture
def questions(tmp_path):
    """A tiny encoder, and questions whose first word determines the answer."""
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=48, **sizes)
    BertModel(config).save_pretrained(tmp_path / "minilm")
    tokenizer.save_pretrained(tmp_path / "minilm")
    (tmp_path / "boolq").mkdir()
    for name, n_rows in (("train", 24), ("eval", 10)):
        rows = [
            {
                "question": "is it so?" if n % 5 else "why?",
                "passage": "a dog",
                "label": str(n % 5 > 0),
            }
            for n in range(n_rows)
        ]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / "boolq" / f"{name}.jsonl").write_text(lines)
    return tmp_path


def test_the_study_of_quality_tunes_every_way_and_goes_on_where_it_stopped(run, questions):
    flags = [
        "quality", "boolq_minilm", "--data", str(questions), "--use_cpu", "--max_steps=3",
        "--max_length=32",
        "--adamw_learning_rate", "1e-2", "1e-9", "--learning_rate", "1e-2",
        "--lora_learning_rate", "1e-2",
    ]  # fmt: skip
    first, text = run(*flags, "--seeds", "0")

    n_runs = 3 * 2 + 5  # the AdamW ways have two rates
    assert len(first["runs"]) == n_runs
    assert len({run["loss"] for run in first["runs"]}) == n_runs - 1
    found = {run["way"]: run for run in first["runs"]}
    assert found["QFT, release"]["loss"] == found["QFT"]["loss"]  # the same bits
    states = [found[way]["state_bytes"] for way in ("FP32 AdamW", "FP32 Lion", "QFT")]
    assert states[0] > states[1] > 2 * states[2] > 2 * found["QFT, release"]["state_bytes"] > 0
    assert {run["majority"] for run in first["runs"]} == {0.8}
    assert "80.0 % of 10 held-out questions" in text

    second, text = run(*flags, "--seeds", "0", "3")

    assert second["runs"][:n_runs] == first["runs"]  # with their times, so they are not done again
    new = second["runs"][n_runs:]
    searched = [way for way in found if way != "QFT, release"]  # which has the bits of QFT
    assert [(run["way"], run["seed"]) for run in new] == [(way, 3) for way in searched]
    assert new[0]["rate"] == 1e-2  # which ends lower than 1e-9
    accuracies = [
        [100 * run["accuracy"] for run in second["runs"] if (run["way"], run["rate"]) == tuned]
        for tuned in (("QFT", 1e-2), ("FP32 AdamW", 1e-2))
    ]
    of_qft, of_adamw = accuracies
    pairs = [a - b for a, b in zip(*accuracies, strict=True)]
    shown = [f"{sum(v) / 2:.1f} +- {abs(v[0] - v[1]) / 2:.1f}" for v in (of_qft, pairs, of_adamw)]
    assert f"| QFT | 0.01 | 2 | {shown[0]} % | {shown[1]} |" in text
    assert f"| FP32 AdamW | 0.01 | 2 | {shown[2]} % |  |" in text


def test_the_study_of_quality_compares_losses_on_dialogues(run, tmp_path):
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "smollm2")
    tokenizer.save_pretrained(tmp_path / "smollm2")
    (tmp_path / "chitchat").mkdir()
    for name, n_rows in (("train", 24), ("eval", 3)):
        rows = [{"messages": chat(f"How are you, {n}?", "I am fine.")} for n in range(n_rows)]
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / "chitchat" / f"{name}.jsonl").write_text(lines)

    figures, text = run(
        "quality", "demo", "--data", str(tmp_path), "--max_steps=2", "--max_length=48", "--use_cpu",
        "--learning_rate", "1e-3", "--adamw_learning_rate", "1e-2", "--lora_learning_rate", "1e-1",
        "--seeds", "1", "4", "--only", "FP32", "LoRA", "QFT, INT8",
    )  # fmt: skip

    adamw, lion, int8 = (
        [run for run in figures["runs"] if run["way"] == way]
        for way in ("FP32 AdamW", "FP32 Lion", "QFT, INT8 products")
    )
    assert all(run["loss"] < run["loss_before"] for run in figures["runs"])
    assert len({run["loss"] for run in figures["runs"]}) == 8
    assert adamw[0]["loss_before"] == lion[0]["loss_before"] != int8[0]["loss_before"]
    assert f"on 3 held-out rows: FP32 AdamW {adamw[0]['loss_before']:.4f}, FP32 Lion " in text
    losses, pairs = zip(
        *((run["loss"], run["loss"] - same["loss"]) for run, same in zip(int8, adamw, strict=True)),
        strict=True,
    )
    shown = [f"{sum(v) / 2:.4f} +- {abs(v[0] - v[1]) / 2:.4f}" for v in (losses, pairs)]
    assert f"| QFT, INT8 products | 0.001 | 2 | {shown[0]} | {shown[1]} |" in text


def test_the_study_of_side_tuning_measures_every_way_on_the_same_batch(questions, tmp_path):
    script = load("side_tuning")
    # On a CPU bitsandbytes needs rows in multiples of 32 and columns in multiples of 64.
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(
        BertConfig(vocab_size=len(tiny_tokenizer()), intermediate_size=128, **sizes)
    ).save_pretrained(tmp_path / "minilm")
    flags = {
        **script.TASKS["boolq-minilm"].flags,
        "model_name_or_path": tmp_path / "minilm",
        "train_data": tmp_path / "boolq" / "train.jsonl",
        "eval_data": tmp_path / "boolq" / "eval.jsonl",
    }
    rates = {"full": (1e-4,), "lora": (1e-3,), "side": (1e-2, 1e-9)}
    task = script.Task(flags, steps=2, batch_size=4, score="accuracy", rates=rates)
    bench = script.Bench(task)

    figures = script.measured(bench, script.WAYS)
    build = script.WAYS["QST, INT8 base"].build
    scores = {
        (rate, seed): script.trained(bench, build, seed, rate, lambda text: None)
        for rate, seed in ((1e-2, 1), (1e-9, 1), (1e-2, 2))
    }

    assert len(figures) == 9
    for base, other in (("NF4", "QLoRA"), ("INT8", "LoRA on INT8")):
        side = figures[f"QST, {base} base"]
        assert side["kept_bytes"] < figures[other]["kept_bytes"]
        assert side["trained"] < figures[other]["trained"] < figures["full QFT"]["trained"]
    assert figures["QST, NF4 base"]["ledger_bytes"] < figures["QST, float base"]["ledger_bytes"]
    means = figures["QST, float base, mean"]
    assert means["kept_bytes"] < figures["QST, float base"]["kept_bytes"]
    assert scores[1e-2, 1]["loss"] < scores[1e-9, 1]["loss"]
    done = [{"task": "boolq-minilm", "measured": figures}]
    for (rate, seed), found in scores.items():
        key = {"task": "boolq-minilm", "way": "QST, INT8 base", "rate": rate, "seed": seed}
        done.append(key | {"scores": found})
    mean = (scores[1e-2, 1]["loss"] + scores[1e-2, 2]["loss"]) / 2
    assert f"| QST, INT8 base | 0.01000 | 2 | {mean:.4f} +- " in script.tables(done, 1)


def test_the_study_of_side_tuning_goes_on_where_it_stopped(run, monkeypatch):
    """Of a second part with `--only`, the ways were trained, but not measured and not shown."""
    script = load("side_tuning")
    rates = {"full": (), "lora": (1e-3, 1e-2), "side": (1e-2,)}
    task = script.Task({}, steps=1, batch_size=1, score="accuracy", rates=rates)
    bytes_and_times = {"trained": 10, "kept_bytes": 1, "ledger_bytes": 1, "cpu_seconds": 1.0}
    calls = []

    def trained(bench, build, seed, rate, say):
        calls.append((seed, rate))
        return {"loss": 1 - rate + seed / 10, "accuracy": 0.5}

    monkeypatch.setattr(script, "TASKS", {"toy": task})
    monkeypatch.setattr(script, "Bench", lambda task: SimpleNamespace(task=task))
    monkeypatch.setattr(script, "trained", trained)
    monkeypatch.setattr(script, "measured", lambda _, ways: dict.fromkeys(ways, bytes_and_times))
    run("side_tuning", "--only", "QLoRA", "--seeds", "1")
    assert calls == [(1, 1e-3), (1, 1e-2)]

    figures, text = run("side_tuning", "--only", "QLoRA", "toy/QST, INT8", "--seeds", "1", "2")

    assert calls[2:] == [(1, 1e-2), (2, 1e-2), (2, 1e-2)]  # first of the side network
    assert [[*run.get("measured", ())] for run in figures["runs"]] == [
        ["QLoRA"], [], [], ["QST, INT8 base"], [], [], [],
    ]  # fmt: skip
    for way in ("QLoRA", "QST, INT8 base"):
        assert f"| {way} | 0.01000 | 2 | 1.1400 +- 0.0707 | 0.5000 +- 0.0000 | 10 |" in text
