"""INT8 products in Trainers, checkpoints and configurations."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

from qft_hf import QFTConfig, QFTTrainer, QFTTrainingArguments, quantize_model_
from qft_hf.nn import Int8Products
from tests.hf.checkpoints import edit_config
from tests.hf.test_trainer import arguments, assert_same_state, history, sequences, trainer_on
from tests.models import tiny_bert, tiny_llama

CONFIG = QFTConfig(matmul="int8", outlier_fraction=0.03, seed=4)
HEAD_IN = QFTConfig(matmul="int8", int8_products={"lm_head": ["forward"], "down_proj": []})


def int8_llama(config=CONFIG, **overrides) -> LlamaForCausalLM:
    return quantize_model_(tiny_llama(**overrides), config)


def run(folder, cls=Trainer, *, config=CONFIG, resume=None, tied=True, **overrides) -> Trainer:
    trainer = trainer_on(int8_llama(config, tied=tied), folder, cls, **overrides)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("overrides", "config"),
    [({}, CONFIG), ({"bf16": True}, HEAD_IN), ({"gradient_accumulation_steps": 2}, HEAD_IN)],
    ids=["default", "head in, bf16", "head in, accumulation"],
)
def test_it_learns_what_dequantizing_does(overrides, config, tmp_path):
    settings = {"max_steps": 30, "learning_rate": 3e-3} | overrides
    float_products = run(tmp_path, config=QFTConfig(), **settings)
    int8_products = run(tmp_path, config=config, **settings)

    one, other = history(float_products, "loss"), history(int8_products, "loss")
    assert one != other
    assert one[-1] < 0.8 * one[0]
    # Both start from the same weights, and each step moves them by the learning rate alone.
    assert other[0] == pytest.approx(one[0], rel=2e-3)
    assert other[-1] == pytest.approx(one[-1], rel=0.05)


def test_the_arguments_of_a_script_reach_the_modules(tmp_path):
    args = arguments(
        tmp_path, QFTTrainingArguments, matmul="int8", quantization_seed=9,
        int8_products='{"lm_head": ["forward"], "o_proj": []}',
    )  # fmt: skip
    model = QFTTrainer(model=tiny_llama(), args=args, train_dataset=sequences()).model

    attention = model.model.layers[1].self_attn
    assert attention.q_proj.products == Int8Products(seed=9)
    assert attention.o_proj.products is None
    assert model.lm_head.products == Int8Products(True, False, False, seed=9)
    assert json.loads(args.to_json_string())["int8_products"] == {
        "lm_head": ["forward"], "o_proj": [],
    }  # fmt: skip


def test_a_bad_choice_in_the_arguments_is_refused_before_a_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"must be a JSON dictionary such as .*got 'forward'"):
        arguments(tmp_path, QFTTrainingArguments, int8_products="forward")
    with pytest.raises(TypeError, match="must be a dictionary of module names or None"):
        arguments(tmp_path, QFTTrainingArguments, int8_products='["forward"]')
    with pytest.raises(TypeError, match=r"must give each module a list of products, got 'forw"):
        QFTConfig(int8_products={"lm_head": "forward"})


def test_arguments_cannot_give_int8_products_to_a_model_quantized_without(tmp_path):
    args = arguments(tmp_path, QFTTrainingArguments, matmul="int8")
    with pytest.raises(ValueError, match=r"INT8 already, with matmul='dequantize'.* otherwise sta"):
        QFTTrainer(model=int8_llama(QFTConfig()), args=args)
    # A model that has INT8 products keeps them unless the arguments say otherwise.
    kept = QFTTrainer(model=int8_llama(), args=arguments(tmp_path, QFTTrainingArguments)).model
    assert kept.model.layers[0].mlp.up_proj.products == Int8Products(seed=4)


def test_int8_products_can_be_left_out_as_the_error_says(tmp_path):
    args = arguments(tmp_path, QFTTrainingArguments, matmul="dequantize")
    with pytest.raises(ValueError, match=r"load it in Python with a quantization_config=QFTConfig"):
        QFTTrainer(model=int8_llama(), args=args)
    int8_llama().save_pretrained(tmp_path / "saved")
    config = replace(CONFIG, matmul="dequantize")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=config)
    assert QFTTrainer(model=model, args=args).model.lm_head.products is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_no_bit(use_reentrant, tmp_path):
    plain = run(tmp_path)
    checkpointed = run(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert_same_state(plain.model.state_dict(), checkpointed.model.state_dict())
    assert history(plain, "grad_norm") == history(checkpointed, "grad_norm")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_release_equals_stack_and_both_trainers_agree(accumulation, tmp_path):
    settings = {"max_grad_norm": 0, "gradient_accumulation_steps": accumulation}
    stack = run(tmp_path, **settings)
    release = run(tmp_path, QFTTrainer, **settings, optim_args="gradient=release")
    assert_same_state(stack.model.state_dict(), release.model.state_dict())


def test_exact_clipping_of_released_gradients_sees_the_same_gradients_twice(tmp_path):
    settings = {"max_grad_norm": 0.5}
    stack = run(tmp_path, QFTTrainer, **settings)
    release = run(tmp_path, QFTTrainer, **settings, optim_args="gradient=release,clipping=exact")
    assert min(history(stack, "grad_norm")) > 0.5
    assert history(release, "grad_norm") == pytest.approx(history(stack, "grad_norm"), rel=1e-6)
    assert history(release, "loss") == pytest.approx(history(stack, "loss"), rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_equals_the_straight_run_bit_for_bit(accumulation, tmp_path):
    settings = {"gradient_accumulation_steps": accumulation, "lr_scheduler_type": "cosine"}
    straight = run(tmp_path, save_strategy="steps", save_steps=3, **settings)
    resumed = run(tmp_path, resume=str(tmp_path / "checkpoint-3"), **settings)
    assert_same_state(straight.model.state_dict(), resumed.model.state_dict())
    for key in ("loss", "grad_norm"):
        assert history(straight, key) == history(resumed, key)


def test_resume_from_a_run_that_dequantized_is_refused(tmp_path):
    run(tmp_path, config=QFTConfig(outlier_fraction=0.03), save_strategy="steps", save_steps=3)
    with pytest.raises(RuntimeError, match=r"was quantized for matmul='dequantize'"):
        run(tmp_path, resume=str(tmp_path / "checkpoint-3"))


def test_evaluation_and_generation(tmp_path):
    trainer = run(tmp_path)
    model = trainer.model.eval()
    ids = torch.arange(40)[None]
    one = model(ids).logits
    with torch.no_grad():
        assert torch.equal(model(ids).logits, one)
    # Prompts of any length; single tokens use the dequantized weights.
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 43)
    assert trainer.evaluate()["eval_loss"] > 0


def test_the_card_says_how_products_are_computed(tmp_path):
    trainer = run(tmp_path, QFTTrainer, max_steps=1)
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "3 % of each row, in the same columns" in card
    assert "INT8 x INT8 with stochastic rounding" in card


def test_a_second_architecture_with_biases_trains(tmp_path):
    examples = [
        {"input_ids": e["input_ids"], "labels": e["input_ids"][0] % 3} for e in sequences(48)
    ]
    args = arguments(
        tmp_path, QFTTrainingArguments, matmul="int8", max_steps=40, learning_rate=3e-3
    )
    trainer = QFTTrainer(model=tiny_bert(), args=args, train_dataset=examples)
    trainer.train()
    losses = history(trainer, "loss")
    assert trainer.model.bert.encoder.layer[0].output.dense.products == Int8Products()
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CONFIG, HEAD_IN], ids=["default", "head in"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_keeps_the_choice(tied, config, tmp_path):
    tiny_llama(tied=tied).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    model.save_pretrained(tmp_path / "int8", max_shard_size="5KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")

    expected = int8_llama(config, tied=tied)
    for loaded in (model, again):
        assert_same_state(loaded.state_dict(), expected.state_dict())
        for name, module in expected.named_modules():
            choice = getattr(module, "products", None)
            assert getattr(loaded.get_submodule(name), "products", None) == choice, name
        ids = torch.arange(40)[None]
        assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_the_products_of_a_checkpoint_can_be_chosen_anew(tmp_path):
    int8_llama().save_pretrained(tmp_path)
    ids = torch.arange(40)[None]

    other = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=QFTConfig(outlier_fraction=0.03)
    )
    assert other.model.layers[0].mlp.up_proj.products is None
    back = quantize_model_(tiny_llama(), QFTConfig(matmul="int8", outlier_fraction=0.03, seed=4))
    assert not torch.equal(other(ids).logits, back(ids).logits)
    other.save_pretrained(tmp_path / "saved")
    int8 = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=CONFIG)
    assert torch.equal(int8(ids).logits, back(ids).logits)


@pytest.mark.parametrize("how", ["argument", "config.json"])
def test_a_checkpoint_with_outliers_of_each_row_is_refused(how, tmp_path):
    quantize_model_(tiny_llama(), QFTConfig(outlier_fraction=0.03)).save_pretrained(tmp_path)
    wanted = {"quantization_config": CONFIG}
    if how == "config.json":
        edit_config(tmp_path, lambda c: c["quantization_config"].update(matmul="int8"))
        wanted = {}
    with pytest.raises(ValueError, match=r"was quantized for matmul='dequantize'.*Leave matmul"):
        AutoModelForCausalLM.from_pretrained(tmp_path, **wanted)


def test_without_outliers_every_checkpoint_fits(tmp_path):
    quantize_model_(tiny_llama(), QFTConfig(outlier_fraction=0.0)).save_pretrained(tmp_path)
    config = QFTConfig(outlier_fraction=0.0, matmul="int8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert model.model.layers[0].mlp.up_proj.products == Int8Products()
