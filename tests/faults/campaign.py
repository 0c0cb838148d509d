"""Kill runs while they write, resume them, and compare them with an uninterrupted run.

    python -m tests.faults.campaign QFTTrainer --kills 100 --seed 7

Each printed line is one kill: how it was done, and what is wrong afterwards (nothing). A process is
killed before its n-th change of a file name or n-th opening of a file to write, at any place of the
run; or when a file grows beyond n bytes, which is inside a write of safetensors or torch. On a full
disk that write fails, and the process may continue.
One process imports everything and forks for each run.
"""

import argparse
import faulthandler
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers.trainer_utils import get_last_checkpoint

from qft_hf import QFTConfig, QFTTrainer, quantize_model_
from qft_hf.hf.atomic_writes import PREFIX, pending_drafts
from qft_hf.hf.checkpoint import faults
from qft_hf.hf.finetune import export_checkpoint, parse_arguments, prepare, train
from tests.finetune.chats import CHATS, tiny_tokenizer
from tests.hf.test_trainer import trainer_on
from tests.models import tiny_llama

STEPS, EVERY = 4, 2
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink"}
# A kill at the limit of file sizes must not write a core file.
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Killer:
    """Counts the changes of files under a folder, and kills the process before the n-th."""

    def __init__(self, folder: Path, n: int | None) -> None:
        self.folder, self.n, self.counted = str(folder), n, 0

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self._changes(event, arguments):
            return
        self.counted += 1
        if self.counted == self.n:
            os.kill(os.getpid(), signal.SIGKILL)

    def _changes(self, event: str, arguments: tuple) -> bool:
        if event == "open":
            path, _, flags = arguments
            return self._inside(path) and bool((flags or 0) & WRITING)
        # shutil.rmtree passes names relative to an open folder.
        return event in CHANGES and (self._inside(arguments[0]) or arguments[-1] not in (-1, None))

    def _inside(self, path: object) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(
            self.folder
        )


def in_child(work: Callable[[], object], report: Path, *, kill: str = "", n: int = 0) -> int:
    """Do some work in a fork, write its result or error to `report`, and return its exit status."""
    report.unlink(missing_ok=True)
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    gc.freeze()  # a run ends with a garbage collection, which need not visit imported objects
    faulthandler.disable()
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    status = 0
    try:
        killer = Killer(report.parent / "run", n if kill == "call" else None)
        sys.addaudithook(killer)
        if kill in ("bytes", "full"):
            handler = signal.SIG_DFL if kill == "bytes" else signal.SIG_IGN  # then writing fails
            signal.signal(signal.SIGXFSZ, handler)
            resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
        result = work()
        report.write_text(json.dumps({"result": result, "counted": killer.counted}))
    except BaseException:  # noqa: BLE001 all of it is the report
        report.write_text(json.dumps({"error": traceback.format_exc()[-1500:]}))
        status = 1
    os._exit(status)


def digest(state: dict) -> float:
    """Return one number for all tensors and their places; equal bits give equal numbers."""
    total = 0.0
    for name, tensor in sorted(state.items()):
        flat = torch.as_tensor(tensor).flatten().double()
        place = torch.arange(1, flat.numel() + 1, dtype=torch.float64)
        total += float((flat * place).sum()) * (1 + len(name) / 100)
    return total


def finished(trainer: QFTTrainer) -> list:
    """Return the results of a run, to be compared exactly."""
    optimizer = trainer.optimizer.optimizer.state_dict()["state"]
    momentum = {f"{i}.{name}": value for i, s in optimizer.items() for name, value in s.items()}
    log = [(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e]
    weights = digest(trainer.model.state_dict())
    return json.loads(json.dumps([trainer.state.global_step, weights, digest(momentum), log]))


def settings(folder: Path, seed: int) -> dict:
    """Return one of several configurations, chosen by a number."""
    release = bool(seed & 1)
    return {
        "output_dir": str(folder), "max_steps": STEPS, "save_strategy": "steps",
        "save_steps": EVERY, "save_total_limit": 1 + (seed >> 1) % 2, "logging_steps": 1,
        "learning_rate": 1e-3, "per_device_train_batch_size": 2, "seed": 3,
        "gradient_accumulation_steps": 1 + (seed >> 2) % 2,
        "optim_args": f"gradient={'release,clipping=exact' if release else 'stack'}",
    }  # fmt: skip


def run_trainer(work: Path, folder: Path, seed: int, resume: bool) -> list:
    """Train with QFTTrainer, from the newest checkpoint or from the start."""
    values = settings(folder, seed)
    del values["output_dir"]
    trainer = trainer_on(tiny_llama(tied=True), folder, QFTTrainer, **values)
    trainer.train(resume_from_checkpoint=resume)
    return finished(trainer)


def run_finetune(work: Path, folder: Path, seed: int, resume: bool) -> list:
    """Run all of `qft-hf finetune`."""
    values = settings(folder, seed) | {
        "model_name_or_path": work / "model", "train_data": work / "train.jsonl",
        "max_length": 48, "use_cpu": "true", "disable_tqdm": "true", "report_to": "none",
        "export_dtype": "float32",
    }  # fmt: skip
    if resume:
        values["resume_from_checkpoint"] = "true"
    elif folder.exists() and any(folder.iterdir()):
        values["overwrite_output"] = "true"
    run = prepare(parse_arguments([f"--{name}={value}" for name, value in values.items()]))
    train(run)
    needed = {"config.json", "model.safetensors", "summary.json", "loss_curve.png", "float32"}
    if missing := needed - {path.name for path in folder.iterdir()}:
        raise FileNotFoundError(f"the run left no {missing}")
    return finished(run.trainer)


def run_export(work: Path, folder: Path, seed: int, resume: bool) -> list:
    """Export into an empty folder, or over an earlier export."""
    folder.mkdir(exist_ok=True)
    target = folder / "plain"
    export_checkpoint(work / "int8", target, dtype=torch.float32, replace=True)
    return sorted([path.name, path.stat().st_size] for path in target.iterdir())


ENTRIES = {"QFTTrainer": run_trainer, "finetune": run_finetune, "export": run_export}


def prepare_inputs(work: Path) -> None:
    """Write a model, its tokenizer, conversations, and an INT8 checkpoint."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(vocab_size=len(tokenizer), tied=True)
    for folder in ("model", "int8"):
        model.save_pretrained(work / folder)
        tokenizer.save_pretrained(work / folder)
        quantize_model_(model, QFTConfig())
    rows = [{"messages": messages} for messages in list(CHATS.values()) * 4]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def problems(entry: str, work: Path, seed: int, expected: list, again: dict) -> list[str]:
    """Return what is wrong after a kill, also of a resumed run, which `again` kills once more."""
    folder, report = work / "run", work / "report.json"
    found = []
    last = get_last_checkpoint(folder) if folder.exists() else None
    if last and (broken := faults(Path(last))):
        found.append(f"the last checkpoint is there and not whole: {broken}")
    plain = folder / "plain"
    if plain.exists() and sorted([p.name, p.stat().st_size] for p in plain.iterdir()) != expected:
        found.append("the export is there and not whole")
    for kill in (again, {}) if again else ({},):
        in_child(lambda: ENTRIES[entry](work, folder, seed, can_resume(folder)), report, **kill)
    said = json.loads(report.read_text())
    if "error" in said:
        found.append(said["error"])
    elif said["result"] != expected:
        found.append(f"the resumed run is another: {said['result']}, expected {expected}")
    if left := [path.name for path in folder.rglob(f"{PREFIX}*")]:
        found.append(f"left behind: {left}")
    return found


def can_resume(folder: Path) -> bool:
    """Whether there is a checkpoint, in its final place or still in a draft."""
    if not folder.exists():
        return False
    drafts = pending_drafts(folder)
    return bool(get_last_checkpoint(folder) or any(list(d.glob("*/checkpoint-*")) for d in drafts))


def main() -> None:
    """Kill, look, resume, compare; one line of JSON for each kill."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("entries", choices=ENTRIES, nargs="+")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-disks", type=int, default=0, help="and so many full disks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        prepare_inputs(Path(name))
        for entry in arguments.entries:
            for full, n in ((False, arguments.kills), (True, arguments.full_disks)):
                for line in kill_runs(entry, Path(name), kills=n, seed=arguments.seed, full=full):
                    print(json.dumps(line), flush=True)  # noqa: T201


def kill_runs(
    entry: str, work: Path, *, kills: int, seed: int, full: bool = False
) -> Iterator[dict]:
    """Kill one entry, or fill its disk, at places all over its run and in several settings."""
    chance = random.Random(seed)
    references: dict[int, tuple[list, int, int]] = {}
    folder, report = work / "run", work / "report.json"
    for number in range(kills):
        setting = number // 3 % 8

        def start(setting: int = setting) -> list:
            return ENTRIES[entry](work, folder, setting, False)

        if setting not in references:
            if in_child(start, report):
                raise RuntimeError(json.loads(report.read_text())["error"])
            said = json.loads(report.read_text())
            largest = max(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            references[setting] = said["result"], said["counted"], largest
            shutil.rmtree(folder)
        expected, count, largest = references[setting]
        kill = "full" if full else "bytes" if number % 3 == 2 else "call"
        whole = count if kill == "call" else largest
        # Each kill of the campaign is at a random place in its own part of the run.
        n = 1 + int((number + chance.random()) / kills * whole)
        line = {"entry": entry, "kill": kill, "n": n, "of": whole, "setting": setting}
        line["status"] = in_child(start, report, kill=kill, n=n)
        line["after"] = layout(folder)
        # Half of the resumed runs are killed as well: leftovers must not pile up.
        again = {"kill": kill, "n": n} if number % 2 else {}
        line["problems"] = problems(entry, work, setting, expected, again)
        yield line
        shutil.rmtree(folder, ignore_errors=True)


def layout(folder: Path) -> list[str]:
    """Return the names of the files that a kill left."""
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


if __name__ == "__main__":
    main()
