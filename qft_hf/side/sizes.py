"""The sizes of a side network's layers: arithmetic on the configuration of the base."""

import copy
from typing import Any

from .config import QSTConfig

# Names in transformers for the width inside an MLP or an expert.
INTERMEDIATE = (
    "intermediate_size", "dense_intermediate_size", "moe_intermediate_size",
    "shared_expert_intermediate_size", "ffn_dim", "decoder_ffn_dim", "ffn_hidden_size",
    "hidden_dim", "n_inner", "d_inner", "dff", "lru_width",
)  # fmt: skip
# Names for the number of heads of modules beside the attention: linear attention, an indexer.
HEADS = ("linear_num_heads", "index_n_heads")
# Names for the number of experts, and of those that a token takes.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok")


def side_config(config: Any, side: QSTConfig) -> Any:
    """Return the configuration from which the base's own layer class builds a side layer.

    It has as many layers, of width `hidden_size / r`. The number of heads is divided by `r` too,
    those of linear attention included, and reduced to a divisor of the width, as some classes need.
    Heads keep their size, so the base's rotary positions fit the side network as they are. A
    mixture of experts becomes dense: as wide as the family's dense layers or, if it has none, as
    all experts of one token together.

    Args:
        config: The transformers configuration of the base; not modified.
        side: The configuration of the side network.

    Raises:
        ValueError: `r` does not divide the hidden size, or `config` has no value for a layer size,
            gives each layer sizes of its own, or is of a family whose router needs experts.
    """
    config = copy.deepcopy(config.get_text_config())
    if getattr(config, "is_heterogeneous", False) or any(
        isinstance(getattr(config, name, None), list | tuple)
        for name in (*INTERMEDIATE, "num_attention_heads")
    ):
        raise ValueError(
            f"{type(config).__name__} gives each layer sizes of its own, and the layers of a side "
            "network have one size. Train all parameters (method full), or choose another model."
        )
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    if missing := [name for name in names if not getattr(config, name, None)]:
        raise ValueError(
            f"{type(config).__name__} has no {', '.join(missing)}, from which a side network is "
            "sized. Side tuning needs a transformer with attention in each layer."
        )
    width, heads = config.hidden_size, config.num_attention_heads
    if width % side.r:
        raise ValueError(
            f"r={side.r} does not divide the hidden size {width} of {type(config).__name__}. "
            f"The nearest r that does is {_nearest_divisor(width, side.r)}."
        )
    head_dim = getattr(config, "head_dim", None) or width // heads
    config.hidden_size = width // side.r
    for of in ("", "swa_"):  # sliding windows may have heads of their own
        if not (own_heads := getattr(config, f"{of}num_attention_heads", None)):
            continue
        own_heads = _largest_divisor(config.hidden_size, own_heads // side.r)
        setattr(config, f"{of}num_attention_heads", own_heads)
        if (key_value_heads := getattr(config, f"{of}num_key_value_heads", None)) is not None:
            key_value_heads = _largest_divisor(own_heads, key_value_heads // side.r)
            setattr(config, f"{of}num_key_value_heads", key_value_heads)
    if heads_of_layers := getattr(config, "num_attention_heads_per_layer", None):  # of Laguna
        equal = [config.num_attention_heads] * len(heads_of_layers)
        config.num_attention_heads_per_layer = equal
    for name in HEADS:
        if value := getattr(config, name, None):
            setattr(config, name, max(1, value // side.r))
    if config.hidden_size // config.num_attention_heads != head_dim:
        config.head_dim = head_dim
    for name in INTERMEDIATE:
        if value := getattr(config, name, None):
            setattr(config, name, -(-value // side.r))  # rounded up
    if key_heads := getattr(config, "linear_num_key_heads", None):
        for_each = config.linear_num_value_heads // key_heads
        config.linear_num_key_heads = max(1, key_heads // side.r)
        config.linear_num_value_heads = config.linear_num_key_heads * for_each
    _make_dense_(config)
    return config


def _make_dense_(config: Any) -> None:
    """Make layers of a mixture of experts dense, or give them one expert for all tokens."""
    chosen = getattr(config, "num_experts_per_tok", None)
    if chosen is None:
        return
    n_layers = config.num_hidden_layers
    if hasattr(config, "mlp_layer_types"):  # of GLM-4.7-Flash
        config.mlp_layer_types = ["dense"] * n_layers
    elif hasattr(config, "mlp_only_layers"):  # of Qwen
        config.mlp_only_layers = list(range(n_layers))
    elif hasattr(config, "first_k_dense_replace"):  # of DeepSeek
        config.first_k_dense_replace = n_layers
    elif hasattr(config, "n_group"):
        raise ValueError(
            f"The router of {type(config).__name__} compares groups of two experts or more, and a "
            "layer of a side network has one. Train all parameters (method full), or choose "
            "another model."
        )
    else:
        for name in EXPERTS:
            if hasattr(config, name):
                setattr(config, name, 1)
        own = "moe_intermediate_size"
        width = own if hasattr(config, own) else "intermediate_size"
        setattr(config, width, getattr(config, width) * chosen)


def _largest_divisor(value: int, limit: int) -> int:
    """Return the largest divisor of `value` up to `limit`, at least 1."""
    return next(n for n in range(max(1, min(limit, value)), 0, -1) if value % n == 0)


def _nearest_divisor(value: int, r: int) -> int:
    """Return the divisor of `value` above 1 that is nearest to `r`; the smaller one in a tie."""
    divisors = [n for n in range(2, value + 1) if value % n == 0]
    return min(divisors, key=lambda n: (abs(n - r), n))
