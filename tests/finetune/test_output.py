"""Nothing that a run wrote is lost unless the user asked for it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import save_file

from qft_hf.hf.atomic_writes import atomic_path
from qft_hf.hf.checkpoint import MARK
from qft_hf.hf.finetune import parse_arguments
from qft_hf.hf.finetune.arguments import DataArguments
from qft_hf.hf.finetune.data import DataCounts
from qft_hf.hf.finetune.loss_curve import draw_loss_curve, loss_points
from qft_hf.hf.finetune.output_folder import (
    checkpoint_to_resume,
    clear_run,
    refuse_inputs_inside,
    refuse_other_run,
    refuse_small_disk,
    refuse_unwritable,
)
from qft_hf.hf.finetune.run_card import write_run_card
from qft_hf.hf.finetune.side_tuning import side_checkpoint
from qft_hf.hf.finetune.summary import Origin, RunSummary, versions
from qft_hf.hf.peak_memory import PeakMemory
from qft_hf.hf.run_files import record_settings, recorded_settings

TRACES = ["run.yaml", "model.safetensors", "model-00001-of-00002.safetensors", "checkpoint-7/"]


def leave(folder, trace):
    """Create what a run of ours leaves; a checkpoint has our mark."""
    path = folder / trace
    if trace.endswith("/"):
        path.mkdir(parents=True)
        (path / "trainer_state.json").write_text("{}")
        (path / MARK).write_text("{}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("export_dtype: bfloat16" if trace == "run.yaml" else "x")


def contents(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("trace", TRACES)
def test_folder_with_a_run_is_refused_and_left_alone(trace, tmp_path):
    leave(tmp_path, trace)
    leave(tmp_path, "run.yaml")
    before = contents(tmp_path)

    with pytest.raises(
        FileExistsError, match=r"already holds a run .*overwrite_output to true"
    ) as r:
        refuse_other_run(tmp_path, checkpoint=None, overwrite=False)

    assert contents(tmp_path) == before
    # A run that stopped before its first checkpoint was told to resume, and then to start again.
    assert ("set resume_from_checkpoint" in str(r.value)) == ("checkpoint" in trace)
    refuse_other_run(tmp_path, checkpoint=None, overwrite=True)
    assert contents(tmp_path) == before


def test_absent_empty_or_unrelated_folder_is_accepted(tmp_path):
    refuse_other_run(tmp_path / "absent", checkpoint=None, overwrite=False)
    refuse_other_run(tmp_path, checkpoint=None, overwrite=False)
    (tmp_path / "notes.txt").write_text("x")
    refuse_other_run(tmp_path, checkpoint=None, overwrite=False)
    assert not (tmp_path / "absent").exists()


def test_only_its_own_checkpoint_opens_a_folder(tmp_path):
    leave(tmp_path / "one", "checkpoint-7/")
    leave(tmp_path / "other", "checkpoint-7/")
    (tmp_path / "one" / "checkpoint-7" / MARK).unlink()  # who resumes from it knows it

    own = tmp_path / "one" / "checkpoint-7"
    refuse_other_run(tmp_path / "one", checkpoint=own, overwrite=False)
    with pytest.raises(FileExistsError, match="already holds a run"):
        refuse_other_run(tmp_path / "other", checkpoint=own, overwrite=False)
    with pytest.raises(ValueError, match="Set one of them"):
        refuse_other_run(tmp_path / "one", checkpoint=own, overwrite=True)


def test_clearing_removes_a_run_and_nothing_else(tmp_path):
    for trace in TRACES:
        leave(tmp_path, trace)
    (tmp_path / "notes.txt").write_text("x")

    clear_run(tmp_path)

    assert contents(tmp_path) == ["notes.txt"]


FOREIGN = {
    "a model": ["config.json", "model.safetensors"],
    "a model in shards": ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
    "a page": ["README.md"],
    "a tokenizer": ["tokenizer.json", "chat_template.jinja"],
    "a checkpoint": ["checkpoint-9/model.safetensors"],
    "an export": ["bfloat16/config.json"],
    "a summary": ["summary.json"],
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("names", FOREIGN.values(), ids=FOREIGN)
def test_what_no_run_wrote_is_never_replaced(names, overwrite, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")

    with pytest.raises(FileExistsError, match=r"no run of qft_hf is known .* move them away"):
        refuse_other_run(tmp_path, checkpoint=None, overwrite=overwrite)


FOREIGN_IN_A_RUN = [
    "checkpoint-7/notes.txt",  # in our checkpoint
    "checkpoint-9/model.safetensors",  # a checkpoint without our mark
    "float32/config.json",  # our run exports bfloat16
    "bfloat16/notes.txt",
    "config.json",  # of a float model
    "README.md",
]


@pytest.mark.parametrize("name", FOREIGN_IN_A_RUN)
def test_what_was_put_into_a_run_is_never_replaced(name, tmp_path):
    for trace in [*TRACES, "bfloat16/"]:
        leave(tmp_path, trace)
    (tmp_path / "bfloat16" / MARK).unlink()
    refuse_other_run(tmp_path, checkpoint=None, overwrite=True)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")

    with pytest.raises(FileExistsError, match=f"holds {name.split('/')[0]}.*overwrite_output repl"):
        refuse_other_run(tmp_path, checkpoint=None, overwrite=True)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("model_name_or_path", "."),
        ("model_name_or_path", "checkpoint-7"),
        ("model_name_or_path", "bfloat16"),
        ("chat_template", "chat_template.jinja"),
        ("train_data", "checkpoint-7/rows.jsonl"),
        ("tokenizer_name_or_path", "link"),
    ],
)
def test_what_a_run_reads_must_not_lie_where_it_writes(key, name, tmp_path):
    run = tmp_path / "run"
    for folder in ("checkpoint-7", "bfloat16", "data"):
        (run / folder).mkdir(parents=True)
    for file in ("chat_template.jinja", "checkpoint-7/rows.jsonl", "data/rows.jsonl"):
        (run / file).write_text("x")
    (run / "link").symlink_to(run / "checkpoint-7")

    with pytest.raises(ValueError, match=key):
        refuse_inputs_inside(run, {key: str(run / name)})
    # A name on the Hub, and files whose names a run does not use, are allowed.
    refuse_inputs_inside(run, {"a": "org/model", "b": str(run / "data" / "rows.jsonl")})
    refuse_inputs_inside(run, {"c": str(tmp_path)})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/run", "file/deep/run"):
        with pytest.raises(NotADirectoryError, match=r"and .*file is a file\. Choose another"):
            refuse_unwritable(tmp_path / place)
    refuse_unwritable(tmp_path / "new" / "run")
    assert contents(tmp_path) == ["file"]

    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "good").symlink_to(tmp_path)
    for place in ("link", "link/run"):
        with pytest.raises(NotADirectoryError, match=r"and .*link is a broken link\. Choose"):
            refuse_unwritable(tmp_path / place)
    refuse_unwritable(tmp_path / "good" / "run")


def test_a_name_that_is_not_in_utf_8_is_refused(tmp_path):
    """The run once trained, and lost the model when it was saved: safetensors needs UTF-8."""
    with pytest.raises(OSError, match=r"caf.udce9', which is not a name in UTF-8.* Choose another"):
        refuse_unwritable(tmp_path / "caf\udce9")
    refuse_unwritable(tmp_path / "café")


def test_a_folder_that_refuses_writing_is_refused(tmp_path, monkeypatch):
    """`os.access` is asked about the nearest folder, and replaced because root may always write."""
    asked = []
    monkeypatch.setattr("os.access", lambda path, mode: asked.append((path, mode)))
    with pytest.raises(PermissionError, match=r"nothing can be written to .* change its permis"):
        refuse_unwritable(tmp_path / "new" / "run")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    margin = 10**9  # other processes write, too
    refuse_small_disk(tmp_path / "new", free - margin, overwrite=False)
    with pytest.raises(
        OSError, match=r"will write up to .* are free there\. Choose .*save_total_l"
    ):
        refuse_small_disk(tmp_path / "new", free + margin, overwrite=False)


def test_what_will_be_removed_counts_as_free(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    leave(tmp_path, "checkpoint-7/")
    with (tmp_path / "checkpoint-7" / "model.safetensors").open("wb") as file:
        file.truncate(4 * 10**9)  # a sparse file takes no room
    for overwrite in (True, False):  # a resumed run rotates its checkpoints
        refuse_small_disk(tmp_path, free + 3 * 10**9, overwrite=overwrite)
    with pytest.raises(OSError, match="are free there"):
        refuse_small_disk(tmp_path, free + 5 * 10**9, overwrite=True)


def test_the_config_in_force_does_the_run_again(tmp_path):
    flags = ["--model_name_or_path=m", "--train_data", "t.jsonl", "--no_assistant_only_loss"]
    flags += ["--learning_rate=3e-5", "--use_cpu", f"--output_dir={tmp_path / 'run'}"]
    flags += ['--lr_scheduler_kwargs={"num_cycles": 0.5}', "--modules_to_not_convert", "a", "b"]
    flags += ["--lr_scheduler_type=cosine", "--save_strategy=no"]
    first = parse_arguments(flags)

    record_settings(first.output_dir, first.settings)

    again = parse_arguments([str(tmp_path / "run" / "run.yaml")])
    assert again.given == first.given
    assert again.data == first.data
    assert again.training.to_dict() == first.training.to_dict()


def test_the_config_in_force_does_the_run_again_from_any_folder(tmp_path, monkeypatch):
    """run.yaml once had paths as they were given, which mean other files in another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    flags = ["--model_name_or_path=model", "--train_data", "t.jsonl", "org/chats", "glob:e*.csv"]
    flags += ["--output_dir=run", "--tokenizer_name_or_path=org/tokenizer", "--use_cpu"]
    first = parse_arguments(flags)

    record_settings(first.output_dir, first.settings)
    again = recorded_settings(tmp_path / "run")

    assert again["model_name_or_path"] == str(tmp_path / "model")
    assert again["train_data"] == [
        str(tmp_path / "t.jsonl"),
        "org/chats",
        f"glob:{tmp_path / 'e*.csv'}",
    ]
    assert again["tokenizer_name_or_path"] == "org/tokenizer"
    assert again["output_dir"] == str(tmp_path / "run")


def test_a_run_that_goes_on_with_other_settings_says_which(tmp_path, caplog):
    """`run.yaml` was once rewritten silently and no longer described the earlier steps."""
    before = {"max_length": 256, "train_data": ["a.jsonl"], "seed": 3}
    record_settings(tmp_path, before)
    record_settings(tmp_path, before | {"resume_from_checkpoint": "true"})
    assert caplog.text == ""

    after = {"max_length": 512, "train_data": ["a.jsonl"], "learning_rate": 1e-4}
    record_settings(tmp_path, after)

    assert (
        "with other settings than before: max_length 512, was 256; seed by default, was 3; "
        "learning_rate 0.0001, was by default. Its result is not"
    ) in caplog.text
    assert recorded_settings(tmp_path) == after


def leave_whole(folder, step):
    """Write a checkpoint with all files that a resume reads."""
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.ones(2)}, checkpoint / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, checkpoint / name)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return checkpoint


def test_which_checkpoint_is_resumed(tmp_path):
    for step in (9, 10, 100):
        leave_whole(tmp_path, step)

    assert checkpoint_to_resume(None, tmp_path) is None
    assert checkpoint_to_resume("False", tmp_path) is None
    assert checkpoint_to_resume("true", tmp_path) == tmp_path / "checkpoint-100"
    named = tmp_path / "checkpoint-9"
    assert checkpoint_to_resume(str(named), tmp_path / "elsewhere") == named

    (tmp_path / "checkpoint-100" / "optimizer.pt").unlink()
    assert checkpoint_to_resume("true", tmp_path) == tmp_path / "checkpoint-10"
    with pytest.raises(ValueError, match=r"checkpoint-100 is not whole: optimizer\.pt is missing"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-100"), tmp_path)


def test_what_a_killed_run_had_written_whole_is_a_run(tmp_path):
    """The run was killed before its first checkpoint was moved to its place, but it counts."""
    draft = tmp_path / "_qft-draft-abcd"
    (draft / "whole").mkdir(parents=True)
    leave_whole(draft / "whole", 2)
    with pytest.raises(FileExistsError, match=r"run \(_qft-draft-abcd\).*resume_from_checkpoint"):
        refuse_other_run(tmp_path, checkpoint=None, overwrite=False)
    assert checkpoint_to_resume("true", tmp_path) == tmp_path / "checkpoint-2"


def test_a_killed_run_that_had_written_only_its_model_is_not_advised_to_resume(tmp_path):
    model = tmp_path / "_qft-draft-abcd" / "whole" / "model.safetensors"
    model.parent.mkdir(parents=True)
    model.write_text("x")
    with pytest.raises(FileExistsError, match=r"run \(_qft-draft-abcd\)\. Choose .*_dir, or set"):
        refuse_other_run(tmp_path, checkpoint=None, overwrite=False)


def test_clearing_does_not_follow_links(tmp_path):
    outside, run = tmp_path / "outside", tmp_path / "run"
    leave(outside, "notes.txt")
    run.mkdir()
    (run / "checkpoint-2").symlink_to(outside)
    (run / "summary.json").symlink_to(outside / "notes.txt")

    clear_run(run)

    assert contents(run) == []
    assert contents(outside) == ["notes.txt"]


def test_missing_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint-<step> folder. Correct"):
        checkpoint_to_resume("true", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint-<step> folder. Correct"):
        checkpoint_to_resume("true", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder .*5 to resume from. Set"):
        checkpoint_to_resume(str(tmp_path / "checkpoint-5"), tmp_path)


def fail_half_way(path, write):
    with atomic_path(path) as draft:
        write(draft)
        raise OSError("disk full")


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "{}", '{"versions": null}'])
def test_a_damaged_summary_is_that_of_no_run(text, tmp_path):
    """An entry that was null, and a file that held a list, once ended in a TypeError here."""
    (tmp_path / "summary.json").write_text(text)

    with pytest.raises(FileExistsError, match=r"summary\.json, which no run .* Choose another"):
        refuse_other_run(tmp_path, checkpoint=None, overwrite=True)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json .* The card of the run stays as it is"):
        write_run_card(tmp_path, {})


@pytest.mark.parametrize("text", ["", "null", "[]", '{"quantization_config": []}'])
def test_a_damaged_configuration_is_that_of_no_int8_model(text, tmp_path):
    """A `quantization_config` that was no object once ended in an AttributeError."""
    (tmp_path / "run.yaml").write_text("seed: 1\n")
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(FileExistsError, match=r"config\.json, which no run .* Choose another"):
        refuse_other_run(tmp_path, checkpoint=None, overwrite=True)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"format": 1, "qft_hf": "0"}'])
def test_a_damaged_description_of_a_side_network_names_its_file(text, tmp_path):
    """An object without the facts once ended in a KeyError; no test had one."""
    (tmp_path / "side_network.json").write_text(text)

    with pytest.raises(ValueError, match=r"side_network\.json .*copy it again"):
        side_checkpoint(tmp_path)


def test_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    path = tmp_path / "new" / "summary.json"
    with atomic_path(path) as draft:
        draft.write_text("old")

    with pytest.raises(OSError, match="disk full"):
        fail_half_way(path, lambda draft: draft.write_text("half"))

    assert path.read_text() == "old"
    assert contents(tmp_path / "new") == ["summary.json"]


def test_folder_that_fails_half_way_is_not_there(tmp_path):
    path = tmp_path / "export"
    with pytest.raises(OSError, match="disk full"):
        fail_half_way(path, lambda draft: leave(draft, "half"))
    assert contents(tmp_path) == []

    with atomic_path(path) as draft:
        leave(draft, "whole")
    assert contents(tmp_path) == ["export", "export/whole"]


HISTORY = [
    {"step": 0, "eval_loss": 3.5},
    {"step": 2, "loss": 3.25, "learning_rate": 1e-4},
    {"step": 4, "loss": 3.0},
    {"step": 4, "eval_loss": 2.5},
    {"step": 4, "train_loss": 3.1},
]


def test_loss_points_are_those_that_were_logged():
    assert loss_points(HISTORY, "loss") == ([2, 4], [3.25, 3.0])
    assert loss_points(HISTORY, "eval_loss") == ([0, 4], [3.5, 2.5])


FEW = {
    "both": HISTORY,
    "training": HISTORY[1:3],
    "one point": HISTORY[1:2],
    "evaluation": HISTORY[3:4],
    "the mean alone": HISTORY[4:],  # what is logged without a word to the contrary
    "nothing": [],
}


@pytest.mark.parametrize("history", FEW.values(), ids=FEW)
def test_the_picture_is_never_an_empty_frame(history, tmp_path):
    path = tmp_path / "loss_curve.png"
    draw_loss_curve(history, path, title="", unit="nats")
    assert os.listdir(tmp_path) == ["loss_curve.png"]

    # 15 % at each side are left out: labels, ticks and frame. Grid and background are gray.
    pixels = imread(path)[..., :3]
    height, width, _ = pixels.shape
    inner = pixels[int(0.15 * height) : int(0.85 * height), int(0.15 * width) : int(0.85 * width)]
    drawn = (inner.max(axis=2) - inner.min(axis=2) > 0.05) | (inner.max(axis=2) < 0.5)
    assert drawn.sum() > 50


@pytest.mark.parametrize(
    ("eval_data", "evaluated"),
    [
        (None, None),
        (["org/held-out"], ["org/held-out"]),
        (["rows.jsonl"], []),
        (["org/held-out", "rows.jsonl"], []),  # no name says what was scored
    ],
    ids=str,
)
def test_an_origin_names_the_data_that_were_scored(eval_data, evaluated, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").touch()

    origin = Origin.of("m", DataArguments(train_data=["org/chats"], eval_data=eval_data))

    assert origin.datasets == ["org/chats"]
    assert origin.evaluated == evaluated


def test_summary_is_valid_json_even_when_a_loss_is_not_finite(tmp_path):
    counts = DataCounts(rows=9, examples=8, tokens=100, cut_tokens=3, dropped={"empty": 1})
    summary = RunSummary(
        model="m",
        origin=Origin.of("m", DataArguments(train_data=["org/chats"])),
        architecture="LlamaForCausalLM",
        task="chat",
        parameters=1_000,
        trained_parameters=990,
        optimizer="Lion",
        hyperparameters={"betas": (0.9, 0.99)},
        steps=5,
        before={"loss": 800.0, "perplexity": float("inf")},
        after={"loss": 2.0, "perplexity": 7.389},
        trained_tokens=500,
        train_seconds=2.0,
        tokens_per_second=250.0,
        wall_seconds=3.0,
        peak_memory=(peak := PeakMemory.measured(torch.device("cpu"))),
        peak_bytes=[peak.bytes],
        side=None,
        state_bytes={"INT8 weights": 1_000},
        bytes_per_parameter=3.11,
        percent_of_fp32_adam=19.4,
        sampled={},
        train_data=counts,
        eval_data=None,
        versions=versions(),
    )

    summary.write(tmp_path / "summary.json")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    read = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert read["before"] == {"loss": 800.0, "perplexity": None}
    assert read["train_data"]["dropped"] == {"empty": 1}
    assert read["peak_memory"]["bytes"] > 10_000_000  # this process, with torch
    assert "perplexity before -> after" in str(summary)
    assert "infinite -> 7.3890" in str(summary)
