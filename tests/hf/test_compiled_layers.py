"""Runs with `torch_compile=True` have the bits of eager runs, and all layers share one graph."""

import os
import shutil

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from qft_hf import QFTConfig, QFTLion, QFTTrainer, QFTTrainingArguments, quantize_model_
from qft_hf.hf.compiled_layers import BACKEND, compile_layers_, repeated_layers
from tests.arranged import tiny
from tests.hf.checkpoints import assert_same_state
from tests.hf.test_trainer import arguments, history, sequences
from tests.models import tiny_llama

# AOTAutograd traces graphs, and PyTorch's own kernels run them, as in an eager pass.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3}
N_LAYERS = 3


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for name in ("BACKEND", "MODE"):
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}", raising=False)


def data():
    """Rows of one length, without masks."""
    return [{key: row[key] for key in ("input_ids", "labels")} for row in sequences(24)]


def run(folder, *, cls=QFTTrainer, args=QFTTrainingArguments, resume=None, **overrides):
    settings = {"max_steps": 6, "eval_strategy": "no"} | overrides
    trainer = cls(
        model=tiny_llama(num_hidden_layers=N_LAYERS),
        args=arguments(folder, args, **settings),
        train_dataset=data(),
        eval_dataset=data()[:8],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def graphs():
    """Return the number of compiled graphs and the reasons of graph breaks."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], list(counters["graph_break"])


@pytest.mark.parametrize(
    "options",
    [
        EVALUATED,
        {"optim": "qft_adamw", "bf16": True},
        {"gradient": "release", "max_grad_norm": 0.0},
        {"gradient": "release", "clipping": "exact", "max_grad_norm": 0.3},
        {"matmul": "int8"},
        {"chunked_loss": True, "gradient_accumulation_steps": 2},
        {"cls": Trainer, "args": TrainingArguments, "optim": "qft_lion"},
    ],
    ids=str,
)
def test_a_run_has_the_bits_of_an_eager_one(options, tmp_path):
    eager = run(tmp_path / "eager", **options)
    compiled = run(tmp_path / "compiled", **COMPILED, **options)

    # One graph serves all layers; evaluation has its own, without gradients.
    assert graphs() == (2 if options == EVALUATED else 1, [])
    assert_same_state(compiled.model.state_dict(), eager.model.state_dict())
    for name in ("loss", "grad_norm", "eval_loss"):
        assert history(compiled, name) == history(eager, name)


def test_checkpointed_layers_are_compiled_with_what_they_compute_again(tmp_path):
    options = {"gradient_checkpointing": True}
    eager = run(tmp_path / "eager", **options)
    compiled = run(tmp_path / "compiled", **COMPILED, **options)

    assert graphs()[0] > 0
    assert graphs()[1] == []
    assert_same_state(compiled.model.state_dict(), eager.model.state_dict())


def test_a_compiled_run_is_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path, **COMPILED, **options)
    resumed = run(tmp_path / "again", resume=str(tmp_path / "checkpoint-3"), **COMPILED, **options)

    assert_same_state(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2"])
def test_other_layers_train_as_eager_ones(family):
    """Experts run eagerly inside compiled layers."""
    models = [quantize_model_(tiny(family), QFTConfig()).train() for _ in range(2)]
    for model in models:
        model.config.use_cache = False
    compile_layers_(models[1], {"backend": "aot_eager"})
    optimizers = [QFTLion(model.parameters(), lr=1e-3) for model in models]
    ids = torch.randint(3, 100, (2, 24), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(0)  # for dropout
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same_state(models[1].state_dict(), models[0].state_dict())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_computes_the_same_but_for_rounding(tmp_path):
    eager = run(tmp_path / "eager")
    compiled = run(tmp_path / "compiled", torch_compile=True)

    assert graphs() == (1, [])
    assert history(compiled, "loss") == pytest.approx(history(eager, "loss"), abs=2e-4)


def test_names_of_modules_and_states_stay():
    model = tiny_llama()
    names = [name for name, _ in model.named_modules()]

    compile_layers_(model, {"backend": "aot_eager"})

    assert [name for name, _ in model.named_modules()] == names
    assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    assert model._compiled_call_impl is None


def test_layers_are_those_of_the_outer_list():
    block = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    outer = nn.ModuleList([nn.Sequential(block), nn.Sequential(block)])
    other = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])  # nothing is repeated

    assert repeated_layers(nn.Sequential(outer, other)) == list(outer)


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_by_the_launcher_layers_are_compiled_too(cls, tmp_path, monkeypatch):
    """`accelerate launch --dynamo_backend aot_eager` compiles the layers, not the whole model."""
    monkeypatch.setenv(BACKEND, "aot_eager")
    kinds = {"cls": cls, "args": TrainingArguments, "optim": "qft_lion"}
    trainer = run(tmp_path, **kinds)

    assert graphs() == (1, [])
    assert trainer.model_wrapped is trainer.model
    assert os.environ[BACKEND] == "aot_eager"


def test_what_arguments_have_asked_for_is_not_asked_of_later_runs(tmp_path):
    """Accelerate's state outlives a Trainer."""
    run(tmp_path / "compiled", **COMPILED)
    torch._dynamo.utils.counters.clear()

    run(tmp_path / "eager")

    assert graphs() == (0, [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"torch_compile_mode": "reduce-overhead"}, "'reduce-overhead'.*no-cudagraphs"),
        (
            {"torch_compile_mode": "fast", "torch_compile_backend": "inductor"},
            "no mode 'fast'. Set one of default, ",
        ),
        ({"torch_compile_backend": "induktor"}, "no backend 'induktor'. Set one of .* inductor, "),
        ({"use_cache": True}, "Set use_cache=False"),
        ({"num_hidden_layers": 1}, "LlamaForCausalLM has no list of layers"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides, message, tmp_path):
    n_layers = overrides.pop("num_hidden_layers", N_LAYERS)
    args = arguments(tmp_path, QFTTrainingArguments, **COMPILED | overrides)

    with pytest.raises(ValueError, match=message):
        QFTTrainer(model=tiny_llama(num_hidden_layers=n_layers), args=args)
