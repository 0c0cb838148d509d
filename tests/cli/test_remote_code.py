"""Models that come with their own code: a whole run, and every command on its output."""

import json
import re
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import qft_hf  # noqa: F401 registers the format
from qft_hf_cli import main
from tests.finetune.chats import chat, tiny_tokenizer
from tests.finetune.flags import as_flags, write_jsonl

CONFIGURATION = """
from transformers import PreTrainedConfig

class OddConfig(PreTrainedConfig):
    model_type = "odd"
    vocab_size: int = 320
    hidden_size: int = 44
    intermediate_size: int = 75
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    max_position_embeddings: int = 64
    tie_word_embeddings: bool = True
"""
# Half of the model's layers read their weights directly.
MODELING = """
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_odd import OddConfig

class Halved(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.5, self.bias)

class Named(nn.Linear):
    pass

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up = Named(config.hidden_size, config.intermediate_size)
        self.down = Halved(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))

class OddForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = OddConfig
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits, loss = self.head(x), None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)
"""
COMMANDS = {  # commands that read such a folder
    "chat": ["chat", "run", "--prompt", "hi", "--max_new_tokens", "3"],
    "chat with the export": ["chat", "run/bfloat16", "--prompt", "hi", "--max_new_tokens", "3"],
    "export": ["export", "run", "plain"],
    "inspect": ["inspect", "run", "--original", "base"],
    "plan": ["plan", "base"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float model in `base`, and a run with an export in `run`."""
    folder = tmp_path_factory.mktemp("remote_code")
    package = folder / "odd_package"
    package.mkdir()
    for name, code in (("__init__", ""), ("configuration_odd", CONFIGURATION),
                       ("modeling_odd", MODELING)):  # fmt: skip
        (package / f"{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        from odd_package.modeling_odd import OddConfig, OddForCausalLM

        tokenizer = tiny_tokenizer()
        OddConfig.register_for_auto_class()
        OddForCausalLM.register_for_auto_class("AutoModelForCausalLM")
        model = OddForCausalLM(OddConfig(vocab_size=len(tokenizer)))
        for part in (model, tokenizer):
            part.save_pretrained(folder / "base")
        for name in [name for name in sys.modules if name.startswith("odd_package")]:
            del sys.modules[name]
    rows = [{"messages": chat("hi", "hello " * n)} for n in (1, 2, 3, 4)]
    places = dict.fromkeys(("train_data", "eval_data"), write_jsonl(folder / "rows.jsonl", rows))
    flags = {
        **places,
        "model_name_or_path": folder / "base",
        "output_dir": folder / "run",
        "trust_remote_code": "true",
        "max_length": 64,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "export_dtype": "bfloat16",
        "use_cpu": "true",
    }
    main(["finetune", *as_flags(flags)])
    return folder


@pytest.fixture
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_commands_run_code_that_is_trusted_and_no_other(words, there, capsys, refused):
    """Trust could once be given only at a terminal, and no class of that name was found."""
    assert "pass the argument `trust_remote_code=True`" in refused(*words)
    main([*words, "--trust_remote_code"])
    assert capsys.readouterr().out


def test_a_run_exports_what_it_has_trained(there):
    """The run once raised after training, and wrote neither export nor card."""
    trust = {"trust_remote_code": True}
    trained = AutoModelForCausalLM.from_pretrained(there / "run", **trust)
    plain = AutoModelForCausalLM.from_pretrained(there / "run/bfloat16", **trust)
    assert plain.dtype == torch.bfloat16
    for (name, weight), wanted in zip(plain.named_parameters(), trained.parameters(), strict=True):
        assert weight.detach().equal(wanted.to(torch.bfloat16)), name


def test_the_scores_of_the_run_are_found_again(there, result_of):
    scores = result_of("evaluate", "run")["scores"]
    summary = json.loads((there / "run/summary.json").read_text())
    assert scores["loss"] == pytest.approx(summary["after"]["loss"], rel=1e-5)


def test_the_run_goes_on_and_is_replaced(there, capsys, refused):
    """Code files in checkpoints and in the export were once not recognized as the run's."""
    capsys.readouterr()
    own = ["finetune", "run/run.yaml", "--output_dir", "again"]
    main(own)
    main([*own, "--resume_from_checkpoint", "true", "--max_steps", "3"])
    main([*own, "--overwrite_output"])
    (there / "again/bfloat16/notes.py").write_text("mine = 1")
    assert "holds bfloat16/notes.py, which no run" in refused(*own, "--overwrite_output")


def test_losses_of_micro_batches_are_averaged(there):
    """The model accepts any argument, so the Trainer once summed losses to twice the value."""
    own = ["finetune", "run/run.yaml", "--output_dir", "parts", "--logging_steps", "1"]
    main([*own, "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2"])
    before = json.loads((there / "parts/summary.json").read_text())["before"]["loss"]
    history = json.loads((there / "parts/trainer_state.json").read_text())["log_history"]
    first = next(entry["loss"] for entry in history if "loss" in entry)
    assert first == pytest.approx(before, rel=0.2)  # the same rows, weighted differently


def test_the_card_loads_it_by_the_class_that_finds_its_code(there):
    main(["card", "run", "--license", "mit"])
    text = (there / "run/README.md").read_text()
    loaded = re.findall(r"(\w+)\.from_pretrained\((.*)\)", text)
    assert loaded == [
        ("AutoModelForCausalLM", '"run", trust_remote_code=True'),
        ("AutoModelForCausalLM", '"run", subfolder="bfloat16", trust_remote_code=True'),
    ]
    assert "import OddForCausalLM" not in text
    assert "--trust_remote_code" in text


def test_a_class_that_nobody_has_is_named(there, refused):
    config = json.loads((there / "run/config.json").read_text())
    del config["auto_map"]
    config["model_type"] = "llama"
    (there / "nameless").mkdir(exist_ok=True)
    (there / "nameless/config.json").write_text(json.dumps(config))
    assert "the class OddForCausalLM, which transformers does not have" in refused(
        "export", "nameless", "plain-2"
    )
