"""A draft becomes its target as a whole or not at all, and leaves nothing behind."""

import fcntl
import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from qft_hf.hf import atomic_writes
from qft_hf.hf.atomic_writes import atomic_folder, atomic_path, pending_drafts, recover_drafts


def contents(folder: Path) -> dict[str, str | None]:
    """Return the text of every file under a folder, and None for every folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_text()
        for path in sorted(folder.rglob("*"))
    }


def write(path: Path, text: str = "new") -> None:
    """Write a file, or, if the name has no dot, a folder with one file."""
    if "." not in path.name:
        path.mkdir(parents=True)
        path = path / "file.txt"
    path.write_text(text)


@pytest.mark.parametrize("name", ["summary.json", "export"])
@pytest.mark.parametrize("before", ["nothing", "a file", "a folder", "a link", "a dead link"])
def test_whatever_is_there_is_replaced(before, name, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    place = folder / name
    if before == "a file":
        place.write_text("old")
    elif before == "a folder":
        place.mkdir()
        (place / "old.txt").write_text("old")
    elif before != "nothing":
        place.symlink_to(outside if before == "a link" else tmp_path / "absent")

    with atomic_path(place) as draft:
        write(draft)

    expected = {name: "new"} if "." in name else {name: None, f"{name}/file.txt": "new"}
    assert contents(folder) == expected
    assert not place.is_symlink()
    assert contents(outside) == {"precious.txt": "precious"}


def fail_half_way(path: Path) -> None:
    with atomic_path(path) as draft:
        write(draft)
        raise OSError("disk full")


@pytest.mark.parametrize("name", ["summary.json", "export"])
def test_an_error_changes_nothing_and_says_so(name, tmp_path):
    write(tmp_path / name, "old")
    before = contents(tmp_path)

    with pytest.raises(OSError, match="disk full") as caught:
        fail_half_way(tmp_path / name)

    assert contents(tmp_path) == before
    assert "everything there is as it was. If the disk is full" in caught.value.__notes__[0]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_in_the_way_is_named_and_stays(below, tmp_path):
    """The user once saw Python's own traceback."""
    write(tmp_path / "file.txt", "precious")
    place = tmp_path / "file.txt" / below / "new.txt"
    with pytest.raises((FileExistsError, NotADirectoryError), match=r"nothing can be .* Choose an"):
        fail_half_way(place)
    assert contents(tmp_path) == {"file.txt": "precious"}


def test_files_have_the_permissions_that_others_have(tmp_path):
    with atomic_path(tmp_path / "new") as draft:
        write(draft)
    write(tmp_path / "plain")
    for name in ("", "file.txt"):
        modes = [(tmp_path / folder / name).stat().st_mode for folder in ("new", "plain")]
        assert modes[0] == modes[1]


def test_a_draft_is_fresh_and_nobody_elses(tmp_path, monkeypatch):
    """Draft names were once predictable, and an existing folder or link was written to."""
    victim = tmp_path / "victim"
    victim.mkdir()
    names = itertools.chain(["taken", "linked", "fresh"], map(str, itertools.count()))
    (tmp_path / f"{atomic_writes.PREFIX}taken").mkdir()
    (tmp_path / f"{atomic_writes.PREFIX}linked").symlink_to(victim)
    monkeypatch.setattr("tempfile._get_candidate_names", lambda: names)
    monkeypatch.setattr(atomic_writes, "recover_drafts", lambda folder: None)

    with atomic_path(tmp_path / "x.json") as draft:
        assert draft.parent.parent.name == f"{atomic_writes.PREFIX}fresh"
        assert draft.parent.parent.stat().st_mode & 0o077 == 0
        draft.write_text("x")

    assert contents(victim) == {}


def test_a_draft_is_no_checkpoint_to_the_trainer(tmp_path):
    """Rotation once counted the copy that was set aside and removed the checkpoint itself."""
    with atomic_path(tmp_path / "checkpoint-4") as draft:
        write(draft)
        assert sort_checkpoints(str(tmp_path)) == sort_checkpoints(str(tmp_path), use_mtime=True)
        assert list(tmp_path.glob("checkpoint*")) == []
        assert get_last_checkpoint(tmp_path) is None


def left(folder: Path, state: str, name: str = "checkpoint-4") -> Path:
    """Create what a killed process leaves, and return the draft."""
    draft = folder / f"{atomic_writes.PREFIX}abcd"
    write(draft / state / name)
    return draft


@pytest.mark.parametrize("state", [atomic_writes.NEW, atomic_writes.WHOLE, atomic_writes.MOVING])
@pytest.mark.parametrize("old", [False, True])
def test_what_a_killed_process_left_is_finished_if_it_counts(old, state, tmp_path):
    if old:
        write(tmp_path / "checkpoint-4", "old")
    left(tmp_path, state)
    assert bool(pending_drafts(tmp_path)) == (state != atomic_writes.NEW)

    recover_drafts(tmp_path)

    counts = state != atomic_writes.NEW
    expected = {"checkpoint-4": None, "checkpoint-4/file.txt": "new" if counts else "old"}
    assert contents(tmp_path) == (expected if counts or old else {})


def test_the_next_writer_settles_what_was_left(tmp_path):
    left(tmp_path, atomic_writes.WHOLE)
    with atomic_path(tmp_path / "x.json") as draft:
        assert (tmp_path / "checkpoint-4").exists()
        write(draft)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4", "x.json"]


def test_a_draft_of_a_living_process_is_left_alone(tmp_path):
    draft = left(tmp_path, atomic_writes.WHOLE)
    before = contents(tmp_path)
    descriptor = os.open(draft, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    recover_drafts(tmp_path)
    assert contents(tmp_path) == before
    os.close(descriptor)
    recover_drafts(tmp_path)
    assert "checkpoint-4/file.txt" in contents(tmp_path)


def test_a_link_that_looks_like_a_draft_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    left(elsewhere, atomic_writes.WHOLE).rename(elsewhere / "draft")
    before = contents(elsewhere)
    run = tmp_path / "run"
    run.mkdir()
    (run / f"{atomic_writes.PREFIX}link").symlink_to(elsewhere / "draft")

    assert pending_drafts(run) == []
    recover_drafts(run)

    assert contents(elsewhere) == before
    assert not (run / "checkpoint-4").exists()


def test_a_draft_of_another_user_is_left_alone(tmp_path, monkeypatch):
    left(tmp_path, atomic_writes.WHOLE)
    before = contents(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: -1)
    recover_drafts(tmp_path)
    assert contents(tmp_path) == before


MODEL = {"config.json": "old", "model.safetensors": "old", "notes.txt": "mine"}


SHARDED = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize("files", [["config.json", "model.safetensors"], SHARDED])
def test_a_model_replaces_all_files_of_another_and_no_others(files, tmp_path):
    for name, text in MODEL.items():
        (tmp_path / name).write_text(text)
    with atomic_folder(tmp_path) as draft:
        for name in files:
            (draft / name).write_text("new")
    assert contents(tmp_path) == {"notes.txt": "mine"} | dict.fromkeys(files, "new")


def killed_before_rename(n: int, folder: Path) -> bool:
    """Write a model in a process killed before rename n; return False if it has fewer renames."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == signal.SIGKILL
    renames = 0

    def count(event, arguments):
        nonlocal renames
        if event == "os.rename":
            renames += 1
            if renames > n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    with atomic_folder(folder) as draft:
        for name in SHARDED:
            (draft / name).write_text("new")
    os._exit(0)


def test_no_moment_has_a_config_beside_weights_that_are_not_its_own(tmp_path):
    """Killed before any rename, config.json is old, absent or new; the next writer finishes."""
    for n in itertools.count():
        folder = tmp_path / str(n)
        folder.mkdir()
        for name, text in MODEL.items():
            (folder / name).write_text(text)
        killed = killed_before_rename(n, folder)
        visible = {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}
        if "config.json" in visible:
            weights = {text for name, text in visible.items() if "safetensors" in name}
            assert weights == {visible["config.json"]}
        recover_drafts(folder)
        settled = {"notes.txt": "mine"} | dict.fromkeys(SHARDED, "new")
        assert contents(folder) == (MODEL if n == 0 else settled)
        if not killed:
            break
    assert n == 1 + 2 + 1 + 3  # commit, 2 old files out, the next state, 3 new files in


def test_files_and_folders_reach_the_disk_before_they_count(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    with atomic_path(tmp_path / "folder") as draft:
        write(draft / "inner")
    names = [Path(path).name for path in synced]
    assert names[:4] == ["file.txt", "inner", "folder", atomic_writes.NEW]
    assert names[-1] == tmp_path.name


def test_a_moved_away_folder_that_cannot_be_removed_blocks_nothing(tmp_path, monkeypatch, caplog):
    def refuse(path, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path / "export", "old")
    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", refuse)
        with atomic_path(tmp_path / "export") as draft:
            write(draft)
    assert (tmp_path / "export" / "file.txt").read_text() == "new"
    assert "could not be removed and stays" in caplog.text
    recover_drafts(tmp_path)
    assert os.listdir(tmp_path) == ["export"]
