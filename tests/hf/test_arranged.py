"""Mixtures of experts, and GPT-2 with its transposed weights, can do what every model can."""

import copy

import pytest
import torch
import torch.nn.utils.parametrize
from torch import nn
from transformers import AutoModelForCausalLM, DbrxConfig, TrainingArguments

from qft_hf import (
    QFTConfig,
    QFTLion,
    QFTTrainer,
    dequantize_model_,
    estimate_memory,
    memory_ledger,
    quantize_model_,
)
from qft_hf.nn.experts import QFTBatchedExperts, QFTExperts
from qft_hf.quant import QFTWeight
from tests.arranged import CONFIGS, WIDTH, arranged, batch, tiny
from tests.fresh import run_fresh
from tests.hf.checkpoints import assert_same_state
from tests.models import VOCAB_SIZE
from tests.tolerances import snr_db

FAMILIES = list(CONFIGS)


def quantized(family: str, **config):
    return quantize_model_(tiny(family), QFTConfig(**config))


def loss(model, ids=None):
    ids = batch() if ids is None else ids
    return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("family", FAMILIES)
def test_all_matrices_are_int8_but_those_with_a_row_for_each_expert(family):
    model = quantized(family)

    weights = arranged(model)
    assert weights
    for name, parameter in tiny(family).named_parameters():
        assert parameter.ndim < 3 or name in weights
    kept = [kept for kept in memory_ledger(model).kept if kept.parameter.ndim > 1]
    # Only routers, and the biases of gpt-oss, stay float.
    assert all(kept.parameter.shape[0] == model.config.num_local_experts for kept in kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_float_model(family):
    model = quantized(family).train()
    twin = dequantize_model_(copy.deepcopy(model), torch.float32).train()
    mine, its = loss(model), loss(twin)
    mine.backward()
    its.backward()

    assert mine.item() == pytest.approx(its.item(), rel=1e-6)
    for (name, parameter), (_, exact) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        if not isinstance(parameter, QFTWeight):
            continue
        gradient = parameter.grad.dequantize()
        assert snr_db(exact.grad, gradient) > 38, name  # 256 values a scale, errors of half a code
        if parameter.ndim == 3:  # experts
            without = (exact.grad == 0).flatten(1).all(dim=1)
            assert not gradient[without].any(), name


def test_some_expert_gets_no_token_where_it_is_tested():
    model = quantized("qwen3_moe").train()
    loss(model, batch(shape=(1, 2))).backward()
    (weight,) = [weight for n, weight in arranged(model).items() if n.endswith("down_proj")]
    codes = weight.grad.codes.unflatten(0, (6, -1))
    assert 0 < codes.flatten(1).any(dim=1).sum() < 6


def trained(family: str, gradient: str, steps: int = 3):
    model = quantized(family).train()
    optimizer = QFTLion(model.parameters(), lr=1e-3, weight_decay=0.1, gradient=gradient)
    optimizer.train()
    for step in range(steps):
        loss(model, batch(step, (1, 3))).backward()  # so few tokens that some experts get none
        optimizer.step()
    return model


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "longcat_flash", "llama4_text"])
def test_the_experts_of_a_layer_may_get_no_token_at_all(family):
    """Float experts return an empty tensor; ours raised an error about the shape of a view."""
    model = quantized(family)
    kinds = (QFTExperts, QFTBatchedExperts)
    experts = next(module for module in model.modules() if isinstance(module, kinds))
    x = torch.zeros(0, WIDTH, requires_grad=True)
    chosen = (x,) if isinstance(experts, QFTBatchedExperts) else (x, x[:, :2].long(), x[:, :2])

    y = experts(*chosen)
    y.sum().backward()

    assert y.shape == x.shape == x.grad.shape
    assert not any(weight.grad.dequantize().any() for weight in arranged(experts).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_release_has_the_bits_of_stack(family):
    stack, release = (trained(family, gradient) for gradient in ("stack", "release"))
    assert_same_state(release, stack)
    before = arranged(quantized(family))
    for name, weight in arranged(stack).items():
        assert not torch.equal(weight, before[name]), name


MANY = (8, 24)  # sequences, tokens: enough tokens per expert for INT8 products


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_products_have_the_gradients_of_the_float_model(family):
    model = quantized(family, matmul="int8").train()
    twin = dequantize_model_(copy.deepcopy(model), torch.float32).train()
    loss(model, batch(shape=MANY)).backward()
    loss(twin, batch(shape=MANY)).backward()

    exact = dict(twin.named_parameters())
    for name, weight in arranged(model).items():
        assert model.get_submodule(name.rpartition(".")[0]).products is not None
        # Both operands and the result are rounded, each to 127 steps of a maximum, and a token with
        # similar router scores may go to other experts. Float products would be above 38 dB.
        assert 15 < snr_db(exact[name].grad, weight.grad.dequantize()) < 36, name


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_products_are_the_same_with_release_and_when_computed_again(family):
    def trained(gradient: str, checkpointing: bool = False):
        model = quantized(family, matmul="int8").train()
        if checkpointing and model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = QFTLion(model.parameters(), lr=1e-3, weight_decay=0.1, gradient=gradient)
        optimizer.train()
        for step in range(2):
            loss(model, batch(step, MANY)).backward()
            optimizer.step()
        return model

    stack = trained("stack")
    assert_same_state(trained("release"), stack)
    assert_same_state(trained("release", checkpointing=True), stack)


def test_products_of_experts_are_chosen_by_name():
    chosen = {"experts": ["weight_gradient"], "layers.0.mlp.experts": []}
    model = quantized("mixtral", matmul="int8", int8_products=chosen)
    first, second = (layer.mlp.experts.products for layer in model.model.layers)
    assert first is None
    assert str(second) == "weight_gradient"


def test_experts_of_dbrx_are_int8_and_get_the_gradients_of_the_float_model(tmp_path):
    """DBRX stacks its experts by rows in one matrix, and its code reads one expert at a time."""
    config = DbrxConfig(
        d_model=48, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=VOCAB_SIZE,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={
            "ffn_hidden_size": 40, "moe_num_experts": 4, "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = quantize_model_(AutoModelForCausalLM.from_config(config), QFTConfig()).train()
    twin = dequantize_model_(copy.deepcopy(model), torch.float32).train()
    loss(model).backward()
    loss(twin).backward()

    exact = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            assert isinstance(parameter, QFTWeight), name
            assert snr_db(exact[name].grad, parameter.grad.dequantize()) > 38, name
    model.save_pretrained(tmp_path)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_that_a_device_map_is_made_from_is_what_is_stored(family):
    model = quantized(family)
    quantizer = model.hf_quantizer
    for name, weight in arranged(model).items():
        size = quantizer.param_element_size(model, name, weight) * weight.numel()
        assert size == pytest.approx(weight.stored_bytes), name


def test_eager_code_that_picks_an_expert_gets_its_values_and_passes_its_gradient_on():
    """The class's own forward does this, and a user's module may."""
    model = quantized("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    hidden = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    chosen = torch.tensor([[0, 2]] * 4 + [[2, 3]] * 3)
    results = []
    for forward in (type(experts).forward, type(experts).plain_class.forward.__wrapped__):
        model.zero_grad()
        y = forward(experts, hidden, chosen, torch.full((7, 2), 0.5))
        y.square().sum().backward()
        results.append((y.detach(), experts.gate_up_proj.grad.dequantize()))
    (y, gradient), (eager_y, eager_gradient) = results

    torch.testing.assert_close(eager_y, y)
    assert snr_db(gradient, eager_gradient) > 38
    assert gradient[[0, 2, 3]].flatten(1).any(dim=1).all()
    assert not gradient[[1, 4, 5]].any()


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_experts_that_are_computed_from_others_are_refused(name):
    """PEFT with `target_parameters` parametrizes experts in the same way."""
    model = quantized("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    nn.utils.parametrize.register_parametrization(experts, name, nn.Identity())

    with pytest.raises(RuntimeError, match=f"The {name} of .* is no longer a parameter"):
        loss(model)


CHECKPOINTING = [(family, None) for family in FAMILIES] + [("qwen3_moe", flag) for flag in (0, 1)]


@pytest.mark.parametrize(("family", "reentrant"), CHECKPOINTING)
def test_loss_falls_on_a_repeated_batch(family, reentrant):
    model = quantized(family).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": bool(reentrant)})
    optimizer = QFTLion(model.parameters(), lr=1e-3, gradient="release")
    optimizer.train()
    losses = []
    for _ in range(15):
        current = loss(model)
        current.backward()
        optimizer.step()
        losses.append(float(current))
    assert losses[-1] < 0.6 * losses[0], losses


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_reloads_with_its_bits(tmp_path, family):
    model = quantized(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert_same_state(loaded, model)
    ids = batch()
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_float_checkpoint_is_quantized_after_its_experts_are_merged(tmp_path, family):
    plain = tiny(family)
    plain.save_pretrained(tmp_path)  # in the family's own layout: many store experts one by one
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=QFTConfig())
    assert_same_state(loaded, quantized(family))

    loaded.save_pretrained(tmp_path / "int8")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "int8"), loaded)


PLAIN = """
import sys, torch
sys.modules["qft_hf"] = None  # importing it fails
from transformers import AutoModelForCausalLM
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save((model.state_dict(), model(ids).logits), folder + "/result.pt")
"""
SOURCES = ["instance", "float", "int8"]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """Export each family from each source: `{(family, source): export}`.

    An export is its folder, which has the result of plain transformers, the exported model, the
    tensor names of the float checkpoint, and the INT8 model's logits.
    """
    ids, made = batch(), {}
    for family in FAMILIES:
        root = tmp_path_factory.mktemp(family)
        plain = tiny(family)
        plain.save_pretrained(root / "plain")
        instance = quantize_model_(plain, QFTConfig())
        instance.save_pretrained(root / "int8")
        models = {
            "instance": instance,
            "float": AutoModelForCausalLM.from_pretrained(
                root / "plain", quantization_config=QFTConfig()
            ),
            "int8": AutoModelForCausalLM.from_pretrained(root / "int8"),
        }
        for source, model in models.items():
            with torch.no_grad():
                logits = model.train()(ids).logits
            dequantize_model_(model, torch.float32).eval().save_pretrained(root / source)
            made[family, source] = root / source, model, tensor_names(root / "plain"), logits
    torch.save(ids, root / "ids.pt")
    run_fresh(PLAIN, root / "ids.pt", *(folder for folder, *_ in made.values()))
    return made


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_what_plain_transformers_writes_and_loads(exports, family, source):
    folder, model, names, int8_logits = exports[family, source]
    state, logits = torch.load(folder / "result.pt")

    assert torch.equal(logits, model(batch()).logits)
    torch.testing.assert_close(logits, int8_logits, rtol=1e-4, atol=1e-5)  # sums in another order
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert tensor_names(folder) == names


def tensor_names(folder) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_a_run_is_resumed_with_its_bits(tmp_path, gradient):
    def run(steps: int, resume: bool):
        arguments = TrainingArguments(
            tmp_path / gradient, max_steps=steps, save_steps=2, per_device_train_batch_size=1,
            gradient_accumulation_steps=2, learning_rate=1e-3, report_to=[], optim="qft_lion",
            optim_args=f"gradient={gradient}" + (",clipping=tensor" * (gradient == "release")),
            lr_scheduler_type="constant", use_cpu=True,
        )  # fmt: skip
        rows = [{"input_ids": ids, "labels": ids} for ids in batch(shape=(8, 4)).tolist()]
        trainer = QFTTrainer(model=quantized("qwen3_moe"), args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    straight = run(4, resume=False)
    assert_same_state(run(4, resume=False), straight)
    run(2, resume=False)
    assert_same_state(run(4, resume=True), straight)


@pytest.mark.parametrize("gradient", ["stack", "release"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_the_ledger(family, gradient):
    model = quantized(family).train()
    optimizer = QFTLion(model.parameters(), gradient=gradient)
    optimizer.train()
    loss(model).backward()
    optimizer.step()
    if gradient == "stack":
        loss(model).backward()
    measured = {row.state: row.bytes for row in memory_ledger(model, optimizer).rows}
    estimate = estimate_memory(tiny(family), gradient=gradient)
    assert {row.state: row.bytes for row in estimate.rows} == measured
