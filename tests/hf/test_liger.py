"""Options for Liger's kernels: which of them a run uses, and what is refused."""

import re

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer
from transformers.utils.import_utils import is_liger_kernel_available

from qft_hf import (
    QFTConfig,
    QFTTrainer,
    QFTTrainingArguments,
    QSTConfig,
    attach_side_network,
    quantize_model_,
)
from qft_hf.hf.uncapturable import uncapturable
from tests.hf.test_trainer import arguments, sequences
from tests.models import tiny_bert, tiny_llama

FUSED = "fused_linear_cross_entropy"
installed = pytest.mark.skipif(not is_liger_kernel_available(), reason="liger-kernel")


def with_liger(folder, cls=QFTTrainingArguments, **overrides):
    return arguments(folder, cls, use_liger_kernel=True, **overrides)


# --- which loss -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "chunked", "kernels"),
    [
        ({}, True, {FUSED: False}),
        ({"liger_kernel_config": {"rope": False}}, True, {"rope": False, FUSED: False}),
        ({"liger_kernel_config": '{"rope": false}'}, True, {"rope": False, FUSED: False}),
        ({"chunked_loss": True}, True, {FUSED: False}),
        ({"chunked_loss": False}, False, {FUSED: False}),
        ({"label_smoothing_factor": 0.1}, False, {FUSED: False}),  # needs all logits
        ({"liger_kernel_config": {FUSED: False}}, False, {FUSED: False}),
        ({"liger_kernel_config": {FUSED: False}, "chunked_loss": True}, True, {FUSED: False}),
        (
            {"liger_kernel_config": {"cross_entropy": True}},
            False,
            {"cross_entropy": True, FUSED: False},
        ),
    ],
    ids=str,
)
def test_a_chunked_loss_stands_for_the_fused_one_unless_told_otherwise(
    options, chunked, kernels, tmp_path, caplog
):
    """A warning appears if the chunked loss replaces a default, not if a kernel was set by name."""
    args = with_liger(tmp_path, **options)
    assert args.chunked_loss is chunked
    assert args.liger_kernel_config == kernels
    said = [r.getMessage() for r in caplog.records if "use_liger_kernel=True" in r.getMessage()]
    if FUSED in (options.get("liger_kernel_config") or {}):
        assert said == []
    else:
        (text,) = said
        assert ("chunked_loss=True takes its place" in text) is chunked
    caplog.clear()
    again = QFTTrainingArguments(**args.to_dict())
    assert (again.chunked_loss, again.liger_kernel_config) == (chunked, kernels)
    assert caplog.records == []


def test_without_liger_or_with_another_optimizer_the_loss_is_as_ever(tmp_path, caplog):
    assert arguments(tmp_path, QFTTrainingArguments).chunked_loss is False
    given = {"liger_kernel_config": '{"rope": false}'}
    args = with_liger(tmp_path, optim="adamw_torch", **given)
    assert args.chunked_loss is False
    assert args.liger_kernel_config == {"rope": False}
    assert "chunked_loss" not in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"liger_kernel_config": {FUSED: True}},
            ValueError,
            "float gradient of the whole head.*Leave it out: chunked_loss=True then takes its",
        ),
        (
            {"liger_kernel_config": {"cross_entropy": True}, "chunked_loss": True},
            ValueError,
            "needs all logits at once.*Leave one of the two out",
        ),
        ({"liger_kernel_config": {"rope": "no"}}, TypeError, "to True or False.*'no'"),
        ({"liger_kernel_config": "[1]"}, TypeError, r"to True or False.*got \[1\]"),
        ({"liger_kernel_config": "rope"}, ValueError, "must be a JSON dictionary such as .*'rope'"),
    ],
    ids=str,
)
def test_contradictions_are_refused_before_a_model_is_loaded(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        with_liger(tmp_path, **options)


# --- what cannot work -----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
@pytest.mark.parametrize("kernels", [None, {"rope": False}, {FUSED: True}], ids=str)
def test_the_stock_arguments_have_to_leave_the_fused_loss_out(kernels, cls, tmp_path):
    args = arguments(tmp_path, use_liger_kernel=True, liger_kernel_config=kernels)
    with pytest.raises(ValueError, match=rf"Set liger_kernel_config={{'{FUSED}': False}}; QFTTr"):
        cls(model=tiny_llama(), args=args)


@installed
@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_a_family_or_a_kernel_that_liger_does_not_know_is_refused_by_name(cls, tmp_path):
    """Liger itself silently leaves both unpatched."""
    args = with_liger(tmp_path, liger_kernel_config={FUSED: False})
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=131))
    with pytest.raises(ValueError, match=r"no kernels for models of type 'gpt2'\. Leave use_liger"):
        cls(model=model, args=args)
    args = with_liger(tmp_path, liger_kernel_config={FUSED: False, "geglu": False, "rop": True})
    with pytest.raises(ValueError, match=r"has geglu, rop, and .*'llama' are .* rope, swiglu\. L"):
        cls(model=tiny_llama(), args=args)


@installed
@pytest.mark.parametrize("optim", ["qft_lion", "adamw_torch"])
def test_experts_in_int8_are_refused_by_name_also_where_they_are_frozen(optim, tmp_path):
    """Liger's kernel would read codes as floats; it may be used for experts that stay float."""
    config = Qwen3MoeConfig(
        vocab_size=131, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, head_dim=16,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, num_experts=3,
        num_experts_per_tok=2,
    )  # fmt: skip
    options = {"optim": optim, "use_liger_kernel": True}
    model = Qwen3MoeForCausalLM(config)
    if optim == "adamw_torch":
        model = quantize_model_(model, QFTConfig()).requires_grad_(False)
    args = arguments(tmp_path, liger_kernel_config={FUSED: False}, **options)
    with pytest.raises(ValueError, match=r"of model\.layers\.0\.mlp\.experts are .*'swiglu': Fa"):
        Trainer(model=model, args=args)
    args = arguments(tmp_path, liger_kernel_config={FUSED: False, "swiglu": False}, **options)
    Trainer(model=model, args=args)
    model = Qwen3MoeForCausalLM(config)
    quantize_model_(model, QFTConfig(modules_to_not_convert=["experts"]))
    Trainer(model=model, args=arguments(tmp_path, liger_kernel_config={FUSED: False}, **options))


def test_a_model_without_the_loss_is_told_how_to_do_without(tmp_path, monkeypatch):
    monkeypatch.setattr("qft_hf.hf.liger.is_liger_kernel_available", lambda: False)
    advice = re.escape(f"liger_kernel_config={{'{FUSED}': False}} leaves out both")
    with pytest.raises(ValueError, match=f"INT8 output head, and Bert.* has none.*{advice}"):
        QFTTrainer(model=tiny_bert(), args=with_liger(tmp_path))
    side = attach_side_network(tiny_llama(), QSTConfig(r=2))
    with pytest.raises(ValueError, match=f"INT8 output head, and Llama.* a float Linear.*{advice}"):
        QFTTrainer(model=side, args=with_liger(tmp_path))
    with pytest.raises(ValueError, match=r"Leave chunked_loss off\.$"):  # not asked for by Liger
        QFTTrainer(
            model=tiny_bert(), args=arguments(tmp_path, QFTTrainingArguments, chunked_loss=True)
        )


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_that_liger_is_not_installed_is_said_by_transformers(cls, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a CPU is no reason to refuse
    for module in ("qft_hf.hf.liger", "transformers.integrations.liger"):
        monkeypatch.setattr(f"{module}.is_liger_kernel_available", lambda: False)
    trainer = cls(model=tiny_llama(), args=with_liger(tmp_path), train_dataset=sequences())
    with pytest.raises(ImportError, match="liger-kernel"):
        trainer.train()


def test_a_run_on_a_cpu_is_refused_before_liger_changes_modules(tmp_path, monkeypatch):
    """It ended in an error of Triton about drivers."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    trainer = QFTTrainer(model=tiny_llama(), args=with_liger(tmp_path), train_dataset=sequences())
    with pytest.raises(ValueError, match=r"needs a GPU, and there is none\. Leave it out"):
        trainer.train()


def test_what_no_cuda_graph_can_have_of_it_is_named(tmp_path):
    assert uncapturable(with_liger(tmp_path), tiny_llama()) == []
    args = with_liger(tmp_path, liger_kernel_config={"cross_entropy": True})
    (reason,) = uncapturable(args, tiny_llama())
    assert "cross_entropy counts the labels on the host. Leave it out of liger_ker" in reason
