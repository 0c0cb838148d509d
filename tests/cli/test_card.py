"""`qft-hf card`: facts that a run knows, and facts that only its user knows."""

import pytest
from huggingface_hub import ModelCard

from qft_hf.hf.finetune import finetune
from qft_hf.hf.licenses import license_warning
from qft_hf_cli import main
from tests.finetune.test_run import chat_flags, parsed

__all__ = ["chat_flags"]  # the fixture


def test_the_card_of_a_run_takes_what_only_its_user_knows(chat_flags, capsys, caplog):
    base = chat_flags["model_name_or_path"]
    finetune(parsed(chat_flags))
    run = chat_flags["output_dir"]
    first = ModelCard.load(run / "README.md")
    assert first.data.license is None
    assert "the model card names no license" in caplog.text

    flags = ["--license=mit", "--base_model=org/base", "--dataset", "org/chats", "--name=org/mine"]
    main(["card", str(run), *flags, "--language", "en", "de"])

    assert capsys.readouterr().out.endswith(f"written to {run / 'README.md'}\n")
    card = ModelCard.load(run / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "org/base")
    assert card.data.language == ["en", "de"]
    assert "on [org/chats]" in card.text
    assert "train.jsonl" not in card.text
    assert 'from_pretrained("org/mine")' in card.text
    assert "| 4 |" in card.text
    for text in (str(card), str(first)):
        assert str(base.parent) not in text

    main(["card", str(run), "--language", "fr", "--tags", "chat"])
    second = ModelCard.load(run / "README.md")
    assert (second.data.license, second.data.base_model) == ("mit", "org/base")
    assert second.data.language == ["fr"]
    assert "on [org/chats]" in second.text
    main(["card", str(run), "--license=apache-2.0"])
    third = ModelCard.load(run / "README.md").data
    assert (third.license, third.language) == ("apache-2.0", ["fr"])
    assert third.tags.count("chat") == 1


def test_a_card_has_the_name_on_the_hub_before_anything_is_pushed(chat_flags):
    """The folder may be uploaded later, so `hub_model_id` has an effect without `push_to_hub`."""
    finetune(parsed(chat_flags, hub_model_id="org/later"))
    run = chat_flags["output_dir"]
    assert 'from_pretrained("org/later")' in (run / "README.md").read_text()

    main(["card", str(run), "--license=mit"])
    assert 'from_pretrained("org/later")' in (run / "README.md").read_text()


@pytest.mark.parametrize("method", [{}, {"method": "qst", "side_r": 2, "base": "int8"}])
def test_a_resumed_run_keeps_what_its_card_was_told(method, chat_flags):
    flags = chat_flags | method | {"save_strategy": "steps", "save_steps": 2}
    finetune(parsed(flags))
    run = flags["output_dir"]
    assert "qft_hf" not in ModelCard.load(run / "README.md").data.tags
    main(["card", str(run), "--license=mit", "--language", "de", "--dataset", "org/chats"])
    finetune(parsed(flags, max_steps=6, resume_from_checkpoint="true"))
    card = ModelCard.load(run / "README.md")
    assert (card.data.license, card.data.language) == ("mit", ["de"])
    assert "on [org/chats]" in card.text
    assert "| 6 |" in card.text


@pytest.mark.parametrize(
    ("front", "language"),
    [("language: en\ntags: chat\nbase_model: [a, b]", ["en"]), ("language: [en", None)],
)
def test_a_card_that_was_edited_by_hand_is_read_as_far_as_it_can_be(
    front, language, chat_flags, caplog
):
    finetune(parsed(chat_flags))
    page = chat_flags["output_dir"] / "README.md"
    _, _, text = page.read_text().split("---\n", 2)
    page.write_text(f"---\n{front}\n---\n{text}")
    main(["card", str(page.parent), "--license=mit"])
    card = ModelCard.load(page).data
    assert (card.license, card.language, card.base_model) == ("mit", language, None)
    assert ("cannot be read, so nothing of it is kept" in caplog.text) == (language is None)


def test_the_license_is_that_of_the_base(chat_flags):
    page = chat_flags["model_name_or_path"] / "README.md"
    page.write_text("---\nlicense: gemma\n---\n# A base\n")
    finetune(parsed(chat_flags))
    assert ModelCard.load(chat_flags["output_dir"] / "README.md").data.license == "gemma"


def test_a_page_of_somebody_s_own_stays(chat_flags, refused):
    """Its own page, or the card with an introduction of the user's."""
    finetune(parsed(chat_flags))
    page = chat_flags["output_dir"] / "README.md"
    for own in (
        "# Mine\n",
        page.read_text().replace("## Results", "It speaks Welsh.\n\n## Results"),
    ):
        page.write_text(own)
        assert "so it stays as it is. Move it away" in refused("card", page.parent)
        assert page.read_text() == own


def test_a_folder_without_a_run_says_what_to_give(tmp_path, refused):
    assert "holds no finished run: it has no summary.json" in refused("card", tmp_path)


@pytest.mark.parametrize(
    ("license", "said"),
    [
        ("Apache 2.0", "Is it apache-2.0"),
        ("cc-by-4", "cc-by-4.0"),
        ("nonsense", "For a license without an identifier, give other"),
        ("llama3.1", None),
        ("other", None),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_doubted(license, said):
    """`nonsense` was once written into the card silently, and the Hub refuses such a card."""
    assert said is None if (found := license_warning(license)) is None else said in found


def test_a_doubted_license_is_written_and_said(chat_flags, capsys):
    finetune(parsed(chat_flags))
    run = chat_flags["output_dir"]
    main(["card", str(run), "--license", "llama5"])  # which may come
    assert "not known to accept the license 'llama5'" in capsys.readouterr().err
    assert ModelCard.load(run / "README.md").data.license == "llama5"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("summary.json", "{}", "summary.json (qft_hf of another program) or"),
        ("summary.json", "[]", "summary.json is not a JSON object"),
        ("trainer_state.json", "{}", "records less than a card needs ('log_history')"),
        ("config.json", "{", "cannot be loaded: It looks like the config file"),
    ],
)
def test_damaged_files_of_a_run_are_named(name, text, said, chat_flags, refused):
    finetune(parsed(chat_flags))
    run = chat_flags["output_dir"]
    before = (run / "README.md").read_bytes()
    (run / name).write_text(text)
    assert said in refused("card", run)
    assert (run / "README.md").read_bytes() == before
