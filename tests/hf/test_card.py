"""The Hub can parse a model card, and everything in the card is true."""

import ast
import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import Trainer

from qft_hf import QFTConfig, QFTTrainer
from qft_hf.hf.card import card, is_card, write_card
from qft_hf.hf.card_facts import CardFacts, optimizer_of
from tests.hf.test_trainer import arguments, sequences
from tests.models import tiny_llama

HISTORY = [
    {"step": 0, "epoch": 0.0, "eval_loss": 4.25, "eval_model_preparation_time": 0.01},
    {"step": 2, "loss": 3.5, "learning_rate": 1e-4, "qft/skipped_steps": 0.0},
    {"step": 4, "epoch": 1.0, "eval_loss": 2.75, "eval_accuracy": 0.625, "eval_runtime": 0.1},
    {"step": 6, "loss": 2.5},
]
FACTS = CardFacts(
    name="org/tuned",
    architecture="LlamaForCausalLM",
    parameters=(1_000, 990),
    base_model="org/base",
    datasets=["org/chats"],
    optimizer="Lion (arXiv:2302.06675) with momentum stored as INT8",
    hyperparameters={"learning rate": 1e-4, "betas": (0.9, 0.98)},
    format=QFTConfig(group_size=64, outlier_fraction=0.02),
    state_bytes={"INT8 weights": 1_000_000, "momentum": 1_016_000},
    history=HISTORY,
    license="apache-2.0",
    language=["en"],
    tags=["mine"],
    versions={"qft_hf": "0.2.0"},
)


def read(facts):
    """Parse a card as the Hub does; invalid metadata raise."""
    return ModelCard(str(card(facts)), ignore_metadata_errors=False)


def test_metadata_are_those_that_the_hub_knows():
    data = read(FACTS).data.to_dict()

    index = data.pop("model-index")
    assert data == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "datasets": ["org/chats"],
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["full-parameter-fine-tuning", "int8", "mine", "qft"],
    }
    name, results = model_index_to_eval_results(index)
    assert name == "org/tuned"
    found = {result.metric_type: (result.metric_value, result.dataset_type) for result in results}
    assert found == {"loss": (2.75, "org/chats"), "accuracy": (0.625, "org/chats")}


def test_all_evaluations_are_in_one_table_whatever_each_has():
    """Transformers' card raises KeyError, as only the first one has `model_preparation_time`."""
    text = read(FACTS).text
    assert "| step | loss | accuracy |" in text
    assert "| 0 | 4.2500 |  |" in text
    assert "| 4 | 2.7500 | 0.6250 |" in text
    assert "preparation" not in text
    assert "was 3.5000 at step 2 and 2.5000 at step 6" in text


def test_what_is_not_known_is_not_told():
    facts = CardFacts(name="out", architecture="BertForSequenceClassification", parameters=(9, 9))
    found = read(facts)

    assert set(found.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert found.data.pipeline_tag == "text-classification"
    assert "tuned from a local model. 9 of its 9 parameters" in found.text
    assert "updated by" not in found.text
    assert "No loss was logged." in found.text
    assert "Not measured: no step was taken." in found.text
    assert "None is stated here" in found.text
    assert "scratch" not in found.text


def test_the_text_has_the_hyperparameters_of_the_optimizer_and_both_papers():
    text = read(FACTS).text
    assert "990 of its 1,000 parameters were trained" in text
    assert "| betas | (0.9, 0.98) |" in text
    assert "| outliers in FP32 | 2 % of each row |" in text
    assert "| scales | FP32, per 64 inputs |" in text
    assert "| all | 2.0 | 2016.000 |" in text
    for entry in ("Li, Zhikai", "arXiv:2310.07147", "Chen, Xiangning", "arXiv:2302.06675"):
        assert entry in text


def test_local_data_have_no_result_on_the_hub():
    data = read(replace(FACTS, datasets=[], files=["train.jsonl"])).data
    assert data.eval_results is None
    assert data.datasets is None
    assert "model-index" not in data.to_dict()


@pytest.mark.parametrize("export_dtype", [None, "bfloat16"])
def test_the_commands_are_those_of_a_reader(export_dtype):
    text = read(replace(FACTS, export_dtype=export_dtype)).text
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for block in blocks:
        ast.parse(block)
    assert 'LlamaForCausalLM.from_pretrained("org/tuned")' in blocks[0]
    assert 'qft_hf.dequantize_model_(model).save_pretrained("tuned-bf16")' in blocks[1]
    assert len(blocks) == (2 if export_dtype is None else 3)
    assert "scripts/" not in text
    if export_dtype:
        assert 'from_pretrained("org/tuned", subfolder="bfloat16")' in blocks[2]
        assert "qft_hf" not in blocks[2]


@pytest.mark.parametrize("side", [None, {"base": "float", "r": 2}])
def test_any_name_of_a_folder_leaves_the_card_as_it_is_built(side):
    """Quotes ended the Python string, and a line break or `|` the heading, the code or the row."""
    name = 'a "b" \\n | `c`\n<d>'
    facts = replace(FACTS, name=name, base_model=None, files=[name, "e"], side=side)
    text = read(replace(facts, hyperparameters={"scheduler": {"a | b": 1}})).text
    calls = [
        node
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call)
    ]
    assert name in [
        argument.value for c in calls for argument in c.args if hasattr(argument, "value")
    ]
    assert '# a "b" \\n | `c` &lt;d&gt;\n' in text
    assert '`` a "b" \\n | `c` <d> ``, the local file `e`' in text
    assert "| scheduler | {'a \\| b': 1} |" in text


def test_the_trainer_s_card_has_no_path_and_the_optimizer_s_own_values(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}")
    tiny_llama().save_pretrained(tmp_path / "base")
    model = tiny_llama().from_pretrained(tmp_path / "base")
    args = arguments(
        tmp_path / "out", max_steps=2, optim_args="beta2=0.95", weight_decay=0.25, seed=5
    )
    trainer = QFTTrainer(model=model, args=args, train_dataset=sequences())
    trainer.train()
    trainer.create_model_card(dataset=[str(data), "org/chats"], language="de", license="mit")

    found = ModelCard.load(tmp_path / "out" / "README.md")
    assert str(tmp_path) not in str(found)
    assert "[org/chats](https://huggingface.co/datasets/org/chats), the local file" in found.text
    assert "`rows.jsonl`" in found.text
    assert "tuned from a local model" in found.text
    assert "| betas | (0.9, 0.95) |" in found.text
    assert "| weight decay | 0.25 |" in found.text
    assert "| steps | 2 |" in found.text
    assert found.data.license == "mit"
    assert found.data.datasets == ["org/chats"]
    assert found.data.base_model is None


def test_a_result_is_that_of_the_data_that_were_scored():
    """It was said to be that of the training data, whatever `eval_data` was."""
    other = read(replace(FACTS, evaluated=["org/other"], files=["train.jsonl"])).data
    assert {result.dataset_type for result in other.eval_results} == {"org/other"}
    assert other.datasets == ["org/chats"]
    assert read(replace(FACTS, evaluated=[])).data.eval_results is None


@pytest.mark.parametrize(
    ("optim", "named"),
    [("adamw_torch", "PyTorch's AdamW"), ("adafactor", "Adafactor of transformers")],
)
def test_another_optimizer_is_named_with_the_package_that_it_is_from(optim, named, tmp_path):
    trainer = Trainer(model=tiny_llama(), args=arguments(tmp_path, optim=optim))
    trainer.create_optimizer()

    assert optimizer_of(trainer) == named


def test_a_card_of_ours_is_known_from_somebody_s_page(tmp_path):
    page = tmp_path / "README.md"
    assert not is_card(page)
    page.write_text("# My notes on qft_hf\n")
    assert not is_card(page)
    write_card(page, FACTS)
    assert is_card(page)
    head = page.read_text().split("---")[1]
    assert yaml.safe_load(head)["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("old", "new", "known"),
    [
        (
            "license: apache-2.0",
            "license: mit",
            True,
        ),  # metadata are kept by whoever writes it again
        ("\n", "\r\n", True),
        ("# ", "My notes.\n\n# ", False),
        ("## License", "My notes.\n\n## License", False),
        (" -->\n", " -->\n\nMy notes.\n", False),
    ],
    ids=["metadata", "line ends", "above", "within", "below"],
)
def test_a_card_whose_text_was_changed_is_not_one_of_ours(old, new, known, tmp_path):
    """It was written again, without what the user had added."""
    page = tmp_path / "README.md"
    write_card(page, FACTS)
    written = page.read_bytes().decode()
    assert old in written
    page.write_bytes(written.replace(old, new, 1 if "notes" in new else -1).encode())
    assert is_card(page) == known
