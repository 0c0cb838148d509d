"""`QSTConfig` and the sizes that follow from it."""

import pytest
import transformers as hf

from qft_hf.side import QSTConfig, side_config


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ({"r": 1}, ValueError, "r must be an integer of 2 or more, got 1"),
        ({"r": 4.0}, TypeError, "r must be an integer of 2 or more, got 4.0"),
        ({"r": True}, TypeError, "r must be an integer"),
        ({"rank": 0}, ValueError, "rank must be an integer of 1 or more, got 0"),
        ({"downsample": "lora"}, ValueError, "'adapter' or 'linear' or 'mean' or 'max', got 'lo"),
    ],
)
def test_values_out_of_range_are_refused_with_the_range(values, error, match):
    with pytest.raises(error, match=match):
        QSTConfig(**values)


def test_sizes_of_llama_2_are_divided_and_heads_keep_their_size():
    base = hf.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32)

    side = side_config(base, QSTConfig(r=16))

    assert (side.hidden_size, side.num_attention_heads, side.intermediate_size) == (256, 2, 688)
    assert (side.head_dim, side.num_key_value_heads, side.num_hidden_layers) == (128, 2, 32)
    assert (base.hidden_size, base.intermediate_size) == (4096, 11008)


def test_fewer_heads_than_r_become_one_of_the_same_size():
    """SmolLM2-135M: 9 heads of 64 that share 3 keys and values."""
    base = hf.LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    )

    side = side_config(base, QSTConfig(r=16))

    assert (side.hidden_size, side.num_attention_heads, side.num_key_value_heads) == (36, 1, 1)
    assert (side.head_dim, side.intermediate_size) == (64, 96)


def test_other_names_of_the_sizes_are_divided_too():
    gpt2 = side_config(hf.GPT2Config(n_embd=48, n_head=6, n_inner=100), QSTConfig(r=3))
    opt = hf.OPTConfig(hidden_size=48, num_attention_heads=6, ffn_dim=90)
    opt = side_config(opt, QSTConfig(r=3))
    falcon = hf.FalconConfig(hidden_size=48, num_attention_heads=6, ffn_hidden_size=90)
    distilbert = hf.DistilBertConfig(dim=48, n_heads=6, hidden_dim=90)

    assert (gpt2.n_embd, gpt2.n_head, gpt2.n_inner) == (16, 2, 34)
    assert (opt.hidden_size, opt.num_attention_heads, opt.ffn_dim) == (16, 2, 30)
    assert side_config(falcon, QSTConfig(r=3)).ffn_hidden_size == 30
    assert side_config(distilbert, QSTConfig(r=3)).hidden_dim == 30


def test_the_side_of_a_mixture_of_experts_is_dense_and_as_wide_as_what_a_token_takes():
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    mixtral = side_config(
        hf.MixtralConfig(**sizes, intermediate_size=40, num_local_experts=8, num_experts_per_tok=2),
        QSTConfig(r=4),
    )
    qwen = side_config(
        hf.Qwen3MoeConfig(**sizes, intermediate_size=80, moe_intermediate_size=20), QSTConfig(r=4)
    )

    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok) == (1, 1)
    assert mixtral.intermediate_size == 20
    assert (qwen.mlp_only_layers, qwen.intermediate_size) == ([0, 1, 2], 20)


def test_experts_of_newer_families_become_dense_or_one_as_wide_as_those_that_a_token_takes():
    """GLM-4.7-Flash failed in its first step, and experts of Ernie 4.5 were as wide as the base's.

    No test of a family had experts whose layers are chosen by `mlp_layer_types`, or whose width has
    a name of its own beside that of dense layers.
    """
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    experts = {**sizes, "intermediate_size": 80, "moe_intermediate_size": 20}
    glm = side_config(hf.Glm4MoeLiteConfig(**experts), QSTConfig(r=4))
    ernie = side_config(hf.Ernie4_5_MoeConfig(**experts, moe_k=6), QSTConfig(r=4))

    assert (glm.mlp_layer_types, glm.intermediate_size) == (["dense"] * 3, 20)
    assert (ernie.moe_num_experts, ernie.moe_k) == (1, 1)
    assert (ernie.intermediate_size, ernie.moe_intermediate_size) == (20, 30)


def test_a_router_that_compares_groups_of_experts_is_refused_if_layers_cannot_be_dense():
    with pytest.raises(ValueError, match=r"router of SolarOpenConfig compares .*\(method full\)"):
        side_config(hf.SolarOpenConfig(), QSTConfig(r=4))


def test_heads_of_linear_attention_are_divided_and_each_keeps_its_values():
    base = hf.Qwen3_5TextConfig(linear_num_key_heads=16, linear_num_value_heads=32)
    fourth, all_of_them = (side_config(base, QSTConfig(r=r)) for r in (4, 32))

    assert (fourth.linear_num_key_heads, fourth.linear_num_value_heads) == (4, 8)
    assert (all_of_them.linear_num_key_heads, all_of_them.linear_num_value_heads) == (1, 2)


@pytest.mark.parametrize(("r", "nearest"), [(7, 6), (11, 12), (17, 16), (1000, 576)])
def test_an_r_that_does_not_divide_the_width_is_refused_with_the_nearest_that_does(r, nearest):
    base = hf.LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3)

    with pytest.raises(ValueError, match=f"hidden size 576 .* nearest r that does is {nearest}"):
        side_config(base, QSTConfig(r=r))


def test_a_model_without_attention_is_refused_by_the_name_of_its_configuration():
    with pytest.raises(ValueError, match="MambaConfig has no num_attention_heads"):
        side_config(hf.MambaConfig(hidden_size=64), QSTConfig(r=4))


@pytest.mark.parametrize(
    "config",
    [
        hf.Gemma4TextConfig(num_hidden_layers=6),  # heads of two sizes
        hf.Gemma3nTextConfig(num_hidden_layers=2, intermediate_size=[64, 128]),
        hf.SwinConfig(),  # heads of four sizes, in one list
    ],
    ids=["heads", "widths", "list of heads"],
)
def test_layers_of_different_sizes_are_refused(config):
    """An AmbiguousGlobalPerLayerAttributeError, or a TypeError of a division, once came instead."""
    with pytest.raises(ValueError, match=r"Config gives each layer sizes.* \(method full\)"):
        side_config(config, QSTConfig(r=4))
