"""Checkpoints of QFTTrainer are whole or absent, and a resume is exact or refused."""

import copy
import functools
import http.server
import json
import logging
import os
import shutil
import signal
import threading
import time
import zlib
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import (
    BertForMaskedLM,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    trainer,
)
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import get_last_checkpoint

from qft_hf import QFTConfig, QFTTrainer, QFTTrainingArguments, quantize_model_
from qft_hf.hf.atomic_writes import PREFIX
from qft_hf.hf.checkpoint import MARK, faults, newest_whole_checkpoint, remove_old
from tests.finetune.chats import tiny_tokenizer
from tests.hf.checkpoints import edit_tensors
from tests.hf.test_trainer import (
    arguments,
    assert_same_state,
    history,
    sequences,
    trainer_on,
)
from tests.models import tiny_bert, tiny_llama

STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "max_grad_norm": 0}
SHARDED = {"sharded": True}


def make(folder: Path, cls: type = QFTTrainer, *, sharded=False, tied=True, **overrides) -> Trainer:
    model = tiny_llama(tied=tied)
    if sharded:
        model.save_pretrained = functools.partial(model.save_pretrained, max_shard_size="9KB")
    return trainer_on(model, folder, cls, **STEPS | overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of finished runs, by whether their checkpoints are sharded and have marks."""
    folders = {}
    for sharded in (False, True):
        folder = tmp_path_factory.mktemp("run")
        make(folder, sharded=sharded).train()
        folders[sharded, True] = folder
        unmarked = tmp_path_factory.mktemp("run") / "run"
        shutil.copytree(folder, unmarked)
        for mark in unmarked.glob(f"*/{MARK}"):
            mark.unlink()
        folders[sharded, False] = unmarked
    return folders


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- written whole --------------------------------------------------------------------------


def test_nothing_but_checkpoints_is_left(tmp_path):
    make(tmp_path).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    for checkpoint in tmp_path.iterdir():
        assert faults(checkpoint) == []
        assert set(names(checkpoint)) > {MARK, "config.json", "model.safetensors", "optimizer.pt"}


def test_old_checkpoints_are_removed(tmp_path):
    make(tmp_path, save_total_limit=2, max_steps=8).train()
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8"]


def test_drafts_are_not_pushed(tmp_path, monkeypatch):
    """A push runs in the background, and the next checkpoint may be written at the same time."""
    ignored = []

    class Api:
        def upload_folder(self, ignore_patterns, **kwargs):
            ignored.append(ignore_patterns)

    monkeypatch.setattr(trainer, "hf_api", Api)
    run = make(tmp_path)
    run.hub_model_id = "someone/model"
    run.push_in_progress = None
    run._push_from_checkpoint(str(tmp_path))
    draft = [f"{PREFIX}abcd/new/checkpoint-4/model.safetensors", "config.json"]
    assert list(filter_repo_objects(draft, ignore_patterns=ignored[0])) == ["config.json"]


@pytest.mark.parametrize("clock", ["ahead", "stands still"])
def test_rotation_keeps_the_newest_whatever_clocks_say(clock, tmp_path, monkeypatch):
    """Rotation once went by modification times, and removed the new one if a clock was ahead."""
    make(tmp_path, max_steps=8, save_total_limit=8).train()
    now = (tmp_path / "checkpoint-8").stat().st_mtime
    for step in (2, 4, 6, 8):
        for place in (tmp_path / f"checkpoint-{step}", *tmp_path.glob(f"checkpoint-{step}/*")):
            os.utime(place, (now, now + 9000 * (clock == "ahead")))

    make(tmp_path, max_steps=10, save_total_limit=1).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-10"]
    assert faults(tmp_path / "checkpoint-10") == []


def test_rotation_leaves_what_is_no_checkpoint_of_the_run(tmp_path):
    """A copy that was set aside was once removed as the oldest, though no resume would use it."""
    make(tmp_path).train()
    shutil.copytree(tmp_path / "checkpoint-4", tmp_path / "checkpoint-4-good")
    make(tmp_path, max_steps=8, save_total_limit=1).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-4-good", "checkpoint-8"]


def test_a_finished_run_that_was_killed_before_rotation_ends_it_when_it_is_resumed(tmp_path):
    """It kept one checkpoint more than `save_total_limit` for ever."""
    make(tmp_path, max_steps=6).train()  # with all of its checkpoints, as if it was killed then
    make(tmp_path, max_steps=6, save_total_limit=2).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_rotation_says_what_it_cannot_remove(tmp_path, caplog):
    """The checkpoint was moved to another disk and replaced by a symbolic link."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    make(run).train()
    shutil.move(run / "checkpoint-2", elsewhere)
    (run / "checkpoint-2").symlink_to(elsewhere)
    make(run, max_steps=8, save_total_limit=1).train(resume_from_checkpoint=True)
    assert names(run) == ["checkpoint-2", "checkpoint-8"]
    assert faults(elsewhere) == []
    assert f"the old checkpoint {run / 'checkpoint-2'} cannot be removed" in caplog.text


def test_rotation_goes_by_when_checkpoints_were_written_and_not_by_their_steps(tmp_path):
    """After an earlier, longer run the new checkpoints have lower step numbers."""
    make(tmp_path, max_steps=8).train()
    make(tmp_path, max_steps=4, save_total_limit=3).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt"])
def test_rotation_ends_a_removal_that_was_interrupted(name, runs, tmp_path):
    """The remains had changed last, so rotation once kept them and removed a whole checkpoint."""
    shutil.copytree(runs[False, True], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-2" / name).unlink()
    remove_old(tmp_path, limit=1, keep=())
    assert names(tmp_path) == ["checkpoint-4"]


def test_training_again_into_the_same_folder_keeps_a_checkpoint(tmp_path):
    """Rotation once counted the old checkpoint, which was set aside, and none was left."""
    for _ in range(2):
        make(tmp_path, save_total_limit=1, max_steps=2).train()
        assert names(tmp_path) == ["checkpoint-2"]
        assert faults(tmp_path / "checkpoint-2") == []


def test_a_checkpoint_is_not_there_before_it_is_whole(tmp_path):
    """Whenever a file is saved, the checkpoint that get_last_checkpoint finds is whole."""
    seen = []

    class Watched(QFTTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            seen.append(get_last_checkpoint(tmp_path))
            super()._save_optimizer_and_scheduler(output_dir)
            seen.append(get_last_checkpoint(tmp_path))

    make(tmp_path, Watched).train()
    first = str(tmp_path / "checkpoint-2")
    assert seen == [None, None, first, first]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "_save_rng_state", "_save"])
def test_a_save_that_fails_leaves_what_was_there(where, error, tmp_path, monkeypatch):
    make(tmp_path, save_total_limit=1).train()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoint-4").iterdir()}

    def fail(self, *args, **kwargs):
        raise error("no")

    monkeypatch.setattr(Trainer, where, fail)
    again = make(tmp_path, save_total_limit=1, save_steps=4)
    with pytest.raises(error) as caught:
        again.train()

    assert "everything there is as it was" in str(caught.value.__notes__)
    assert names(tmp_path) == ["checkpoint-4"]
    assert before == {path: path.read_bytes() for path in (tmp_path / "checkpoint-4").iterdir()}
    assert again.state.best_model_checkpoint is None


class Fails:
    """Call `real` until checkpoint-4 exists; then remove checkpoint-2 and raise."""

    def __init__(self, real, folder):
        self.real, self.folder = real, folder

    def __call__(self, *args, **kwargs):
        if (self.folder / "checkpoint-4").exists():
            shutil.rmtree(self.folder / "checkpoint-2")
            raise KeyboardInterrupt
        return self.real(*args, **kwargs)


@pytest.mark.parametrize("step", ["rotation", "push"])
def test_what_comes_after_a_checkpoint_cannot_cost_it(step, tmp_path, monkeypatch):
    """A Ctrl-C during rotation, or a push that failed, once deleted the new checkpoint."""
    run = make(tmp_path, save_total_limit=1)
    if step == "rotation":
        module = "qft_hf.hf.checkpoint_trainer"
        monkeypatch.setattr(f"{module}.remove_old", Fails(remove_old, tmp_path))
    else:
        run.args.push_to_hub = True
        monkeypatch.setattr(Trainer, "_push_from_checkpoint", Fails(lambda folder: None, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run.train()

    assert names(tmp_path) == ["checkpoint-4"]
    assert faults(tmp_path / "checkpoint-4") == []


class Refuses(http.server.BaseHTTPRequestHandler):
    """A Hub that has the repository and refuses every file."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        answer = {"url": f"http://{self.headers['host']}/someone/model"}
        self.send_response(200 if self.path == "/api/repos/create" else 403)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())


@pytest.mark.parametrize("strategy", ["every_save", "all_checkpoints", "end"])
def test_a_hub_that_refuses_all_files_costs_none_here(strategy, tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(trainer, "hf_api", lambda: HfApi(url))
    run = make(
        tmp_path, save_total_limit=1, push_to_hub=True, hub_strategy=strategy,
        hub_model_id="someone/model", hub_token="hf_secret", hub_always_push=True,
    )  # fmt: skip
    run.train()
    with pytest.raises(HfHubHTTPError, match="403"):
        run.save_model()
    server.shutdown()

    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    assert faults(tmp_path / "checkpoint-4") == []
    kept = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert_same_state(load_file(tmp_path / "model.safetensors"), kept)
    saved = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert tmp_path / "training_args.bin" in saved
    assert [path for path in saved if b"hf_secret" in path.read_bytes()] == []
    for copied in (copy.copy(run.args), copy.deepcopy(run.args)):
        assert copied.hub_token == "hf_secret"


def test_a_push_gets_the_checkpoint_in_its_place(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda self, path: pushed.append(path))
    run = make(tmp_path)
    run.args.push_to_hub = True
    run.train()
    assert pushed == [str(tmp_path / f"checkpoint-{step}") for step in (2, 4)]


def test_the_best_checkpoint_is_known_by_its_place_and_the_newest_stays_beside_it(tmp_path):
    """Training once ended with only the best one, and a resume trained the later steps again."""
    settings = {
        "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "save_total_limit": 1, "learning_rate": 0.05,  # too high: the first is the best
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    (tmp_path / "checkpoint-2-good").mkdir()  # a copy that was set aside
    run = make(tmp_path, **settings)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[0] < losses[1]
    best = str(tmp_path / "checkpoint-2")
    assert run.state.best_model_checkpoint == best
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-2-good", "checkpoint-4"]
    saved = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == best

    again = make(tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert [entry for entry in again.state.log_history if entry["step"] > 4] == []
    assert_same_state(again.model.state_dict(), run.model.state_dict())


@pytest.mark.parametrize("kind", ["foreign folder", "foreign file"])
def test_a_checkpoint_that_is_a_link_is_replaced_and_not_followed(kind, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    target = outside if kind == "foreign folder" else outside / "precious.txt"
    (run / "checkpoint-2").symlink_to(target)

    make(run).train()

    assert not (run / "checkpoint-2").is_symlink()
    assert names(outside) == ["precious.txt"]
    assert (outside / "precious.txt").read_text() == "precious"


@pytest.mark.parametrize("what", ["file", "empty folder", "locked folder", "foreign folder"])
def test_what_lies_in_the_place_of_a_checkpoint_blocks_no_run(what, tmp_path):
    """A folder that could not be replaced once made every later run fail at the same step."""
    place = tmp_path / "checkpoint-2"
    if what == "file":
        place.write_text("not a checkpoint")
    else:
        place.mkdir(mode=0o500 if what == "locked folder" else 0o700)
        if what == "foreign folder":
            (place / "notes").mkdir()
            (place / "notes" / "model.safetensors").write_text("not a model")
    make(tmp_path, max_steps=2).train()
    assert names(tmp_path) == ["checkpoint-2"]
    assert faults(place) == []
    assert "notes" not in names(place)


def test_a_saved_model_takes_the_place_of_another_with_all_its_files(tmp_path):
    make(tmp_path, sharded=True, save_strategy="no").save_model()
    run = make(tmp_path, save_strategy="no")
    run.save_model()
    assert not list(tmp_path.glob("*-of-*"))
    assert_same_state(
        type(run.model).from_pretrained(tmp_path).state_dict(), run.model.state_dict()
    )


def test_a_model_that_cannot_be_saved_leaves_the_other(tmp_path, monkeypatch):
    run = make(tmp_path, save_strategy="no")
    run.save_model()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        run.save_model()
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


# --- resumed exactly ------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def flip(path: Path) -> None:
    """Flip one bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


NEEDED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
NEEDED += ["trainer_state.json"]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, empty, as_folder])
@pytest.mark.parametrize("name", NEEDED)
def test_a_damaged_checkpoint_is_found_by_name(name, damage, marked, runs, tmp_path):
    shutil.copytree(runs[False, marked], tmp_path, dirs_exist_ok=True)
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    damage(tmp_path / "checkpoint-4" / name)

    assert name in "; ".join(faults(tmp_path / "checkpoint-4"))
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("name", NEEDED)
def test_a_mark_finds_a_single_bit(name, runs, tmp_path):
    shutil.copytree(runs[False, True] / "checkpoint-4", tmp_path, dirs_exist_ok=True)
    flip(tmp_path / name)
    assert faults(tmp_path) == [f"{name} is not what was saved"]


def test_a_mark_of_0_2_0_is_understood(runs, tmp_path, monkeypatch):
    """Version 0.2.0 wrote CRC-32 check sums, and its checkpoints must be resumed."""
    monkeypatch.setattr("qft_hf.hf.checkpoint.CHUNK_BYTES", 100)
    shutil.copytree(runs[False, True] / "checkpoint-4", tmp_path, dirs_exist_ok=True)
    mark = json.loads((tmp_path / MARK).read_text())
    for name in mark["files"]:
        content = (tmp_path / name).read_bytes()
        mark["files"][name] = [len(content), zlib.crc32(content)]
    (tmp_path / MARK).write_text(json.dumps(mark))
    assert faults(tmp_path) == []

    flip(tmp_path / "optimizer.pt")
    assert faults(tmp_path) == ["optimizer.pt is not what was saved"]


@pytest.mark.parametrize("name", NEEDED)
def test_a_mark_knows_files_of_many_chunks(name, runs, tmp_path, monkeypatch):
    """The files here are short, so chunks are made shorter; the flipped bit is in the first one."""
    monkeypatch.setattr("qft_hf.hf.checkpoint.CHUNK_BYTES", 100)
    shutil.copytree(runs[False, True] / "checkpoint-4", tmp_path, dirs_exist_ok=True)
    assert faults(tmp_path) == []

    content = bytearray((tmp_path / name).read_bytes())
    assert len(content) > 300
    content[50] ^= 1
    (tmp_path / name).write_bytes(content)
    assert f"{name} is not what was saved" in faults(tmp_path)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_without_a_mark_archives_tell_by_themselves(name, runs, tmp_path):
    shutil.copytree(runs[False, False] / "checkpoint-4", tmp_path, dirs_exist_ok=True)
    flip(tmp_path / name)
    assert len(faults(tmp_path)) == 1
    assert name in faults(tmp_path)[0]


@pytest.mark.parametrize(
    "change",
    [{"global_step": -4}, {"global_step": True}, {"global_step": "4"}, {"steps_of_another": 4}],
    ids=str,
)
def test_without_a_mark_a_state_that_the_trainer_would_not_take_is_named(change, runs, tmp_path):
    """A run once went on from step -4, or failed with an error about constructor arguments."""
    shutil.copytree(runs[False, False] / "checkpoint-4", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))

    (fault,) = faults(tmp_path)

    assert fault.startswith("trainer_state.json ")


@pytest.mark.parametrize("mark", ["", "[]", "{", '{"files": null}', '{"files": ["optimizer.pt"]}'])
def test_a_mark_that_cannot_be_read_is_named(mark, runs, tmp_path):
    shutil.copytree(runs[False, True] / "checkpoint-4", tmp_path, dirs_exist_ok=True)
    (tmp_path / MARK).write_text(mark)
    assert MARK in "".join(faults(tmp_path))


def edit_index(checkpoint: Path, change) -> None:
    path = checkpoint / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("model-*.safetensors"))


def swap_shards(checkpoint: Path) -> str:
    one, other = shards(checkpoint)[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return one.name


def copy_shard(checkpoint: Path) -> str:
    shutil.copy(shards(checkpoint)[0], shards(checkpoint)[1])
    return shards(checkpoint)[1].name


def lose_shard(checkpoint: Path) -> str:
    shards(checkpoint)[1].unlink()
    return "model-00002-of-"


def lose_index(checkpoint: Path) -> str:
    (checkpoint / "model.safetensors.index.json").unlink()
    return "model.safetensors or model.safetensors.index.json is missing"


def take_from_outside(checkpoint: Path) -> str:
    (checkpoint.parent / "x").mkdir()
    shutil.copy(shards(checkpoint)[0], checkpoint.parent / "x" / "model.safetensors")
    edit_index(checkpoint, lambda index: index.update({min(index): "../x/model.safetensors"}))
    return "../x/model.safetensors is missing"


def second_run(checkpoint: Path) -> str:
    save_file({"a": torch.ones(1)}, checkpoint / "model.safetensors")
    return "model.safetensors and model.safetensors.index.json are two sets of weights"


def old_weights(checkpoint: Path) -> str:
    torch.save({"a": torch.ones(1)}, checkpoint / "pytorch_model.bin")
    return "model.safetensors.index.json and pytorch_model.bin are two sets of weights"


def empty_index(checkpoint: Path) -> str:
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json has no weight_map"


def index_of_numbers(checkpoint: Path) -> str:
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    return "model.safetensors.index.json has no weight_map"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        swap_shards, copy_shard, lose_shard, lose_index, take_from_outside, second_run,
        old_weights, empty_index, index_of_numbers,
    ],
)  # fmt: skip
def test_shards_that_do_not_belong_together_are_refused(damage, marked, runs, tmp_path):
    shutil.copytree(runs[True, marked], tmp_path, dirs_exist_ok=True)
    problem = damage(tmp_path / "checkpoint-4")

    run = make(tmp_path)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(ValueError, match="checkpoint-4 is not whole") as caught:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    assert problem in str(caught.value)
    assert_same_state(before, run.model.state_dict())
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def edit_weights(checkpoint: Path, change) -> None:
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def lose_layer(tensors) -> str:
    for name in [name for name in tensors if name.startswith("model.layers.1.")]:
        del tensors[name]
    return "model.layers.1."


def lose_field(tensors) -> str:
    del tensors["model.layers.0.mlp.up_proj.weight_scale"]
    return "model.layers.0.mlp.up_proj.weight_scale are missing"


def lose_norm(tensors) -> str:
    del tensors["model.norm.weight"]
    return "model.norm.weight are missing"


def lose_tied(tensors) -> str:
    for name in [name for name in tensors if "embed_tokens" in name or "lm_head" in name]:
        del tensors[name]
    return "embed_tokens"


def add_bias(tensors) -> str:
    tensors["lm_head.bias"] = torch.zeros(3)
    return "lm_head.bias are in it and not in the model"


@pytest.mark.parametrize("change", [lose_layer, lose_field, lose_norm, lose_tied, add_bias])
def test_other_weights_than_the_models_are_refused_by_name(change, runs, tmp_path):
    """The Trainer once went on with the weights that the model was built with."""
    shutil.copytree(runs[False, False], tmp_path, dirs_exist_ok=True)
    problem = []
    edit_weights(tmp_path / "checkpoint-2", lambda tensors: problem.append(change(tensors)))

    run = make(tmp_path)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not belong to this Llama.* Load a complete") as e:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert problem[0] in str(e.value)
    assert_same_state(before, run.model.state_dict())


def test_the_best_model_is_loaded_whole_or_not_at_all(runs, tmp_path):
    shutil.copytree(runs[False, False], tmp_path, dirs_exist_ok=True)
    edit_weights(tmp_path / "checkpoint-2", lose_layer)
    run = make(tmp_path)
    run.state.best_model_checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint-2 does not belong .* model\.layers\.1\."):
        run._load_best_model()


def test_momentum_that_is_gone_is_missed_by_name(runs, tmp_path):
    shutil.copytree(runs[False, False], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    del state["state"][0]
    torch.save(state, path)

    run = make(tmp_path)
    lost = next(name for name, p in run.model.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=rf"has no state for {lost}, which would go on"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def unused(model):
    """A model with a layer that no input ever reaches."""
    model.unused = torch.nn.Linear(4, 4)
    return model


@pytest.mark.parametrize("cls", [QFTTrainer, Trainer])
def test_a_parameter_that_never_had_momentum_needs_none(cls, tmp_path):
    """The marks that both Trainers write list such parameters, and the resume is exact."""
    straight = trainer_on(unused(tiny_llama()), tmp_path, cls, **STEPS)
    straight.train()
    resumed = trainer_on(unused(tiny_llama()), tmp_path, **STEPS, cls=QFTTrainer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_state(straight.model.state_dict(), resumed.model.state_dict())


def test_what_was_passed_over_is_said(runs, tmp_path, caplog):
    shutil.copytree(runs[False, True], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    run = make(tmp_path)
    run.train(resume_from_checkpoint=True)

    assert run.state.global_step == 4
    assert "checkpoint-4 is not whole and is skipped: optimizer.pt is missing" in caplog.text
    assert "checkpoint-2, the newest checkpoint that is whole" in caplog.text
    finished = runs[False, True] / "checkpoint-4" / "model.safetensors"
    again = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert_same_state(load_file(finished), again)


def test_no_whole_checkpoint_is_an_error_that_lists_them(runs, tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="checkpoint-7 is not whole: there is no such folder"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))

    shutil.copytree(runs[False, True], tmp_path, dirs_exist_ok=True)
    for checkpoint in tmp_path.iterdir():
        (checkpoint / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match=r"None of the 2 .*\n- checkpoint-4: sch.*\n- check.*-2"):
        make(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_optimizer_cannot_be_resumed(tmp_path):
    make(tmp_path, save_only_model=True).train()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing; rng_state\.pth is missing"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_a_killed_process_finished_is_resumed_from(runs, tmp_path):
    shutil.copytree(runs[False, True], tmp_path, dirs_exist_ok=True)
    draft = tmp_path / f"{PREFIX}abcd" / "whole"
    draft.mkdir(parents=True)
    shutil.move(tmp_path / "checkpoint-4", draft)
    half = tmp_path / f"{PREFIX}efgh" / "new" / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "config.json").write_text("{}")

    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]


# --- a finished run -------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [32, 16, 8])  # within an epoch, at its end, after two
@pytest.mark.parametrize("scheduler", ["linear", "constant"])
def test_resuming_a_finished_run_takes_no_step(scheduler, examples, tmp_path, caplog):
    """Every resume once took one step beyond the last and saved it."""
    first = make(tmp_path, lr_scheduler_type=scheduler)
    first.train_dataset = sequences(examples)
    first.train()
    for resume in (True, str(tmp_path / "checkpoint-4")):
        caplog.clear()
        again = make(tmp_path, lr_scheduler_type=scheduler)
        again.train_dataset = sequences(examples)
        output = again.train(resume_from_checkpoint=resume)
        assert output.global_step == again.state.global_step == 4
        assert_same_state(first.model.state_dict(), again.model.state_dict())
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
        assert "is at step 4 of 4: the run is finished, and no step was taken" in caplog.text


def test_a_finished_run_goes_on_when_it_is_given_more_steps(tmp_path, caplog):
    make(tmp_path, lr_scheduler_type="constant").train()
    again = make(tmp_path, max_steps=6, lr_scheduler_type="constant")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert "finished" not in caplog.text
    straight = make(tmp_path / "straight", max_steps=6, lr_scheduler_type="constant")
    straight.train()
    assert_same_state(straight.model.state_dict(), again.model.state_dict())


# --- the stock Trainer ----------------------------------------------------------------------


def test_the_stock_trainer_says_once_that_it_writes_in_place(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        make(tmp_path, Trainer).train()
    assert caplog.text.count("writes checkpoints in place") == 1
    caplog.clear()
    make(tmp_path / "none", Trainer, save_strategy="no").train()
    make(tmp_path / "ours").train()
    assert "writes checkpoints in place" not in caplog.text


def test_the_stock_trainers_checkpoints_are_marked_too(tmp_path):
    for _ in range(2):  # the second run overwrites the marked checkpoints of the first
        make(tmp_path, Trainer).train()
        for checkpoint in tmp_path.iterdir():
            assert faults(checkpoint) == []
            assert MARK in names(checkpoint)
    flip(tmp_path / "checkpoint-4" / "optimizer.pt")
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


class Heard(logging.Handler):
    """Record the messages of a logger, even if it does not propagate them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    logger, handler = logging.getLogger("transformers.trainer"), Heard()
    logger.addHandler(handler)
    yield handler.messages
    logger.removeHandler(handler)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_the_stock_trainer_leaves_no_int8_weights_out_of_a_float_model(sharded, runs, tmp_path):
    """The Trainer once trained the model as built, with a warning of unexpected keys."""
    checkpoint = shutil.copytree(runs[sharded, True] / "checkpoint-2", tmp_path / "checkpoint-2")
    for file in ("optimizer.pt", "scheduler.pt"):  # as with save_only_model
        (checkpoint / file).unlink()
    run = make(tmp_path, Trainer, optim="adamw_torch")

    with pytest.raises(ValueError, match=r"has INT8 weights, .*_q .*Set the optim=.* dequantize_"):
        run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 0


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_the_stock_trainer_misses_no_weight_that_is_tied(sharded, tmp_path, heard):
    """A tied weight is saved under one name; every resume once reported the other as missing."""
    straight = make(tmp_path / "straight", Trainer, sharded=sharded)
    straight.train()
    run = make(tmp_path, Trainer, sharded=sharded)
    again = str(tmp_path / "straight" / "checkpoint-2")

    run.train(resume_from_checkpoint=again)

    assert not [message for message in heard if "missing keys" in message]
    assert_same_state(straight.model.state_dict(), run.model.state_dict())


@pytest.mark.parametrize("kind", ["bias", "float table"])
def test_nor_what_is_tied_and_float(kind, tmp_path, heard):
    """A bias next to a tied weight, and a table that is float because of its listed head."""

    def run(folder):
        if kind == "bias":
            model = quantize_model_(BertForMaskedLM(tiny_bert().config), QFTConfig())
        else:
            config = QFTConfig(modules_to_not_convert=["lm_head"])
            model = quantize_model_(tiny_llama(tied=True), config)
        return trainer_on(model, folder, Trainer, **STEPS)

    run(tmp_path).train()
    again = run(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert not [message for message in heard if "missing keys" in message]
    straight = type(again.model).from_pretrained(tmp_path / "checkpoint-4")
    assert_same_state(straight.state_dict(), again.model.state_dict())


def test_the_stock_trainer_still_tells_what_is_missing(tmp_path, heard):
    """One weight is tied and the file has neither of its names; the other is not tied."""
    make(tmp_path, Trainer).train()
    lost = ("model.embed_tokens.weight_scale", "model.layers.1.mlp.up_proj.weight_q")
    edit_tensors(tmp_path / "checkpoint-2", lambda tensors: [tensors.pop(name) for name in lost])

    with pytest.raises(RuntimeError, match="mixture of two models"):
        make(tmp_path, Trainer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    (told,) = [message for message in heard if "missing keys" in message]
    for name in (*lost, "lm_head.weight_scale"):
        assert name in told
    assert told.count("weight_") == 3


# --- hooks and configuration ----------------------------------------------------------------


class Breaks(TrainerCallback):
    """Raise KeyboardInterrupt at the start of the third step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("cls", [QFTTrainer, Trainer])
@pytest.mark.parametrize("gradient", ["release", "stack"])
def test_hooks_do_not_outlive_training_that_failed(gradient, cls, tmp_path):
    """A later backward pass of the user's own once updated the weights."""
    run = make(tmp_path, cls, optim_args=f"gradient={gradient}")
    run.add_callback(Breaks())
    with pytest.raises(KeyboardInterrupt):
        run.train()

    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    ids = torch.arange(6)[None]
    run.model(input_ids=ids, labels=ids).loss.backward()
    assert_same_state(before, run.model.state_dict())
    assert run.model.lm_head.weight.grad is not None


@pytest.mark.parametrize("use_cache", [True, False])
def test_saved_configurations_have_the_use_cache_of_the_model(use_cache, tmp_path):
    model = tiny_llama()
    model.config.use_cache = use_cache
    run = trainer_on(model, tmp_path, QFTTrainer, **STEPS)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    for folder in ("checkpoint-2", "saved"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["use_cache"] is use_cache
    assert run.model.config.use_cache is False  # the Trainer's choice, for evaluation


def test_a_model_without_use_cache_gets_none(tmp_path):
    model = tiny_bert()
    vars(model.config).pop("use_cache", None)
    had = hasattr(model.config, "use_cache")
    run = trainer_on(model, tmp_path, QFTTrainer, save_strategy="no")
    run.save_model()
    assert ("use_cache" in json.loads((tmp_path / "config.json").read_text())) == had


@pytest.mark.parametrize("gradient", ["stack", "release"])
@pytest.mark.parametrize("cls", [QFTTrainer, Trainer])
def test_a_checkpoint_that_sigterm_requests_waits_for_the_end_of_the_step(cls, gradient, tmp_path):
    """The checkpoint was saved between backward and update, when releasing had moved weights.

    The resumed run took the step again from there: with `release` its losses were others.
    """
    dropout = {"attention_dropout": 0.3}  # a step that is repeated needs its random numbers
    run = {"optim_args": f"gradient={gradient}", "save_strategy": "no", "max_grad_norm": 0}
    straight = trainer_on(tiny_llama(**dropout), tmp_path / "straight", cls, **run)
    straight.train()

    folder = tmp_path / "run"
    trainer = trainer_on(tiny_llama(**dropout), folder, cls, enable_jit_checkpoint=True, **run)
    callbacks = trainer.callback_handler.callbacks
    manager = next(c for c in callbacks if isinstance(c, JITCheckpointCallback)).jit_manager
    manager.kill_wait = 0

    def terminate(*_):
        if trainer.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while not manager.is_checkpoint_requested:
                time.sleep(0.01)

    trainer.model.register_forward_hook(terminate)
    trainer.train()

    assert trainer.state.global_step == 3
    assert names(folder) == ["checkpoint-3"]
    resumed = trainer_on(tiny_llama(**dropout), folder, cls, **run)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed, "loss")[-3:] == history(straight, "loss")[-3:]
    assert_same_state(resumed.model, straight.model)


@pytest.mark.parametrize(
    "order",
    [
        {"train_sampling_strategy": "group_by_length"},
        {"accelerator_config": {"dispatch_batches": True}},
    ],
    ids=["grouped by length", "dispatched"],
)
def test_a_run_resumes_with_the_batches_of_the_straight_run(order, tmp_path):
    """In later epochs grouped rows once had the order of other random numbers.

    Dispatched ones had that of the first epoch.
    """
    rows = [{key: row[key][: 5 + n % 7] for key in row} for n, row in enumerate(sequences(16))]

    def run(folder, *, resume=None, **changes):
        steps = {"save_steps": 3, "max_steps": 9}
        args = arguments(folder, QFTTrainingArguments, **order, **steps, **changes)
        collator = DataCollatorForSeq2Seq(tiny_tokenizer())
        trainer = QFTTrainer(
            model=tiny_llama(), args=args, train_dataset=rows, data_collator=collator
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    straight = run(tmp_path, save_strategy="steps")
    for step in (3, 6):  # in the second and third epoch
        resumed = run(tmp_path / "again", resume=tmp_path / f"checkpoint-{step}")
        assert history(resumed, "loss") == history(straight, "loss")
        assert_same_state(resumed.model, straight.model)
    other = run(tmp_path / "other", data_seed=7)
    assert history(other, "loss") != history(straight, "loss")
