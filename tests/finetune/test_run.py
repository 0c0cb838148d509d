"""Whole runs of tiny models, from arguments to the contents of the output folder."""

import errno
import fcntl
import http.server
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GraniteConfig,
    MambaConfig,
    MambaForCausalLM,
    TrainerCallback,
    ViTConfig,
    trainer,
)
from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from qft_hf import QFTConfig, QFTWeight, estimate_memory, quantize_model_
from qft_hf.hf.finetune import finetune, parse_arguments, prepare, train
from qft_hf.hf.finetune.check import check
from qft_hf.hf.finetune.evaluate import evaluate_checkpoint
from qft_hf.hf.finetune.forecast import disk_bytes
from qft_hf.hf.finetune.loading import load_config, load_tokenizer
from qft_hf.hf.finetune.output_folder import sole_run
from qft_hf.hf.finetune.preparation import read
from qft_hf_cli import main
from qft_hf_cli.evaluate import flags_of
from tests.finetune.chats import CHATML, CHATML_MARKED, CHATS, END, TURN, chat, tiny_tokenizer
from tests.finetune.flags import as_flags, leave_run, parsed, write_jsonl
from tests.hf.test_checkpoint import Refuses
from tests.models import tiny_bert, tiny_llama

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 320  # of the tiny tokenizer
INT8 = {"matmul": "int8"}
SAVES = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def chat_flags(tmp_path):
    """Flags of a run of four steps on a few conversations."""
    tiny_llama(vocab_size=VOCAB_SIZE, tied=True).save_pretrained(tmp_path / "model")
    flags = leave_run(tmp_path)
    write_jsonl(flags["eval_data"], [{"messages": m} for m in CHATS.values()])
    return flags


def scored(*flags):
    """Return what `qft-hf evaluate` finds."""
    return evaluate_checkpoint(parse_arguments(flags_of([*map(str, flags)])))


class StopAt(TrainerCallback):
    """Ends training after some steps, as if the process had been stopped."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def contents(folder):
    return {
        path.relative_to(folder): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_run_leaves_checkpoint_curve_and_summary(chat_flags, capsys):
    summary = finetune(parsed(chat_flags, export_dtype="bfloat16"))

    run = chat_flags["output_dir"]
    assert (run / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    card = (run / "README.md").read_text()
    assert "tuned from a local model on the local file `train.jsonl`" in card
    for step, scores in ((0, summary.before), (4, summary.after)):
        assert f"| {step} | {scores['loss']:.4f} | {scores['perplexity']:.4f} |" in card
    shown = (run / "data.txt").read_text()
    assert shown in capsys.readouterr().err
    assert "8 rows, 8 examples" in shown
    assert (run / "data.txt").stat().st_mtime_ns < (run / "model.safetensors").stat().st_mtime_ns
    written = json.loads((run / "summary.json").read_text())
    assert written["steps"] == 4
    assert written["after"] == summary.after
    assert summary.before["loss"] != summary.after["loss"]
    assert summary.after["perplexity"] == pytest.approx(torch.tensor(summary.after["loss"]).exp())
    tokenizer = AutoTokenizer.from_pretrained(run)
    rows = [json.loads(line) for line in Path(chat_flags["train_data"]).read_text().splitlines()]
    lengths = [
        len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows
    ]
    assert len(lengths) == 4 * 2  # steps x batch size: each conversation is seen once
    assert summary.trained_tokens == sum(min(length, 48) for length in lengths)
    assert summary.tokens_per_second == summary.trained_tokens / summary.train_seconds
    assert set(summary.state_bytes) > {"INT8 weights", "gradients", "momentum"}
    assert 0 < summary.bytes_per_parameter < 16

    model = AutoModelForCausalLM.from_pretrained(run)
    assert isinstance(model.lm_head.weight, QFTWeight)
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    exported = AutoModelForCausalLM.from_pretrained(run / "bfloat16")
    assert not any(isinstance(p, QFTWeight) for p in exported.parameters())
    assert AutoTokenizer.from_pretrained(run / "bfloat16").chat_template


def test_scores_before_training_are_those_of_the_loaded_model(chat_flags):
    first = finetune(parsed(chat_flags))
    again = finetune(
        parsed(
            chat_flags,
            model_name_or_path=chat_flags["output_dir"],
            output_dir=f"{chat_flags['output_dir']}-2",
        )
    )

    # The model stays INT8, so nothing is rounded in between.
    assert again.before == first.after


def test_last_scores_are_of_the_final_weights_and_not_taken_twice(chat_flags):
    values = chat_flags | {"eval_strategy": "steps", "max_steps": 3}
    runs = {}
    for every in (2, 3):  # the Trainer evaluates before the last step, or after it
        run = prepare(
            parsed(values, eval_steps=every, output_dir=f"{chat_flags['output_dir']}-{every}")
        )
        runs[every] = train(run)
        steps = [entry["step"] for entry in run.trainer.state.log_history if "eval_loss" in entry]
        assert steps.count(3) == 1

    assert runs[2].after == runs[3].after


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("packing", ["true", "false"])
def test_every_token_counts_once_and_padding_does_not(packing, batch_size, chat_flags, tmp_path):
    """The last packed batch has padding and no mask, and the padding token also ends texts."""
    said = ["the quick brown fox " * (1 + n % 3) for n in range(26)]
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in said])
    values = chat_flags | {"train_data": texts, "task": "text", "packing": packing}
    del values["eval_data"]
    tokenizer = AutoTokenizer.from_pretrained(values["model_name_or_path"])
    tokenizer.model_input_names = ["input_ids"]  # as those of many models: batches have no mask
    tokenizer.save_pretrained(values["model_name_or_path"])
    assert tokenizer.pad_token == tokenizer.eos_token
    n_tokens = sum(len(tokenizer(text)["input_ids"]) + 1 for text in said)
    n_rows = -(-n_tokens // 48) if packing == "true" else len(said)
    assert n_tokens % 48 > 0
    assert n_rows % 3 != 1  # the shorter block is not alone in its batch

    run = prepare(
        parsed(
            values,
            num_train_epochs=2,
            max_steps=-1,
            per_device_train_batch_size=batch_size,
            train_sampling_strategy="sequential",
            include_num_input_tokens_seen="true",  # which is to count padding, too
        )
    )
    summary = train(run)

    assert summary.before is None
    assert summary.after is None
    assert summary.steps == 2 * -(-n_rows // batch_size)
    assert summary.trained_tokens == 2 * n_tokens
    logged = [
        entry["num_input_tokens_seen"]
        for entry in run.trainer.state.log_history
        if "num_input_tokens_seen" in entry
    ]
    assert logged[-1] == 2 * n_tokens
    assert "->" not in str(summary)


def test_packing_changes_no_score(chat_flags):
    """Every answer is scored as if alone, and the last of two blocks has padding."""
    chats = [chat("hi", said) for said in ("a", "b", "c", "d", "e")]
    write_jsonl(chat_flags["eval_data"], [{"messages": messages} for messages in chats])
    block = 3 * len(tiny_tokenizer().apply_chat_template(chats[0], return_dict=False))
    assert block <= 64

    scores = [
        prepare(parsed(chat_flags, packing=packing, max_length=block)).trainer.evaluate()
        for packing in ("true", "false")
    ]

    # The same products have other shapes, so FP32 sums have another order.
    assert scores[0]["eval_loss"] == pytest.approx(scores[1]["eval_loss"], rel=1e-5)


def test_packing_is_refused_where_documents_would_cross(chat_flags):
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": VOCAB_SIZE}
    BloomForCausalLM(BloomConfig(**sizes)).save_pretrained(chat_flags["model_name_or_path"])
    with pytest.raises(ValueError, match="BloomForCausalLM does not keep them apart"):
        prepare(parsed(chat_flags, packing="true"))


@pytest.mark.parametrize("tiny_model", [tiny_bert, tiny_llama], ids=["encoder", "decoder"])
def test_classification_run(tiny_model, tmp_path):
    """A decoder needs the padding token, also for the scores before training."""
    model = tiny_model(vocab_size=VOCAB_SIZE, pad_token_id=None)
    model.base_model.save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    rows = [
        {"text": text, "label": label}
        for text, label in [("the fox", "good"), ("the dog", "bad"), ("the answer", "so so")] * 4
    ]
    train_data = write_jsonl(tmp_path / "rows.jsonl", rows)

    summary = finetune(
        parsed(
            {
                "model_name_or_path": tmp_path / "encoder",
                "train_data": train_data,
                "eval_fraction": 0.5,
                "task": "classification",
                "max_length": 16,
                "output_dir": tmp_path / "run",
                "max_steps": 2,
                "save_strategy": "no",
                "use_cpu": "true",
                "disable_tqdm": "true",
            }
        )
    )

    assert set(summary.after) == {"loss", "accuracy"}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.id2label == {0: "bad", 1: "good", 2: "so so"}


def test_an_int8_model_gets_a_new_head_as_the_error_says(chat_flags, tmp_path):
    """The error once named functions of Python alone."""
    finetune(parsed(chat_flags))
    rows = [{"text": f"the fox {n}", "label": n % 2} for n in range(8)]
    data = {"train_data": write_jsonl(tmp_path / "rows.jsonl", rows), "task": "classification"}
    labeled = {**chat_flags, **data, "output_dir": tmp_path / "classifier"}
    del labeled["eval_data"]
    with pytest.raises(ValueError, match=r"new head, start from a float .* `qft-hf export`"):
        finetune(parsed(labeled, model_name_or_path=chat_flags["output_dir"]))

    main(["export", str(chat_flags["output_dir"]), str(tmp_path / "plain")])
    assert finetune(parsed(labeled, model_name_or_path=tmp_path / "plain")).steps == 4


@pytest.mark.parametrize(
    ("task", "labels", "scores"),
    [
        ("regression", [0.5, -1.25], {"loss", "rmse", "pearson"}),
        ("multi_label", [["a", "b"], ["c"]], {"loss", "accuracy", "exact_match"}),
    ],
)
def test_run_with_other_labels(task, labels, scores, chat_flags, tmp_path):
    tiny_bert(vocab_size=VOCAB_SIZE).base_model.save_pretrained(chat_flags["model_name_or_path"])
    rows = [{"text": f"the fox {n}", "label": labels[n % 2]} for n in range(8)]
    write_jsonl(chat_flags["train_data"], rows)
    write_jsonl(chat_flags["eval_data"], rows[:3])

    summary = finetune(parsed(chat_flags, task=task))

    assert set(summary.after) == scores
    assert summary.after["loss"] != summary.before["loss"]
    if task == "regression":
        # The Trainer's loss is the mean of its batches' means; here all rows are one batch.
        assert summary.after["loss"] == pytest.approx(summary.after["rmse"] ** 2, rel=1e-5)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert model.config.num_labels == {"regression": 1, "multi_label": 3}[task]


def test_resuming_ends_like_the_straight_run(chat_flags, tmp_path):
    values = chat_flags | SAVES
    straight = finetune(parsed(values, output_dir=tmp_path / "straight"))

    first = prepare(parsed(values, output_dir=tmp_path / "stopped"))
    first.trainer.add_callback(StopAt(2))
    first.trainer.train()
    resumed = finetune(
        parsed(values, output_dir=tmp_path / "stopped", resume_from_checkpoint="true")
    )

    assert resumed.after == straight.after
    assert resumed.before == straight.before
    assert resumed.steps == straight.steps == 4
    assert resumed.trained_tokens == straight.trained_tokens
    since = resumed.trained_tokens - first.trainer.state.num_input_tokens_seen
    assert resumed.tokens_per_second == since / resumed.train_seconds


def test_a_run_that_sigterm_stops_says_so_and_ends_like_the_straight_run(chat_flags, caplog):
    """It looked like a finished run of fewer steps."""
    straight = finetune(parsed(chat_flags, output_dir=f"{chat_flags['output_dir']}-straight"))
    assert "was stopped" not in caplog.text

    values = chat_flags | {"enable_jit_checkpoint": "true"}
    stopped = prepare(parsed(values))
    callbacks = stopped.trainer.callback_handler.callbacks
    manager = next(c for c in callbacks if isinstance(c, JITCheckpointCallback)).jit_manager
    manager.kill_wait = 0

    def terminate(model, *_):
        if model.training and not manager.is_checkpoint_requested:
            os.kill(os.getpid(), signal.SIGTERM)
            while not manager.is_checkpoint_requested:
                time.sleep(0.01)

    stopped.trainer.model.register_forward_hook(terminate)
    assert train(stopped).steps == 1
    assert "training was stopped at step 1 of 4; to go on" in caplog.text
    resumed = finetune(parsed(values, resume_from_checkpoint="true"))
    assert (resumed.steps, resumed.after) == (4, straight.after)


def test_a_finished_run_that_is_resumed_keeps_its_report(chat_flags, caplog):
    """The resumed run once took one more step and overwrote the summary with one of 0 tokens."""
    values = chat_flags | SAVES
    finetune(parsed(values))
    run = chat_flags["output_dir"]
    before = contents(run)

    again = finetune(parsed(values, resume_from_checkpoint="true"))

    assert again.steps == 4
    assert (again.trained_tokens > 0, again.train_seconds) == (True, 0)
    assert not {"speed", "model state"} & {line[:30].strip() for line in str(again).splitlines()}
    assert contents(run) == before
    assert "already holds the results of this finished run, which are kept" in caplog.text

    finetune(parsed(values, resume_from_checkpoint="true", export_dtype="bfloat16"))
    after = {path: at for path, at in contents(run).items() if path.parts[0] != "bfloat16"}
    for name in ("run.yaml", "README.md"):  # they say what was exported
        del after[Path(name)], before[Path(name)]
    assert after == before
    assert AutoModelForCausalLM.from_pretrained(run / "bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-3}, "was given, and the optimizer uses"),
        ({"weight_decay": 0.1, "max_length": 32}, "was given, and the optimizer uses"),
        ({"group_size": 16}, "checkpoint-4 is of another model, or in another format than the ru"),
        ({"optim": "qft_adamw"}, "state of parameter 0 must be a step and"),
    ],
)
def test_a_resume_that_is_refused_changes_nothing(changes, message, chat_flags):
    """`run.yaml` once had the refused settings, though steps had been trained with others."""
    values = chat_flags | SAVES | {"weight_decay": 0.01}
    finetune(parsed(values))
    run = chat_flags["output_dir"]
    before = contents(run)

    with pytest.raises(ValueError, match=message):
        finetune(parsed(values | changes, max_steps=6, resume_from_checkpoint="true"))

    assert contents(run) == before


@pytest.mark.parametrize("overwrites", [False, True])
def test_of_two_runs_that_begin_at_once_one_has_the_folder(overwrites, chat_flags):
    """Both runs once found the folder empty, and each overwrote what the other had written."""
    first, second = (prepare(parsed(chat_flags, overwrite_output=overwrites)) for _ in range(2))
    train(first)
    before = contents(chat_flags["output_dir"])
    if overwrites:
        train(second)  # as overwrite_output says
        return

    with pytest.raises(FileExistsError, match="already holds a run"):
        train(second)

    assert contents(chat_flags["output_dir"]) == before


@pytest.mark.parametrize("how", ["resume_from_checkpoint", "overwrite_output"])
def test_no_run_begins_in_the_folder_of_one_that_goes_on(how, chat_flags):
    """A second process that resumed the run once wrote into its folder at the same time."""
    flags = chat_flags | SAVES
    finetune(parsed(flags))
    run = flags["output_dir"]
    before = contents(run)
    arguments = parsed(flags, **{how: "true"}, max_steps=5)
    second = prepare(arguments)  # before the other process begins
    for begin in (lambda: finetune(arguments), lambda: train(second)):
        with (
            sole_run(run),
            pytest.raises(FileExistsError, match=f"another process is training in {run}"),
        ):
            begin()
    assert contents(run) == before
    assert train(second).steps == 5


@pytest.mark.parametrize("second", ["float16", None])
def test_an_export_from_before_a_resume_does_not_stay(second, chat_flags, caplog):
    """It kept the weights of the earlier step, and the folder could not be used again."""
    flags = chat_flags | SAVES
    run = flags["output_dir"]
    finetune(parsed(flags, export_dtype="bfloat16"))
    more = {"resume_from_checkpoint": "true"} | ({"export_dtype": second} if second else {})
    finetune(parsed(flags, max_steps=6, **more))
    assert not (run / "bfloat16").exists()
    assert "bfloat16, the export from before the run was resumed, is removed" in caplog.text
    assert second is None or (run / second / "model.safetensors").is_file()
    finetune(parsed(flags, max_steps=8, **more))
    finetune(parsed(flags, overwrite_output="true"))


@pytest.mark.parametrize("second", ["float16", None])
def test_the_export_of_a_finished_run_is_kept_if_no_other_is_asked_for(second, chat_flags):
    flags = chat_flags | SAVES
    run = flags["output_dir"]
    finetune(parsed(flags, export_dtype="bfloat16"))
    before = contents(run)
    again = {"resume_from_checkpoint": "true"} | ({"export_dtype": second} if second else {})
    finetune(parsed(flags, **again))
    if second is None:
        assert contents(run) == before
    else:
        assert not (run / "bfloat16").exists()
        assert f"An ordinary {second} checkpoint" in (run / "README.md").read_text()
    finetune(parsed(flags, overwrite_output="true"))


def test_a_run_goes_on_with_a_warning_where_folders_cannot_be_locked(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with sole_run(tmp_path):
        pass
    assert "cannot be locked ([Errno" in caplog.text
    assert "a second run in it would not be refused" in caplog.text


def test_the_lock_of_a_run_ends_with_it_though_others_have_copies(tmp_path):
    """Processes that load data inherit it, and may live on after an error."""
    with sole_run(tmp_path):
        child = os.fork()
        if child == 0:  # it has a copy of the descriptor
            time.sleep(60)
            os._exit(0)
    try:
        with sole_run(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("task", ["chat", "classification"])
def test_a_finished_run_is_scored_without_its_training_data(task, chat_flags, monkeypatch):
    """The training data once had to exist, and all of it was read and tokenized."""
    if task == "classification":
        tiny_bert(vocab_size=VOCAB_SIZE).base_model.save_pretrained(
            chat_flags["model_name_or_path"]
        )
        rows = [{"text": f"the fox {n}", "label": "abc"[n % 3]} for n in range(9)]
        write_jsonl(chat_flags["train_data"], rows)
        write_jsonl(chat_flags["eval_data"], rows[:2])  # of two of the classes
    smoothing = {"label_smoothing_factor": 0.2}  # which a classifier's loss on held-out data has
    flags = chat_flags | {"task": task, "train_weights": 2, "eval_split": "train[:2]"} | smoothing
    summary = finetune(parsed(flags))
    Path(chat_flags["train_data"]).unlink()
    monkeypatch.chdir(chat_flags["output_dir"])

    found = scored(chat_flags["output_dir"])

    assert found.scores == pytest.approx(summary.after, rel=1e-5)  # other batches
    assert found.data == summary.eval_data


@pytest.mark.parametrize("change", ["other template", "none is left"])
def test_a_run_is_scored_with_the_tokenizer_and_template_that_it_saved(change, chat_flags):
    """Those that its settings name were used, which may have changed, or be gone."""
    folder = Path(chat_flags["train_data"]).parent
    tiny_tokenizer(None).save_pretrained(folder / "tokenizer")
    (folder / "my.jinja").write_text(CHATML)
    given = {
        "tokenizer_name_or_path": folder / "tokenizer", "chat_template": folder / "my.jinja",
        "new_tokens": "<|new|>", "max_steps": 1,
    }  # fmt: skip
    summary = finetune(parsed(chat_flags, **given))
    if change == "other template":
        (folder / "my.jinja").write_text(CHATML.replace("'\n'", "'\n\n'"))
    else:
        (folder / "my.jinja").unlink()
        shutil.rmtree(folder / "tokenizer")

    run = chat_flags["output_dir"].as_posix()
    found = evaluate_checkpoint(parse_arguments(flags_of([run])))

    assert found.data == summary.eval_data
    assert found.scores == pytest.approx(summary.after, rel=1e-5)  # other batches
    (folder / "other.jinja").write_text(CHATML.replace("'\n'", "'\n\n'"))
    other = [run, f"--chat_template={folder / 'other.jinja'}"]  # asked for
    assert evaluate_checkpoint(parse_arguments(flags_of(other))).data.tokens > found.data.tokens


def test_a_model_of_no_run_is_scored_on_one_part_of_a_data_set(chat_flags, tmp_path):
    """Its configuration, and the limit of rows, were once those of training data, and missing."""
    data, lines = tmp_path / "data", Path(chat_flags["train_data"]).read_text().splitlines()
    data.mkdir()
    (data / "one.jsonl").write_text(f"{lines[0]}\n")
    (data / "two.jsonl").write_text("".join(f"{line}\n" for line in lines[1:5]))
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: first\n  data_files: one.jsonl\n"
        "- config_name: second\n  data_files: two.jsonl\n---\n"
    )
    found = scored(
        chat_flags["model_name_or_path"], f"--eval_data={data}", "--eval_config=second",
        "--eval_split=train[1:]", "--max_eval_rows=2", "--use_cpu", "--max_length=64",
    )  # fmt: skip

    assert found.data.rows == 2
    assert found.scores["loss"] > 0


@pytest.mark.parametrize("change", ["more rows", "other rows", "a limit", "other data", "none"])
def test_rows_that_a_run_has_learned_are_not_scored_as_held_out(change, chat_flags):
    """`eval_fraction` once drew other rows from data that had changed, without a word."""
    place = Path(chat_flags["train_data"])
    flags = {name: value for name, value in chat_flags.items() if name != "eval_data"}
    summary = finetune(parsed(flags, eval_fraction=0.5, max_steps=1))
    assert summary.eval_data.held_out is not None
    lines = place.read_text().splitlines(keepends=True)
    flags = [chat_flags["output_dir"]]
    if change == "more rows":
        place.write_text("".join([*lines, lines[0]]))
    elif change == "other rows":
        place.write_text("".join(reversed(lines)))
    elif change == "a limit":
        flags.append("--max_eval_rows=2")
    elif change == "other data":
        other = place.with_name("other.jsonl")
        other.write_text("".join(lines[:4]))
        flags.append(f"--train_data={other}")

    if change.endswith("rows"):
        counts = r"\(8 rows then, 9 now\)" if change == "more rows" else r"\(8 rows then, 8 now\)"
        with pytest.raises(ValueError, match=f"held out cannot be drawn again.*{counts}.*--eval_d"):
            scored(*flags)
        return
    found = scored(*flags)
    assert found.data.rows == (4 if change == "none" else 2)
    if change == "none":
        assert found.data == summary.eval_data
        place.touch()
        assert scored(*flags).scores == found.scores


@pytest.mark.parametrize("had_other_data", [True, False])
def test_a_run_that_has_learned_all_its_rows_holds_out_none_of_them(had_other_data, chat_flags):
    flags = dict(chat_flags)
    other = flags["eval_data"] if had_other_data else flags.pop("eval_data")
    finetune(parsed(flags, max_steps=1))
    run = flags["output_dir"]
    with pytest.raises(ValueError, match=r"learned all rows of its train_data.* --eval_data"):
        scored(run, "--eval_fraction=0.5")
    if not had_other_data:  # the advice once was to set eval_fraction
        with pytest.raises(
            ValueError, match=r"held out to evaluate on\. Name rows with --eval_data"
        ):
            scored(run)
    found = scored(run, f"--eval_data={other}")
    assert found.data.rows > 0
    assert scored(run, f"--train_data={other}", "--eval_fraction=0.5").data.rows > 0


@pytest.mark.parametrize(
    ("task", "metric", "greater"),
    [
        ("chat", "perplexity", False),
        ("chat", "eval_loss", False),
        ("regression", "rmse", False),
        ("regression", "pearson", True),
        ("classification", "accuracy", True),
    ],
)
def test_the_best_model_has_the_smallest_error(task, metric, greater, chat_flags):
    """The Trainer maximizes all scores but losses, so the worst perplexity was once the best."""
    rows = [{"text": "the fox", "label": n, "messages": chat("a", "b")} for n in range(4)]
    write_jsonl(chat_flags["train_data"], rows)
    flags = chat_flags | {"eval_data": chat_flags["train_data"], "task": task}
    flags |= {"metric_for_best_model": metric, "load_best_model_at_end": "true"}
    arguments = parsed(flags, eval_strategy="steps", save_strategy="steps")
    read(arguments)
    assert arguments.training.greater_is_better is greater

    asked = parsed(
        flags, eval_strategy="steps", save_strategy="steps", greater_is_better=not greater
    )
    read(asked)
    assert asked.training.greater_is_better is not greater


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"metric_for_best_model": "accuracy"}, "scores of task 'chat' are loss, perplexity"),
        ({"task": "multi_label", "label_smoothing_factor": 0.1}, "task 'multi_label' does not"),
        ({"eval_on_start": "true", "eval_data": None}, "evaluation is asked for"),
        ({"attn_implementation": "flash_attention_2"}, "FlashAttention2 has been toggled on"),
        ({"optim": "adamw_torch"}, "trained by 'qft_lion' .* got optim='adamw_torch'"),
        (
            {
                "gradient": "release", "max_grad_norm": 0, "accumulation": "forbid",
                "gradient_accumulation_steps": 2,
            },
            "Set gradient_accumulation_steps=1",
        ),
        (INT8 | {"int8_products": '{"nothing": []}'}, "'nothing'.*match no quantized linear"),
        (
            INT8 | {"int8_products": '{"lm_head": ["forward"]}', "chunked_loss": "true"},
            "Take the head out of int8_products",
        ),
        (
            {"modules_to_not_convert": "lm_head", "chunked_loss": "true"},
            "needs an INT8 output head",
        ),
        ({"modules_to_not_convert": "model"}, "No weight of .* can be INT8"),
    ],
)  # fmt: skip
def test_what_a_run_would_stumble_over_is_refused_by_a_check(flags, message, chat_flags):
    """Some settings once ended in a traceback, at the first score or when all was loaded.

    Others, of the format, were refused by a run alone.
    """
    with pytest.raises(ValueError, match=message):
        check(parsed({k: v for k, v in (chat_flags | flags).items() if v is not None}))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({}, None),
        ({"outlier_fraction": 0.02}, None),
        ({"group_size": 8}, "group_size=8 was asked for.*with group_size=None"),
        (INT8, "matmul='int8' was asked for"),
        ({"chunked_loss": "true"}, "needs an INT8 output head"),
    ],
)
def test_a_check_knows_the_format_of_an_int8_model(flags, message, chat_flags):
    """It once accepted another format, which a run refuses."""
    format = QFTConfig(outlier_fraction=0.02, modules_to_not_convert=["lm_head"])
    model = quantize_model_(tiny_llama(vocab_size=VOCAB_SIZE), format)
    model.save_pretrained(chat_flags["model_name_or_path"])
    for act in (check, prepare):
        arguments = parsed(chat_flags | flags)
        if message is None:
            act(arguments)
        else:
            with pytest.raises(ValueError, match=message):
                act(arguments)


@pytest.mark.parametrize(
    "config", [MambaConfig(), GraniteConfig(), ViTConfig()], ids=lambda c: c.model_type
)
@pytest.mark.parametrize("task", ["classification", "multi_label"])
def test_a_model_that_has_no_classifier_is_refused_before_data_are_read(config, task, chat_flags):
    """A list of over a hundred configurations was once printed, when all rows had been read."""
    config.save_pretrained(chat_flags["model_name_or_path"])
    write_jsonl(chat_flags["train_data"], [{}])
    name = type(config).__name__
    with pytest.raises(ValueError, match=f"classification head, and {name} belongs to none. Choo"):
        read(parsed(chat_flags, task=task))


def test_a_gpus_kernels_are_refused_on_a_cpu_by_a_run_and_not_by_a_check(chat_flags):
    """A dry run may be made on another machine."""
    flags = chat_flags | {"use_liger_kernel": "true"}
    with pytest.raises(ValueError, match="use_liger_kernel needs a GPU, and there is none"):
        prepare(parsed(flags))
    check(parsed(flags))


def test_a_check_knows_the_micro_batches_of_an_accelerator_config(chat_flags):
    """It counted a step for each of them."""
    config = json.dumps({"gradient_accumulation_kwargs": {"num_steps": 2}})
    flags = chat_flags | {"max_steps": -1, "num_train_epochs": 3, "accelerator_config": config}
    found = check(parsed(flags))
    assert (found.steps_per_epoch, found.steps) == (2, 6)
    assert finetune(parsed(flags)).steps == 6


def test_a_dry_run_says_why_memory_is_not_estimated(chat_flags):
    """It once gave the same two possible reasons for all models."""
    folder = chat_flags["model_name_or_path"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    MambaForCausalLM(MambaConfig(vocab_size=VOCAB_SIZE, **sizes)).save_pretrained(folder)
    with pytest.raises(ValueError, match="has no num_attention_heads") as reason:
        estimate_memory(folder)
    found = check(parsed(chat_flags))
    assert found.memory is None
    assert f"memory is not estimated: {reason.value}" in str(found)


@pytest.mark.parametrize("task", ["classification", "regression", "multi_label"])
def test_micro_batches_of_a_classifier_are_averaged(task, chat_flags):
    """Their losses and gradients were once summed, as if each were a share of one loss."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_bert(vocab_size=VOCAB_SIZE, **still).base_model.save_pretrained(
        chat_flags["model_name_or_path"]
    )
    labels = {"classification": "ab", "regression": [1.5, 0.5], "multi_label": [["a"], ["b"]]}
    rows = [{"text": "the fox", "label": labels[task][n % 2]} for n in range(8)]
    write_jsonl(chat_flags["train_data"], rows)
    write_jsonl(chat_flags["eval_data"], rows[:3])
    flags = chat_flags | {"task": task, "max_steps": 1}

    logs = []
    for micro_batches in (1, 2):
        place = f"{chat_flags['output_dir']}-{micro_batches}"
        asked = parsed(
            flags,
            output_dir=place,
            per_device_train_batch_size=4 // micro_batches,
            gradient_accumulation_steps=micro_batches,
        )
        finetune(asked)
        history = json.loads((Path(place) / "trainer_state.json").read_text())["log_history"]
        logs.append(next(entry for entry in history if "loss" in entry))

    for name in ("loss", "grad_norm"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.02)  # INT8 gradients are rounded


@pytest.mark.parametrize("earlier", [None, '{"steps": 2}', "{"])
def test_a_run_that_was_killed_before_its_report_gets_one(earlier, chat_flags):
    """An existing summary has fewer steps or is damaged."""
    values = chat_flags | SAVES
    first = finetune(parsed(values))
    run = chat_flags["output_dir"]
    for name in ("summary.json", "loss_curve.png", "config.json", "model.safetensors"):
        (run / name).unlink()
    if earlier is not None:
        (run / "summary.json").write_text(earlier)

    again = finetune(parsed(values, resume_from_checkpoint="true"))

    assert again.after == first.after
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    assert (run / "loss_curve.png").exists()
    assert isinstance(AutoModelForCausalLM.from_pretrained(run).lm_head.weight, QFTWeight)


def test_a_broken_checkpoint_is_passed_over_or_refused(chat_flags, caplog):
    values = chat_flags | SAVES
    straight = finetune(parsed(values))
    run = chat_flags["output_dir"]
    (run / "checkpoint-4" / "scheduler.pt").unlink()

    with pytest.raises(ValueError, match=r"checkpoint-4 is not whole: scheduler\.pt is missing"):
        prepare(parsed(values, resume_from_checkpoint=run / "checkpoint-4"))
    resumed = finetune(parsed(values, resume_from_checkpoint="true"))

    assert resumed.after == straight.after
    assert "checkpoint-4 is not whole and is skipped" in caplog.text


def test_a_run_without_a_whole_checkpoint_is_begun_again_as_the_error_says(chat_flags, tmp_path):
    """Without `resume_from_checkpoint` alone, the folder was refused: it holds a run to resume."""
    values = chat_flags | SAVES
    finetune(parsed(values))
    run = chat_flags["output_dir"]
    for checkpoint in run.glob("checkpoint-*"):
        (checkpoint / "optimizer.pt").write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=r"new run in another output_dir, without resume_from_c.*fo"
    ):
        prepare(parsed(values, resume_from_checkpoint="true"))
    finetune(parsed(values, output_dir=tmp_path / "b", model_name_or_path=run / "checkpoint-4"))


def test_a_run_that_diverges_ends_in_advice_that_works(chat_flags, refused):
    """It ended in a traceback."""
    diverges = {**chat_flags, "learning_rate": 1e30, "max_steps": 6}
    error = refused("finetune", *as_flags(diverges))
    assert "nonfinite='skip' drops such steps" in error
    skips = parsed(diverges, nonfinite="skip", overwrite_output="true")
    assert finetune(skips).steps == 6


def test_what_is_written_has_the_use_cache_of_the_base(chat_flags):
    finetune(parsed(chat_flags, export_dtype="bfloat16", save_strategy="steps", save_steps=4))
    run = chat_flags["output_dir"]
    for folder in (chat_flags["model_name_or_path"], run, run / "bfloat16", run / "checkpoint-4"):
        assert json.loads((folder / "config.json").read_text())["use_cache"] is True


def test_a_base_with_int8_weights_and_no_word_of_it_is_refused(chat_flags):
    finetune(parsed(chat_flags))
    base = chat_flags["output_dir"]
    config = json.loads((base / "config.json").read_text())
    del config["quantization_config"]
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"and its config\.json has no quantizat"):
        prepare(parsed(chat_flags, model_name_or_path=base, output_dir=f"{base}-2"))


def test_second_run_is_refused_before_anything_is_read(chat_flags):
    finetune(parsed(chat_flags))
    run = chat_flags["output_dir"]
    before = contents(run)

    with pytest.raises(FileExistsError, match="already holds a run"):
        prepare(parsed(chat_flags, model_name_or_path="nowhere", train_data="nowhere.csv"))

    assert contents(run) == before


def test_what_the_run_was_told_is_there_before_anything_is_computed(chat_flags, monkeypatch):
    seen = []

    def evaluate(trainer, *args, **kwargs):
        seen.append(sorted(path.name for path in chat_flags["output_dir"].iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr("qft_hf.hf.trainer.QFTTrainer.evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        finetune(parsed(chat_flags))
    assert seen == [["data.txt", "run.yaml"]]


def test_a_disk_without_room_is_found_before_training(chat_flags, monkeypatch):
    """The run once trained, and then the model was lost."""
    usage = shutil.disk_usage(chat_flags["output_dir"].parent)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=60_000))
    values = chat_flags | {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(
        OSError, match=r"will write up to 0\.000\d+ GB into .*run, and 6e-05 GB are"
    ):
        prepare(parsed(values))
    assert not chat_flags["output_dir"].exists()


# The loss falls from each step to the next, so that each evaluation is the best one so far.
BEST = {
    "save_strategy": "best",
    "metric_for_best_model": "loss",
    "eval_strategy": "steps",
    "eval_steps": 1,
}


@pytest.mark.parametrize(
    "changes", [{}, {"save_total_limit": 1}, {"optim": "qft_adamw"}, BEST], ids=str
)
def test_the_room_on_the_disk_is_what_the_run_takes(changes, chat_flags):
    """The number is exact except for file headers; a draft needs room while it is written."""
    values = chat_flags | {"save_strategy": "steps", "save_steps": 1, "export_dtype": "float32"}
    run = prepare(parsed(values, **changes))
    needed = disk_bytes(run.arguments, run.trainer.model, len(run.data.train.dataset))
    train(run)

    folder = chat_flags["output_dir"]
    checkpoints = sorted(folder.glob("checkpoint-*"))
    assert len(checkpoints) == changes.get("save_total_limit", 4)
    if len(checkpoints) == 1:
        checkpoints *= 2  # an old and a new one exist for a moment
    weights = [path / "model.safetensors" for path in (*checkpoints, folder, folder / "float32")]
    tensors = [tensor for path in weights for tensor in load_file(path).values()]
    for checkpoint in checkpoints:
        states = torch.load(checkpoint / "optimizer.pt")["state"].values()
        tensors += [tensor for state in states for key, tensor in state.items() if key != "step"]
    assert needed == sum(tensor.nbytes for tensor in tensors)


def test_overwriting_replaces_a_run_only_when_training_begins(chat_flags):
    finetune(parsed(chat_flags, save_strategy="steps", save_steps=1))
    run = chat_flags["output_dir"]
    before = contents(run)

    second = prepare(parsed(chat_flags, overwrite_output="true", max_steps=2))
    assert contents(run) == before

    assert train(second).steps == 2
    assert not list(run.glob("checkpoint-*"))


def test_model_is_not_overwritten_by_its_own_run(chat_flags):
    with pytest.raises(ValueError, match="output_dir is the folder of model_name_or_path itself"):
        prepare(parsed(chat_flags, output_dir=chat_flags["model_name_or_path"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 65}, "the model has 64 positions. Set max_length to 64 or less"),
        ({"eval_strategy": "epoch"}, "nothing is held out. Set eval_data or eval_fraction, or"),
        ({"do_eval": "true"}, "evaluation is asked for"),
        (
            {"model_name_or_path": "{small}"},
            "321 tokens, but the model has 131 embeddings.* new_tokens",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(changes, message, chat_flags, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "small")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "small")
    values = {name: str(value).format(small=tmp_path / "small") for name, value in changes.items()}
    if "eval" in str(changes):
        del chat_flags["eval_data"]

    with pytest.raises(ValueError, match=message):
        prepare(parsed(chat_flags, **values))


def test_tokenizer_without_padding_pads_with_the_end_of_text(chat_flags):
    folder = chat_flags["model_name_or_path"]
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert prepare(parsed(chat_flags)).trainer.processing_class.pad_token == tokenizer.eos_token

    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="Set pad_token in its tokenizer_config"):
        prepare(parsed(chat_flags))


def test_chat_template_from_a_file(chat_flags, tmp_path):
    template = tmp_path / "template.jinja"
    with pytest.raises(
        FileNotFoundError, match=r"no chat template .*template\.jinja .* Set chat_t"
    ):
        prepare(parsed(chat_flags, chat_template=template))

    template.write_text(CHATML_MARKED)
    run = prepare(parsed(chat_flags, chat_template=template))
    assert run.trainer.processing_class.chat_template == CHATML_MARKED


def test_a_template_has_no_byte_order_mark_in_it(chat_flags, tmp_path):
    """Every conversation once began with it, and another encoding ended in a traceback."""
    template = tmp_path / "template.jinja"
    template.write_text(CHATML, encoding="utf-8-sig")
    tokenizer = load_tokenizer(parsed(chat_flags, chat_template=template).model)
    assert tokenizer.chat_template == CHATML

    template.write_text(CHATML, encoding="utf-16")
    with pytest.raises(ValueError, match=r"template\.jinja is not in UTF-8"):
        load_tokenizer(parsed(chat_flags, chat_template=template).model)


@pytest.mark.parametrize(
    ("template", "stops", "said"),
    [
        (CHATML, None, None),  # ends answers with the end-of-text token
        (CHATML.replace(END, "<end>"), [2, 320], "learns to end its texts with <end>"),
        (CHATML.replace(END, "(end)"), None, "a special token .* ends answers with <.im_end.>"),
    ],
    ids=["eos", "another", "text"],
)
def test_generation_stops_where_answers_end(template, stops, said, chat_flags, caplog):
    folder = chat_flags["model_name_or_path"]
    tokenizer = tiny_tokenizer(template)
    tokenizer.add_tokens(["<end>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=VOCAB_SIZE + 1).save_pretrained(folder)

    run = prepare(parsed(chat_flags))

    assert run.trainer.model.generation_config.eos_token_id == (stops or 2)
    run.trainer.train()  # aligns special tokens
    assert set(run.trainer.model.generation_config.eos_token_id) == {1, 2, *(stops or [])}
    assert bool(re.search(said or "answers", caplog.text)) == (said is not None)


def test_new_tokens_get_embeddings(chat_flags):
    """The template's tokens for turns are in neither the tokenizer nor the embeddings."""
    tokens = ["<|turn|>", "<|done|>"]
    template = chat_flags["model_name_or_path"] / "turns.jinja"
    template.write_text(CHATML.replace(TURN, tokens[0]).replace(END, tokens[1]))
    flags = as_flags(chat_flags | {"chat_template": template, "max_steps": 1})

    finetune(parse_arguments([*flags, "--new_tokens", *tokens]))

    run = chat_flags["output_dir"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run), AutoTokenizer.from_pretrained(run)
    assert tokenizer.convert_tokens_to_ids(tokens) == [VOCAB_SIZE, VOCAB_SIZE + 1]
    assert model.get_input_embeddings().weight.shape[0] == VOCAB_SIZE + 2
    assert isinstance(model.lm_head.weight, QFTWeight)
    assert VOCAB_SIZE + 1 in model.generation_config.eos_token_id


def test_code_of_a_model_runs_on_request_only(chat_flags):
    folder = chat_flags["model_name_or_path"]
    code = "from transformers import LlamaConfig\nclass Conf(LlamaConfig):\n    theirs = True\n"
    (folder / "conf.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "conf.Conf"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_config(parsed(chat_flags).model)
    assert load_config(parsed(chat_flags, trust_remote_code="true").model).theirs


def test_the_script_does_a_run(chat_flags, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *as_flags(chat_flags | {"max_steps": 1})])

    runpy.run_path(str(ROOT / "scripts" / "finetune.py"), run_name="__main__")

    assert f"written to                    {chat_flags['output_dir']}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs_under_accelerate(chat_flags, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in chat_flags.items()))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    finished = subprocess.run(
        [*launch, str(ROOT / "scripts" / "finetune.py"), str(config), "--max_steps", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert "perplexity before -> after" in finished.stdout


def test_classes_that_cannot_be_learned_are_called_so(chat_flags, caplog):
    tiny_bert(vocab_size=VOCAB_SIZE).base_model.save_pretrained(chat_flags["model_name_or_path"])
    for name, labels in (("train_data", ["pos", "neg"]), ("eval_data", ["neg", "negative"])):
        write_jsonl(chat_flags[name], [{"text": "the fox", "label": label} for label in labels])
    read(parsed(chat_flags, task="classification"))
    assert "have the class negative, which no training example has" in caplog.text


@pytest.mark.parametrize("spelling", ["{}", "{}/../{}"])
def test_scores_on_what_is_learned_are_called_so(spelling, chat_flags, tmp_path, caplog):
    folder = Path(chat_flags["train_data"]).parent
    again = spelling.format(folder, folder.name) + "/" + Path(chat_flags["train_data"]).name
    read(parsed(chat_flags, eval_data=again))
    assert f"8 rows of {again} are both in train_data and in eval_data" in caplog.text

    caplog.clear()
    read(parsed(chat_flags, eval_data=again, train_split="train[:5]", eval_split="train[3:]"))
    assert f"2 rows of {again} are both in train_data and in eval_data" in caplog.text

    caplog.clear()
    split = {"train_split": "train[:1]", "eval_split": "train[1:]"}
    read(parsed(chat_flags, eval_data=again, **split))
    assert "at once" not in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config.json": b"{}"}, "holds a PEFT adapter .* merge_and_unload"),
        ({"model-q4.gguf": b"GGUF"}, "is in GGUF, .* gguf_file=NAME"),
        ({"snapshots/f1/config.json": b"{}"}, "hub's cache .* such as .*other/snapshots/f1"),
        ({"rows.jsonl": b"{}"}, "neither a folder with a config.json nor"),
    ],
)
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_folder_that_is_no_model_is_named_for_what_it_is(
    files, message, has_tokenizer, chat_flags, tmp_path
):
    folder = tmp_path / "other"
    folder.mkdir()
    if has_tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        read(parsed(chat_flags, model_name_or_path=folder))


def test_a_file_is_no_model(chat_flags):
    file = chat_flags["model_name_or_path"] / "model.safetensors"
    with pytest.raises(ValueError, match=r"is a file\. Pass the folder that it is in"):
        read(parsed(chat_flags, model_name_or_path=file))


def test_a_model_without_a_tokenizer_says_which_key_names_one(chat_flags, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="model's, set tokenizer_name_or_path to that"):
        read(parsed(chat_flags, model_name_or_path=tmp_path / "bare"))


@pytest.mark.parametrize("what", ["gone", "cut off"])
def test_a_dry_run_misses_weights_as_a_run_does(what, chat_flags):
    """A dry run reads no weights and once accepted a folder without them."""
    weights = chat_flags["model_name_or_path"] / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    if what == "cut off":
        weights.write_bytes(content[: len(content) // 2])
    for command in (check, prepare):
        with pytest.raises(ValueError, match=r"cannot be loaded: .*model\.safetensors"):
            command(parsed(chat_flags))


def test_a_dry_run_finds_a_flipped_bit_as_a_run_does(chat_flags):
    """A dry run once read only the headers of weights."""
    folder = chat_flags["model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    quantize_model_(model, QFTConfig()).save_pretrained(folder)
    check(parsed(chat_flags))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-200] ^= 4
    weights.write_bytes(content)
    for command in (check, prepare):
        with pytest.raises(ValueError, match=r"faults in 1 tensor,.*\n- .* is not what was"):
            command(parsed(chat_flags))


@pytest.mark.parametrize("command", [check, prepare])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_implementation": "flash"}, 'cannot be loaded: .*"flash".* is not supported'),
        ({"report_to": "wandbb"}, "report_to is 'wandbb', .* Install it, leave it out, or use"),
        ({"report_to": "mlflow"}, "report_to is 'mlflow', which is not installed"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr'.* does not accept .*min_lr"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"cycles": 2}'},
            "'cosine' does not accept .*'cycles'.*: .*unexpected keyword argument",
        ),
        ({"dataloader_persistent_workers": "true"}, "Set dataloader_num_workers to 1 or more"),
        ({"dataloader_multiprocessing_context": "spawn"}, "Set dataloader_num_workers to 1"),
        ({"save_strategy": "best", "eval_strategy": "epoch"}, "'chat': loss, perplexity. Set it"),
    ],
)
def test_what_libraries_refuse_is_refused_by_us(command, changes, message, chat_flags):
    with pytest.raises(ValueError, match=message):
        command(parsed(chat_flags, **changes))


def test_a_schedule_is_tried_with_the_rate_of_the_run(chat_flags):
    """It was tried with 0.001, so an end between that and the run's rate was refused."""
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": '{"lr_end": 0.01}'}
    check(parsed(chat_flags, optim="qft_sgd", learning_rate=0.1, **schedule))
    with pytest.raises(ValueError, match=r"lr_end \(0\.01\) must be smaller .* \(0\.0001\)"):
        check(parsed(chat_flags, learning_rate=1e-4, **schedule))


@pytest.mark.parametrize("command", [check, prepare])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_steps": 2}, "eval_steps has no effect unless eval_strategy is set"),
        (
            {"activation_checkpointing_kwargs": '{"use_reentrant": false}'},
            "unless activation_checkpointing or gradient_checkpointing is set. Set that, too",
        ),
        ({"do_train": "false"}, "this command trains. Leave it out; `qft-hf evaluate`"),
        ({"do_predict": "true"}, "writes no predictions. Leave it out"),
        ({"load_best_model_at_end": "true"}, "eval_strategy is 'no'. Set it to steps"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "eval_strategy is 'no'. Set"),
    ],
)
def test_a_setting_without_effect_is_refused(command, changes, message, chat_flags):
    """The Trainer ignores these: a run was not evaluated, or trained though it should not."""
    with pytest.raises(ValueError, match=message):
        command(parsed(chat_flags, **changes))


@pytest.mark.parametrize(("steps", "says"), [({}, True), ({"eval_steps": 4}, False)])
def test_a_run_that_ends_before_its_first_evaluation_says_so(steps, says, chat_flags, caplog):
    """Unset, `eval_steps` is 500, also in a run of four steps."""
    del chat_flags["logging_steps"]
    check(parsed(chat_flags, eval_strategy="steps", **steps))
    assert ("eval_steps is 500 and the run has 4 steps" in caplog.text) == says


def test_a_switch_that_is_turned_off_needs_no_other_change(chat_flags):
    check(parsed(chat_flags, eval_strategy="no", eval_steps=2))


def test_a_run_that_cannot_be_pushed_is_refused_before_it_trains(chat_flags):
    with pytest.raises(ValueError, match=r"(?s)not provide a repository: .*offline.* Log in with"):
        finetune(parsed(chat_flags, push_to_hub="true"))
    assert not chat_flags["output_dir"].exists()


def test_a_hub_that_refuses_the_finished_run_costs_nothing(chat_flags, monkeypatch):
    """The push once came before log, summary, export and card, which were then missing."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(trainer, "hf_api", lambda: huggingface_hub.HfApi(url))
    push = {"push_to_hub": "true", "hub_model_id": "someone/model", "hub_token": "hf_secret"}
    with pytest.raises(ValueError, match=r"(?s)403.* Push it with `hf upload someone/model "):
        finetune(parsed(chat_flags, export_dtype="bfloat16", **push))
    server.shutdown()

    folder = chat_flags["output_dir"]
    assert json.loads((folder / "summary.json").read_text())["steps"] == 4
    for name in ("trainer_state.json", "README.md", "bfloat16/model.safetensors"):
        assert (folder / name).is_file()
    assert "perplexity" in (folder / "README.md").read_text()  # of the run, not of the Trainer
    config = (folder / "run.yaml").read_text()
    assert "someone/model" in config
    pushed = [path for path in folder.rglob("*") if path.is_file()]
    assert "training_args.bin" in {path.name for path in pushed}
    assert [path for path in pushed if b"hf_secret" in path.read_bytes()] == []
