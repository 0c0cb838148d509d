"""`qft-hf` shows its help at once, and refuses input in one sentence."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import fields
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from runpy import run_module
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import qft_hf
import qft_hf_cli
from qft_hf import (
    QFTConfig,
    QSTConfig,
    attach_side_network,
    quantize_model_,
    save_side_network,
)
from qft_hf.hf.atomic_writes import _sync, atomic_folder
from qft_hf.hf.finetune.parsing import GROUPS
from qft_hf.kernels.backend import _check_triton
from qft_hf.optim.norms import squares_of
from qft_hf_cli import COMMANDS, main
from qft_hf_cli.command_line import table
from qft_hf_cli.evaluate import flags_of
from tests.finetune.chats import CHATML, tiny_tokenizer
from tests.finetune.flags import write_jsonl
from tests.full_disk import files_of_at_most
from tests.models import tiny_llama

ROOT = Path(__file__).parents[2]


def help_text(*words, capsys):
    with suppress(SystemExit):  # how argparse ends
        main([*words, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=str)
def test_no_help_text_waits_for_pytorch(words):
    program = (
        "import sys; from qft_hf_cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'qft_hf', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program, *words, "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stderr == "set()\n"
    assert "qft-hf" in finished.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_text_fits_one_screen(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = help_text(name, capsys=capsys).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100


def test_the_command_lists_all_commands_with_a_line_for_each(capsys):
    text = help_text(capsys=capsys)
    modules = {path.stem for path in Path(qft_hf_cli.__file__).parent.glob("*.py")}
    assert set(COMMANDS) == modules - {"__init__", "command_line"}
    for name in COMMANDS:
        headline = sys.modules[f"qft_hf_cli.{name}"].__doc__.splitlines()[0]
        assert re.search(rf"^  {name} +{re.escape(headline)}$", text, re.MULTILINE)


def test_the_short_help_names_only_keys_that_there_are(capsys):
    known = {name for group in GROUPS for name in group.__dataclass_fields__}
    shown = set(re.findall(r"--(\w+)", help_text("finetune", capsys=capsys)))
    assert len(shown) > 40
    assert shown - known == {"json", "help"}


def test_help_all_has_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help-all"])
    shown = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert {f.name for group in GROUPS for f in fields(group) if f.init} - shown == set()


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"qft_hf {qft_hf.__version__}\n"


def test_an_unknown_command_lists_those_that_there_are(refused):
    assert "no command 'tune'. Commands: plan, " in refused("tune", status=2)


@pytest.mark.parametrize("command", ["check", "finetune", "evaluate"])
def test_a_wrong_value_is_reported_by_the_command_that_was_called(command, refused):
    error = refused(command, "--max_steps", "many", status=2)
    assert f"qft-hf {command}: error: argument --max_steps" in error


def test_what_is_refused_is_said_without_a_traceback(refused):
    error = refused("finetune", "nowhere.yaml")
    assert error.startswith("qft-hf finetune: no config nowhere.yaml (looked from ")
    assert "boolq_minilm, demo, llama2_7b_vicuna" in error


@pytest.mark.parametrize("place", ["nowhere", "runs/nowhere", "runs/first/checkpoint-2"])
def test_evaluate_names_a_folder_that_is_not_there(place, refused):
    assert f"No folder {place} (looked from" in refused("evaluate", place)
    flags = ["--model_name_or_path=runs/nowhere", "--use_cpu", "true"]
    assert flags_of(flags) == flags


def test_evaluate_asks_for_data_where_there_is_no_run(tmp_path, refused):
    """The command once asked for --train_data, with the usage of another program."""
    assert "has no run.yaml" in (error := refused("evaluate", tmp_path, "--use_cpu"))
    assert "Give --eval_data" in error


def test_a_reader_that_has_left_is_no_fault():
    """`| head -1` once ended in "Broken pipe", or in Python's error about an unflushed stream."""
    command = subprocess.Popen(
        [sys.executable, "-c", "import qft_hf_cli; qft_hf_cli.main()", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    command.stdout.close()
    assert [line for line in command.stderr.read().splitlines() if "ipe" in line] == []
    assert command.wait() == 141


def command_line(words, **streams):
    """Run a command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "import qft_hf_cli; qft_hf_cli.main()", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        **streams,
    )


@pytest.mark.parametrize("words", [["--help"], ["plan", "llama-2-7b", "--json"]], ids=str)
def test_a_full_disk_under_what_is_printed_is_told_in_a_line(words):
    with open("/dev/full", "w") as full:
        done = command_line(words, stdout=full)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "No space left on device. The command did not finish. Free some space.\n"
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_an_export_onto_a_full_disk_is_told_in_a_line_and_leaves_nothing(
    tmp_path, monkeypatch, capsys
):
    """Safetensors raises an error of its own, which once ended in a traceback."""
    qft_hf.quantize_model_(tiny_llama(), qft_hf.QFTConfig()).save_pretrained(tmp_path / "int8")
    monkeypatch.setattr(qft_hf_cli, "_print_no_more", lambda: None)  # it ends the output of pytest
    with files_of_at_most(5000), pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "int8"), str(tmp_path / "out" / "float")])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert re.search(r"qft-hf: .*File too large.* incomplete files were removed", error)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("room", [100, 5_000, 40_000])
def test_a_full_disk_under_torch_save_is_told_in_a_line(room, tmp_path, monkeypatch, capsys):
    """PyTorch raises a RuntimeError that names no disk, which once ended in a traceback."""

    def save(argv):
        with files_of_at_most(room), atomic_folder(tmp_path) as draft:
            torch.save({"weight": torch.ones(5_000), "more": torch.ones(7_000)}, draft / "x.pt")

    command = SimpleNamespace(__name__="finetune", main=save)
    monkeypatch.setattr(qft_hf_cli, "_module", lambda name: command)
    monkeypatch.setattr(qft_hf_cli, "_print_no_more", lambda: None)
    with pytest.raises(SystemExit) as stopped:
        main(["finetune"])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert re.match(r"qft-hf: torch\.save could not write a file\. Writing .* free some", error)
    assert list(tmp_path.iterdir()) == []


def test_another_pipe_that_breaks_is_told(monkeypatch):
    """One such pipe leads to a process that loads data, or to a service that logs."""
    reader, writer = os.pipe()
    os.close(reader)
    command = SimpleNamespace(__name__="finetune", main=lambda argv: os.write(writer, b"x"))
    monkeypatch.setattr(qft_hf_cli, "_module", lambda name: command)
    with pytest.raises(BrokenPipeError):
        main(["finetune"])
    os.close(writer)


@pytest.mark.parametrize("command", ["finetune", "check"])
def test_ctrl_c_is_no_fault(command, monkeypatch, refused):
    """Ctrl-C once ended in forty lines of traceback."""

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("qft_hf.hf.finetune.finetune", interrupted)
    monkeypatch.setattr("qft_hf.hf.finetune.check.check", interrupted)
    error = refused(command, "demo", "--use_cpu=true", status=130)
    assert error.endswith(f"qft-hf {command}: stopped.\n")


class Typed(StringIO):
    """Standard input of a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize("typed", ["", "\n", "how are you?\n", "how are you?\n\nnever read\n"])
def test_a_chat_ends_with_an_empty_line_or_with_its_input(typed, tmp_path, monkeypatch, capsys):
    """Ctrl-D once ended in a traceback, and with piped input "you: " preceded the answers."""
    tiny_llama(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    words = ["chat", str(tmp_path), "--max_new_tokens", "2"]
    monkeypatch.setattr("sys.stdin", Typed(typed))
    main(words)
    shown = capsys.readouterr().out
    assert shown.count("you: ") == (2 if typed.startswith("how") else 1)

    monkeypatch.setattr("sys.stdin", StringIO(typed))
    main(words)
    assert capsys.readouterr().out.split() == shown.replace("you:", "").split()


def test_a_conversation_that_is_too_long_for_the_model_is_refused(tmp_path, refused):
    """The answer was once empty, after minutes, or an IndexError from a table of positions."""
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2, n_positions=40)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for prompt in ("how are you?", "how are you? " * 9):
        words = ["chat", str(tmp_path), "--prompt", prompt, "--max_new_tokens", "100"]
        if prompt.endswith("?"):  # it has room for an answer of less than 100
            main(words)
            continue
        assert "the model has 40 positions, which leaves none" in refused(*words)


def test_a_text_that_no_template_can_show_is_refused(tmp_path, refused, monkeypatch):
    """Bytes that are not UTF-8, and a refused system message, once ended in tracebacks."""
    tiny_llama(vocab_size=320).save_pretrained(tmp_path)
    refusing = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    tiny_tokenizer(refusing + CHATML).save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", StringIO("caf\udce9\n"))
    for words, text in (
        ([], "is not in UTF-8"),
        (["--prompt", "caf\udce9"], "for example by iconv"),
        (["--prompt", "a", "--system", "\udce9"], "is not in UTF-8"),
        (["--prompt", "a", "--system", "b"], "no system. Its roles are system, user; many"),
    ):
        assert text in refused("chat", tmp_path, "--max_new_tokens", "2", *words)


def test_damaged_weights_are_named_before_a_chat(tmp_path, refused):
    tiny_llama(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    error = refused("chat", tmp_path, "--prompt", "how are you?")
    assert str(weights) in error
    assert "copy it again" in error


@pytest.mark.parametrize("command", ["chat", "evaluate"])
@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": []}'])
def test_an_index_without_weights_is_named(command, index, tmp_path, capsys):
    """It ended in errors of transformers: a KeyError, a TypeError or an AttributeError."""
    tiny_llama(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    words = ["--prompt=a"] if command == "chat" else [f"--eval_data={rows}", "--max_length=32"]
    with pytest.raises(SystemExit):
        main([command, str(tmp_path), *words])
    assert f"{tmp_path} cannot be loaded: model.safetensors.index.json" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["chat", "evaluate", "export"])
@pytest.mark.parametrize(
    ("name", "length", "said"),
    [
        (
            "tokenizer.json",
            None,
            "its tokenizer cannot be read (KeyError: 'added_tokens'). It is d",
        ),
        ("tokenizer.json", 500, "its tokenizer cannot be read (JSONDecodeError: "),
        ("tokenizer_config.json", 2, "its tokenizer cannot be read (JSONDecodeError: "),
        ("config.json", 20, "config.json' is not a valid JSON file."),
    ],
)
def test_a_damaged_tokenizer_is_named(command, name, length, said, tmp_path, refused):
    """It once ended in a traceback, and a damaged config.json in advice about tokenizers."""
    source = tmp_path / "int8"
    quantize_model_(tiny_llama(vocab_size=320), QFTConfig()).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    text = (source / name).read_text()
    (source / name).write_text("{}" if length is None else text[:length])
    words = {
        "chat": ["--prompt=a"],
        "evaluate": ["--eval_data=absent.jsonl", "--use_cpu"],
        "export": [str(tmp_path / "plain")],
    }
    error = refused(command, source, *words[command])
    assert f"{source} cannot be loaded: " in error
    assert said in error
    assert ("tokenizer_name_or_path" in error) == (command == "evaluate" and "config" not in said)
    assert "disk" not in error
    assert not (tmp_path / "plain").exists()


def test_what_is_no_text_is_said_to_be_none(tmp_path, monkeypatch, refused):
    tiny_llama(vocab_size=320).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("sys.stdin", TextIOWrapper(BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    assert "the piped input is not utf-8" in refused("chat", tmp_path)


def test_a_run_that_has_not_finished_is_called_so(tmp_path, refused):
    """The error once said that the Hub does not have it."""
    (tmp_path / "run.yaml").write_text("train_data: x.jsonl\noutput_dir: .\n")
    for command in ("chat", "evaluate"):
        assert "is of a run that has not finished" in refused(command, tmp_path)


def test_a_side_network_without_a_tokenizer_says_which_one_it_needs(tmp_path, refused):
    """`save_side_network` writes none; the Hub was said not to have such a model."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    save_side_network(attach_side_network(base, QSTConfig(r=4)), tmp_path / "side")
    (tmp_path / "side" / "run.yaml").write_text(f"model_name_or_path: {tmp_path / 'base'}\n")
    assert "holds a side network and no tokenizer. Save that of its" in refused(
        "chat", tmp_path / "side", "--prompt", "hi"
    )


@pytest.mark.parametrize(
    ("flag", "value", "wanted"),
    [
        ("--max_new_tokens", "0", "1 or more"),
        ("--temperature", "-0.5", "0 or more"),
        ("--temperature", "nan", "0 or more"),
        ("--temperature", "inf", "0 or more"),
        ("--seed", "-1", "in [0, 2**32)"),
    ],
)
def test_an_answer_has_a_token_at_least(flag, value, wanted, refused):
    error = refused("chat", "anywhere", flag, value, status=2)
    assert f"{flag} must be {wanted}, got {value}" in error


def test_a_folder_that_may_not_be_read_is_named(tmp_path, refused, monkeypatch):
    """Each command ended in a traceback."""

    def refusing(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refusing)
    for command in ("inspect", "export", "chat", "report", "card", "evaluate"):
        target = [tmp_path / "plain"] if command == "export" else []
        error = refused(command, tmp_path, *target)
        assert error.startswith(f"qft-hf {command}: [Errno 13] Permission denied: '{tmp_path}/")
        assert "Ask its owner for permission" in error


@pytest.mark.parametrize(
    "words",
    [["inspect"], ["chat"], ["evaluate"], ["check"], ["check", "demo", "--train_data"]],
    ids=" ".join,
)
def test_a_text_in_place_of_a_path_is_named(words, refused):
    """Each command ended in a traceback."""
    error = refused(*words, "How are you? " * 30)
    assert error.startswith(f"qft-hf {words[0]}: ")
    assert "How are you? How are you?" in error
    # From Python 3.14 on, such a file does not exist, and the error is that of a missing one.
    assert "Is it a text in place of a path?" in error or sys.version_info >= (3, 14)


def test_what_nobody_refused_keeps_its_traceback(monkeypatch):
    """A ValueError of other code is a fault to be found, not a text for users."""
    monkeypatch.setattr("qft_hf.hf.finetune.finetune", lambda arguments: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        main(["finetune", "demo", "--use_cpu=true"])


def test_what_c_code_refuses_keeps_its_traceback(monkeypatch):
    """No function of PyTorch has a frame of its own, so its errors passed for those of qft_hf."""
    for call, text in (
        (lambda _: squares_of(torch.ones(2, dtype=torch.int64)), "linalg.vector_norm"),
        (lambda _: table(["one"], [["of", "two"]]), "zip"),
    ):
        monkeypatch.setattr("qft_hf.hf.finetune.finetune", call)
        with pytest.raises((RuntimeError, ValueError), match=text):
            main(["finetune", "demo", "--use_cpu=true"])


def test_what_c_code_says_of_a_file_is_a_text_for_users(monkeypatch, refused, tmp_path):
    absent = tmp_path / "absent"
    monkeypatch.setattr("qft_hf.hf.finetune.finetune", lambda _: _sync(absent))
    error = refused("finetune", "demo", "--use_cpu=true")
    assert error.startswith("qft-hf finetune: ")
    assert str(absent) in error


def test_a_machine_that_runs_no_kernels_is_said_without_a_traceback(monkeypatch, refused):
    """Only errors of other kinds than RuntimeError were."""
    monkeypatch.setattr("qft_hf.kernels.backend.version", lambda _: "2.1")
    monkeypatch.setattr(
        "qft_hf.hf.finetune.finetune", lambda _: _check_triton(torch.device("cuda"))
    )
    error = refused("finetune", "demo", "--use_cpu=true")
    assert error.startswith("qft-hf finetune: The INT8 kernels on cuda need triton 3.")
    assert "pip install 'triton>=" in error


def test_python_m_is_the_same_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["-m", "--version"])
    run_module("qft_hf", run_name="__main__", alter_sys=True)
    assert capsys.readouterr().out == f"qft_hf {qft_hf.__version__}\n"
