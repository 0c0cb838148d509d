"""A chunked loss in models and Trainers: training stays the same, and some models are refused."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, Trainer

from qft_hf import QFTConfig, QFTTrainer, QFTTrainingArguments, chunk_loss_, quantize_model_
from qft_hf.hf.chunked_loss import refuse_logit_transforms
from qft_hf.nn import loss as loss_module
from qft_hf.quant import Int8Gradient
from tests.hf.test_trainer import arguments, history, sequences, trainer_on
from tests.models import tiny_bert, tiny_llama

IDS = torch.randint(131, (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _several_runs_of_words(monkeypatch):
    monkeypatch.setattr(loss_module, "LOGITS_ELEMENTS", 3000)


def quantized(**overrides):
    return quantize_model_(tiny_llama(**overrides), QFTConfig())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("n_items", [None, 40, torch.tensor(40)], ids=str)
def test_loss_and_gradients_are_those_of_the_model(n_items, tied):
    labels = IDS.clone()
    labels[0, :7] = -100
    models = [quantized(tied=tied).train(), chunk_loss_(quantized(tied=tied)).train()]
    losses = [
        model(input_ids=IDS, labels=labels, num_items_in_batch=n_items).loss for model in models
    ]
    for loss in losses:
        loss.backward()

    # Both are FP32; only the order of sums over the vocabulary differs.
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    for parameter, chunked in zip(*(model.parameters() for model in models), strict=True):
        whole, runs = parameter.grad, chunked.grad
        if isinstance(whole, Int8Gradient):
            assert (whole.codes.int() - runs.codes).abs().max() <= 1
            whole, runs = whole.scales, runs.scales
        torch.testing.assert_close(runs, whole, rtol=1e-4, atol=1e-9)


def test_evaluation_and_generation_have_logits():
    model, plain = chunk_loss_(quantized()).eval(), quantized().eval()
    with torch.no_grad():
        outputs, expected = (m(input_ids=IDS, labels=IDS) for m in (model, plain))
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.loss, expected.loss)
    texts = [m.generate(IDS[:1], max_new_tokens=4, do_sample=False) for m in (model, plain)]
    assert torch.equal(*texts)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_takes_the_same_course(accumulation, bf16, tmp_path):
    settings = {
        "gradient_accumulation_steps": accumulation,
        "gradient_checkpointing": True,
        "bf16": bf16,
    }
    plain = trainer_on(tiny_llama(tied=True), tmp_path, QFTTrainer, **settings)
    chunked = QFTTrainer(
        model=tiny_llama(tied=True),
        args=arguments(tmp_path, QFTTrainingArguments, chunked_loss=True, **settings),
        train_dataset=sequences(),
        eval_dataset=sequences(8, seed=1),
    )
    for trainer in (plain, chunked):
        trainer.train()
    # A last bit can flip the sign of an update; losses differ by far less than they fall from 4.9.
    assert history(chunked, "loss") == pytest.approx(history(plain, "loss"), rel=3e-3)
    assert history(chunked, "loss")[-1] < history(chunked, "loss")[0] - 0.1
    assert chunked.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=3e-3)


def test_the_stock_trainer_takes_a_model_with_a_chunked_loss(tmp_path):
    trainer = trainer_on(chunk_loss_(quantized()), tmp_path, Trainer)
    trainer.train()
    assert history(trainer, "loss")[-1] < history(trainer, "loss")[0]


SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip
COMPUTING = {
    "caps": ("Gemma2", {"head_dim": 16}),
    "scales": ("Cohere", {"num_key_value_heads": 2}),
    "divides": ("Granite", {}),
    "casts": ("Mamba", {}),
    "copies": ("OPT", {"ffn_dim": 40, "word_embed_proj_dim": 32}),
}


def model_of(family, options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | options)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("family", "options"), COMPUTING.values(), ids=list(COMPUTING))
def test_a_model_that_computes_with_its_logits_is_refused_where_the_trainer_is_built(
    family, options, tmp_path
):
    """The first step once refused it, after everything was loaded, tokenized and scored."""
    args = arguments(tmp_path, QFTTrainingArguments, chunked_loss=True)
    with pytest.raises(ValueError, match=rf"{family}ForCausalLM scales or caps .* Leave chunked_"):
        QFTTrainer(model=model_of(family, options), args=args)


def test_a_head_that_comes_to_compute_with_its_logits_is_refused_by_the_first_step():
    model = chunk_loss_(quantized()).train()
    model.lm_head.register_forward_hook(lambda module, inputs, logits: logits / 2)
    with pytest.raises(TypeError, match=r"computes with its logits .* Leave chunked_loss off"):
        model(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize(
    ("family", "options"),
    [("Mixtral", {"num_local_experts": 2, "output_router_logits": True}), ("GPT2", {"n_head": 2})],
)
def test_asking_whether_a_model_computes_with_its_logits_leaves_no_trace(family, options):
    model = quantize_model_(model_of(family, options), QFTConfig())
    model.lm_head.eval()
    attributes = [dict(vars(module)) for module in model.modules()]
    random = torch.random.get_rng_state()

    refuse_logit_transforms(model)

    for module, before in zip(model.modules(), attributes, strict=True):
        assert {**vars(module), "_loss_function": None} == {**before, "_loss_function": None}
    assert torch.equal(torch.random.get_rng_state(), random)
    ids = IDS % 61
    loss = model.eval()(input_ids=ids, labels=ids).loss
    model.lm_head.train()  # only its mode decides whether logits are deferred
    chunked = chunk_loss_(model)(input_ids=ids, labels=ids).loss
    # The same sums over the vocabulary in another order.
    torch.testing.assert_close(chunked, loss, rtol=1e-6, atol=0)


def test_a_head_in_int8_products_is_refused_and_one_left_out_is_not(tmp_path):
    config = QFTConfig(matmul="int8", int8_products={"lm_head": ["forward"]})
    with pytest.raises(ValueError, match=r"for its forward in INT8\. Take the head out of int8_pr"):
        chunk_loss_(quantize_model_(tiny_llama(), config))
    model = chunk_loss_(quantize_model_(tiny_llama(), QFTConfig(matmul="int8")))
    trainer = trainer_on(model, tmp_path, Trainer)
    trainer.train()
    assert history(trainer, "loss")[-1] < history(trainer, "loss")[0]


def test_models_without_such_a_loss_are_refused():
    with pytest.raises(ValueError, match=r"output head, and BertFor.* has none\. .*_loss off\.$"):
        chunk_loss_(quantize_model_(tiny_bert(), QFTConfig()))
    with pytest.raises(ValueError, match=r"float Linear\. .* take it out of modules_to_not_conv"):
        chunk_loss_(quantize_model_(tiny_llama(), QFTConfig(modules_to_not_convert=["lm_head"])))
    with pytest.raises(ValueError, match=r"call quantize_model_ before chunk_loss_\.$"):
        chunk_loss_(tiny_llama())
    model = quantized()
    model.loss_function = torch.nn.functional.mse_loss
    with pytest.raises(ValueError, match=r"uses mse_loss\. Leave chunked_loss off"):
        chunk_loss_(model)


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Set label_smoothing_factor=0"):
        arguments(tmp_path, QFTTrainingArguments, chunked_loss=True, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    "option",
    [{"label_smoothing": 0.1}, {"weight": torch.ones(131)}],
    ids=["label_smoothing", "weight"],
)
def test_an_option_of_the_loss_that_a_chunked_one_lacks_is_refused(option):
    model = chunk_loss_(quantized()).train()
    with pytest.raises(ValueError, match=rf"supports no \['{next(iter(option))}'\].*_loss off"):
        model(input_ids=IDS, labels=IDS, **option)
