"""PEFT adapters on frozen INT8 weights."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from qft_hf import QFTTrainer
from qft_hf.hf.config import QFTConfig
from qft_hf.hf.convert import dequantize_model_, quantize_model_
from qft_hf.quant import QFTWeight
from tests.finetune.chats import TEXTS, tiny_tokenizer
from tests.hf.checkpoints import IDS
from tests.models import tiny_llama
from tests.tolerances import assert_same_bits

LORA = LoraConfig(target_modules=["q_proj", "down_proj"], r=4)


def adapted(lora=LORA, **arguments):
    return get_peft_model(quantize_model_(tiny_llama(**arguments), QFTConfig()), lora)


def sequences():
    return [{"input_ids": IDS[0], "labels": IDS[0]}] * 8


def trained(model, output_dir, optim="adamw_torch", cls=Trainer):
    args = TrainingArguments(
        output_dir, optim=optim, max_steps=8, learning_rate=0.02, logging_steps=1, report_to="none",
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    trainer = cls(model=model, args=args, train_dataset=sequences())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_adapters_train_with_any_optimizer_and_the_base_stays(optim, tmp_path):
    model = adapted()
    frozen = {
        name: weight.codes.clone()
        for name, weight in model.named_parameters()
        if isinstance(weight, QFTWeight)
    }

    losses = trained(model, tmp_path, optim)

    assert losses[-1] < losses[0]
    assert all(torch.equal(model.get_parameter(n).codes, codes) for n, codes in frozen.items())
    assert len(frozen) == 16


@pytest.mark.parametrize("cls", [Trainer, QFTTrainer])
def test_an_optimizer_of_ours_is_for_all_weights_and_says_so(cls, tmp_path):
    """`QFTTrainer` named the optimizer alone, and then refused that one."""
    said = r"use transformers\.Trainer with optim='adamw_torch'; .* the model without adapters"
    model = adapted()
    for part in (model, model.get_base_model()):
        with pytest.raises(ValueError, match=said):
            trained(part, tmp_path, "qft_lion", cls)
    trained(model, tmp_path, "adamw_torch", Trainer)
    trained(quantize_model_(tiny_llama(), QFTConfig()), tmp_path, "qft_lion", cls)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_module_that_is_trained_whole_beside_adapters_has_to_be_float(tied, tmp_path):
    """The error once advised one of our optimizers, which refuse adapters."""
    lora = LoraConfig(target_modules=["q_proj"], r=4, modules_to_save=["lm_head"])
    with pytest.raises(TypeError, match=r"lm_head.*only float modules .* in modules_to_not_conve"):
        trained(adapted(lora, tied=tied), tmp_path)

    config = QFTConfig(modules_to_not_convert=["lm_head"])
    model = get_peft_model(quantize_model_(tiny_llama(tied=tied), config), lora)
    before = logits(model)
    losses = trained(model, tmp_path)
    assert losses[-1] < losses[0]
    head = model.base_model.model.lm_head
    assert not torch.equal(head.modules_to_save["default"].weight, head.original_module.weight)
    assert not torch.equal(logits(model), before)


def test_adapters_are_saved_and_loaded_onto_the_int8_checkpoint(tmp_path):
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LORA)
    trained(model, tmp_path)

    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")

    assert_same_bits(logits(again), logits(model))


@pytest.mark.parametrize("is_int8", [True, False])
def test_transformers_itself_loads_adapters(is_int8, tmp_path):
    """It calls the loading of models with arguments by name, which once raised a TypeError.

    Loading of float models was affected too; no test loaded an adapter without PEFT.
    """
    model = tiny_llama()
    (quantize_model_(model, QFTConfig()) if is_int8 else model).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], r=4, init_lora_weights=False)
    model = get_peft_model(base, lora)
    model.save_pretrained(tmp_path / "adapter")

    of_adapter = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    of_base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.equal(logits(of_base), logits(model))
    of_base.load_adapter(str(tmp_path / "adapter"))

    assert_same_bits(logits(of_adapter), logits(model))
    assert_same_bits(logits(of_base), logits(model))
    assert isinstance(of_adapter.lm_head.weight, QFTWeight) == is_int8


def test_an_adapter_with_resized_int8_embeddings_says_what_loads_it(tmp_path):
    quantize_model_(tiny_llama(), QFTConfig()).save_pretrained(tmp_path / "base")

    def resized():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(140, mean_resizing=False)  # new rows are random
        return model

    model = get_peft_model(resized(), LORA)
    model.save_pretrained(tmp_path / "adapter")

    with pytest.raises(ValueError, match=r"Load it with peft\.PeftModel\.from_pretrained"):
        resized().load_adapter(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(resized(), tmp_path / "adapter")
    assert_same_bits(logits(again), logits(model))


def base_of(folder, *, is_int8, n_tokens=None):
    """Return the tiny Llama, loaded from a folder, with new rows that differ at each call."""
    if not (folder / "config.json").exists():
        tiny_llama().save_pretrained(folder)
    config = QFTConfig() if is_int8 else None
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    if n_tokens is not None:
        model.resize_token_embeddings(n_tokens, mean_resizing=False)
    return model


def onto(model, folder, loader):
    if loader == "peft":
        return PeftModel.from_pretrained(model, folder)
    model.load_adapter(str(folder))
    return model


# Adapters that hold whole modules: their fields, tokens of the model, and names of these modules.
WHOLE = {
    "resized": ({"target_modules": ["q_proj"]}, 140, "embed_tokens"),
    "head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, None, "default"),
    "layers": ({"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}, None, "default"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, None, "embed_tokens.base_layer"),
}


@pytest.mark.parametrize("is_int8", [True, False], ids=["onto int8", "onto float"])
@pytest.mark.parametrize("loader", ["peft", "transformers"])
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_modules_of_an_adapter_in_another_form_are_refused(kind, loader, is_int8, tmp_path):
    """They were ignored, or ended in a KeyError: a trained head was lost, or new rows were random.

    An adapter with INT8 embeddings was tested only on the INT8 model that it came from.
    """
    fields, n_tokens, _ = WHOLE[kind]
    other = base_of(tmp_path / "base", is_int8=not is_int8, n_tokens=n_tokens)
    get_peft_model(other, LoraConfig(**fields)).save_pretrained(tmp_path / "adapter")
    model = base_of(tmp_path / "base", is_int8=is_int8, n_tokens=n_tokens)

    advice = "list them in modules_to_not_convert" if is_int8 else "Load it onto the INT8 model"
    with pytest.raises(ValueError, match=rf"The adapter has .* weights, \S+ .*{advice}"):
        onto(model, tmp_path / "adapter", loader)


@pytest.mark.parametrize("way", ["listed", "dequantized"])
@pytest.mark.parametrize("loader", ["peft", "transformers"])
@pytest.mark.parametrize("kind", WHOLE)
def test_the_ways_to_load_whole_float_modules_work(kind, loader, way, tmp_path):
    """The error advises them."""

    def base():
        model = base_of(tmp_path / "base", is_int8=way == "dequantized", n_tokens=n_tokens)
        if way == "dequantized":
            return dequantize_model_(model, torch.float32)
        floats = ["embed_tokens", "lm_head", "mlp"]
        return quantize_model_(model, QFTConfig(modules_to_not_convert=floats))

    fields, n_tokens, held = WHOLE[kind]
    model = get_peft_model(base(), LoraConfig(**fields))
    changed = [parameter for name, parameter in model.named_parameters() if held in name]
    with torch.no_grad():
        for parameter in changed:
            parameter.mul_(3)
    model.save_pretrained(tmp_path / "adapter")

    again = onto(base(), tmp_path / "adapter", loader)

    assert changed
    assert_same_bits(logits(again), logits(model))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_into_int8_weights_says_how_and_changes_nothing(merge, safe_merge, tmp_path):
    model = adapted()
    trained(model, tmp_path)
    expected = logits(model)

    with pytest.raises((NotImplementedError, TypeError), match="call dequantize_model_"):
        getattr(model, merge)(safe_merge=safe_merge)

    assert_same_bits(logits(model), expected)


def test_the_way_to_merge_works(tmp_path):
    """The error advises to dequantize, merge and quantize."""
    model = adapted()
    trained(model, tmp_path)
    expected = logits(model)

    merged = dequantize_model_(model, torch.float32).merge_and_unload()

    assert (logits(merged) - expected).abs().max() < 1e-4 * expected.abs().max()
    merged.save_pretrained(tmp_path / "float")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    assert_same_bits(logits(again), logits(merged))
    quantize_model_(merged, QFTConfig())
    assert isinstance(merged.model.layers[0].self_attn.q_proj.weight, QFTWeight)


def test_preparing_for_few_bits_changes_no_int8_weight():
    model = quantize_model_(tiny_llama(dtype=torch.bfloat16), QFTConfig())
    weight = model.lm_head.weight
    codes = weight.codes.clone()

    prepare_model_for_kbit_training(model)

    assert isinstance(model.lm_head.weight, QFTWeight)
    assert_same_bits(model.lm_head.weight.codes, codes)
    assert not model.lm_head.weight.requires_grad


def test_trl_puts_adapters_on_an_int8_model(tmp_path):
    tokenizer = tiny_tokenizer()
    model = quantize_model_(tiny_llama(vocab_size=len(tokenizer)), QFTConfig())
    codes = model.lm_head.weight.codes.clone()
    args = SFTConfig(
        tmp_path, max_steps=4, learning_rate=0.02, logging_steps=1, report_to="none", use_cpu=True,
        bf16=False, save_strategy="no", gradient_checkpointing=False, max_length=32,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_dict({"text": TEXTS * 4}),
        processing_class=tokenizer, peft_config=LORA,
    )  # fmt: skip

    trainer.train()

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_same_bits(trainer.model.base_model.model.lm_head.weight.codes, codes)
