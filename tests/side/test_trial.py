"""A trial at attach refuses, by name, families whose side networks would fail in a step."""

import logging

import pytest
import torch
import transformers as hf

from qft_hf.side import (
    QSTConfig,
    attach,
    attach_side_network,
    side_config,
    side_parameters,
    trial,
)
from tests.side.families import SIZES, classifier, decoder, texts
from tests.tolerances import assert_same_bits

CONFIG = QSTConfig(r=4, rank=4)
READERS = {name: SIZES[name] for name in SIZES if "key_value" not in name}

Causal, Classifier = hf.AutoModelForCausalLM, hf.AutoModelForSequenceClassification
UNFIT = {
    "XLNet": (
        Causal,
        hf.XLNetConfig(vocab_size=131, d_model=48, n_layer=2, n_head=4, d_inner=72),
        "XLNetLMHeadModel .* XLNetLayer at width 12 ended in RuntimeError: einsum",
    ),
    "BigBird": (
        Classifier,
        hf.BigBirdConfig(**READERS),
        "BigBirdForSequenceClassification .* BigBirdLayer at .* must be multiple of block size",
    ),
    # Its cache has a list beside the layers.
    "MiniMax": (
        Causal,
        hf.MiniMaxConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=12),
        "MiniMaxForCausalLM .* MiniMaxDecoderLayer at .* ended in IndexError",
    ),
    # Fails in backward, in the second pass: its layers keep the state of the first.
    "RecurrentGemma": (
        Causal,
        hf.RecurrentGemmaConfig(**SIZES, attention_window_size=8),
        "RecurrentGemmaForCausalLM .* RecurrentGemmaDecoderLayer at .* a second time",
    ),
    # Its head reads what the decoder pools, which the side network did not change: it was
    # trained with gradients of None, without a word.
    "NomicBert": (
        Classifier,
        hf.NomicBertConfig(**READERS),
        "NomicBertForSequenceClassification .* the head does not read the last hidden state",
    ),
}  # fmt: skip


def output(model):
    with torch.no_grad():
        return model.eval()(input_ids=texts()).logits


def facts(model):
    """Return what a trial could have changed, beside values."""
    hooks = [
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    ]
    own = [set(vars(module)) for module in model.modules()]
    return (
        [module.training for module in model.modules()],
        hooks,
        own,
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
    )


@pytest.mark.parametrize(
    ("family", "device"),
    [(family, "cpu") for family in UNFIT]
    # The other two do not run there without a side network either.
    + [(family, "meta") for family in UNFIT if family not in ("XLNet", "BigBird")],
)
def test_a_side_network_that_would_fail_in_a_step_is_refused_and_the_model_is_unchanged(
    family, device
):
    """They were attached, and ended in PyTorch's errors in the first steps, or learned nothing."""
    auto, config, match = UNFIT[family]
    with torch.device(device):
        model = auto.from_config(config).eval()
    expected = None if device == "meta" else output(model)
    before = facts(model)

    with pytest.raises(ValueError, match=rf"{match}.* Choose another r or another model, or train"):
        attach_side_network(model, CONFIG)

    assert facts(model) == before
    if expected is not None:
        assert_same_bits(output(model), expected)


def test_an_alignment_that_only_a_narrow_layer_lacks_is_refused():
    """Products of experts need rows of 16 bytes: an r that fits the hidden size may not suit."""
    config = hf.GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=12)
    model = Causal.from_config(config)

    with pytest.raises(ValueError, match=r"with r=8\. .* multiple of 16 bytes\. Choose another r"):
        attach_side_network(model, QSTConfig(r=8))

    attach_side_network(model, CONFIG)


@pytest.mark.parametrize("training", [False, True])
def test_the_trial_draws_no_random_numbers_and_leaves_no_trace(training, monkeypatch):
    kept = []
    for tried in (lambda network, model: None, attach.try_beside):
        monkeypatch.setattr(attach, "try_beside", tried)
        torch.manual_seed(4)
        model = classifier().train(training)  # with dropout
        attach_side_network(model, CONFIG)
        kept.append((facts(model), side_parameters(model), torch.rand(3)))

    assert kept[0][0] == kept[1][0]
    assert_same_bits(kept[0][2], kept[1][2])
    for name, parameter in kept[0][1].items():
        assert_same_bits(kept[1][1][name].detach(), parameter.detach())
        assert kept[1][1][name].grad is None


def test_what_modules_note_at_their_first_pass_is_forgotten():
    """Linear4bit of bitsandbytes takes the dtype of its first input for all later products."""
    model = decoder("Llama")
    linear = model.model.layers[0].mlp.up_proj
    linear.register_forward_hook(lambda module, args, _: setattr(module, "noted", args[0].dtype))

    attach_side_network(model, CONFIG)

    assert not hasattr(linear, "noted")


def test_a_base_that_needs_more_than_token_ids_is_not_tried_which_is_logged(caplog):
    model = decoder("Llama")
    model.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["pixel_values"], with_kwargs=True
    )

    with caplog.at_level(logging.WARNING, "qft_hf"):
        attach_side_network(model, CONFIG)

    assert "The side network of LlamaForCausalLM was not tried: 'pixel_values'" in caplog.text


def test_a_plan_tries_each_side_network_of_each_model_once(monkeypatch):
    """`qft-hf plan` attaches a side network to the same model for each form of its base."""
    tried = []
    monkeypatch.setattr(trial, "_tried_on_meta", set())
    monkeypatch.setattr(trial, "_train", lambda network, base: tried.append(network.config.r))

    def plan(r, **sizes):
        with torch.device("meta"):
            model = Causal.from_config(hf.LlamaConfig(**SIZES | sizes))
        attach_side_network(model, QSTConfig(r=r))

    for _ in range(3):
        plan(4)
    plan(2)
    plan(4, intermediate_size=80)

    assert tried == [4, 2, 4]


def test_a_lack_of_memory_is_no_fault_of_the_family():
    model = decoder("Llama")

    def fail(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.norm.register_forward_pre_hook(fail)

    with pytest.raises(torch.OutOfMemoryError):
        attach_side_network(model, CONFIG)


def test_all_heads_of_a_family_are_divided():
    """Those of Laguna's layers, of sliding windows, of Kimi's linear attention and of DeepSeek's
    indexer stayed as many as those of the base."""
    laguna = side_config(
        hf.LagunaConfig(**SIZES | {"hidden_size": 64}, num_attention_heads_per_layer=[8, 16, 8]),
        QSTConfig(r=2),
    )
    mimo = side_config(
        hf.MiMoV2FlashConfig(
            **SIZES | {"hidden_size": 64}, swa_num_attention_heads=8, swa_num_key_value_heads=4
        ),
        QSTConfig(r=2),
    )

    assert laguna.num_attention_heads_per_layer == [2, 2, 2]
    assert (mimo.swa_num_attention_heads, mimo.swa_num_key_value_heads) == (4, 2)
    assert (mimo.num_attention_heads, mimo.num_key_value_heads) == (2, 1)
    kimi = hf.KimiLinearConfig(**SIZES | {"num_key_value_heads": 4}, linear_num_heads=6)
    assert side_config(kimi, QSTConfig(r=4)).linear_num_heads == 1
    assert side_config(kimi, QSTConfig(r=2)).linear_num_heads == 3
    deepseek = hf.DeepseekV32Config(**SIZES | {"num_key_value_heads": 4}, index_n_heads=8)
    assert side_config(deepseek, QSTConfig(r=4)).index_n_heads == 2
