"""What a side network computes, what it keeps for backward, and what it leaves unchanged."""

import copy
import io

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.generation.continuous_batching import PagedAttentionCache

from qft_hf import QFTConfig, quantize_model_
from qft_hf.quant import QFTWeight
from qft_hf.side import QSTConfig, attach_side_network, side_network_of, side_parameters
from qft_hf.side.cache import make_room_
from tests.side.families import EXPERTS, LINEAR_ATTENTION, SIZES, classifier, decoder, texts
from tests.side.test_families import CONFIG, disturbed_, logits, trained_
from tests.tolerances import assert_same_bits

WIDTH = (SIZES["hidden_size"],)
DOWNSAMPLES = ["adapter", "linear", "mean", "max"]


def narrowed(network, number, hidden):
    """Return a hidden state at the side network's width, by the definition of `downsample`."""
    module = network.downsamples[number]
    if network.config.downsample == "adapter":
        middle = nn.functional.silu(hidden @ module.down.weight.T)
        width = network.gates.shape[1]
        return nn.functional.layer_norm(
            middle @ module.up.weight.T, (width,), module.norm.weight, module.norm.bias
        )
    if network.config.downsample == "linear":
        return hidden @ module.weight.T
    parts = hidden.reshape(*hidden.shape[:-1], -1, network.config.r)
    return parts.mean(-1) if network.config.downsample == "mean" else parts.max(-1).values


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_the_forward_is_the_recursion_of_the_paper(downsample):
    ids = texts()
    base = decoder("Llama")
    hidden = []
    base.model.layers[0].register_forward_pre_hook(lambda layer, args: hidden.append(args[0]))
    for layer in base.model.layers:
        layer.register_forward_hook(lambda layer, args, output: hidden.append(output))
    with torch.no_grad():
        last = base.model(ids).last_hidden_state
        positions = base.model.rotary_emb(last, torch.arange(ids.shape[1])[None])
    model = attach_side_network(decoder("Llama"), QSTConfig(r=4, rank=3, downsample=downsample))
    network = side_network_of(disturbed_(model))
    with torch.no_grad():
        network.norm.weight.copy_(torch.linspace(0.5, 2, 12))
        network.gates.copy_(torch.linspace(-2, 2, network.gates.numel()).view_as(network.gates))

        state = narrowed(network, 0, hidden[0])
        for number, layer in enumerate(network.layers):
            gate = 1 / (1 + torch.exp(-network.gates[number]))
            state = (1 - gate) * narrowed(network, number + 1, hidden[number + 1]) + gate * state
            state = layer(state, position_embeddings=positions)
        norm = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt() * network.norm.weight
        mixed = last + norm @ network.upsample.T
        expected = mixed @ model.lm_head.weight.T

    # FP32 sums in another order; the logits are of order 10.
    torch.testing.assert_close(logits(model, input_ids=ids), expected, rtol=1e-4, atol=1e-4)


def test_it_starts_as_published():
    network = side_network_of(attach_side_network(decoder("Llama"), CONFIG))

    assert network.gates.shape == (3, 12)
    assert (network.gates == 0.5).all()
    assert network.upsample.shape == (48, 12)
    assert (network.upsample == 0).all()
    assert len(network.downsamples) == 4
    assert {type(layer).__name__ for layer in network.layers} == {"LlamaDecoderLayer"}


def bytes_saved(model, **inputs):
    """Return the bytes that autograd keeps of a forward pass, counting each storage once, and the
    number of kept tensors that are as wide as the base."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())  # alive: no reused addresses
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**inputs).loss
    loss.backward()
    wide = sum(1 for tensor, _ in kept.values() if tensor.shape[-1:] == WIDTH)
    return sum(n_bytes for _, n_bytes in kept.values()), wide


def deep(n_layers, **arguments):
    config = hf.LlamaConfig(**SIZES | {"num_hidden_layers": n_layers}, **arguments)
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).train()


@pytest.mark.parametrize("gradients_at_embeddings", [False, True])
@pytest.mark.parametrize(("downsample", "a_layer"), [("mean", 0), ("max", 0), ("linear", 1)])
def test_no_activation_of_the_base_is_kept(downsample, a_layer, gradients_at_embeddings):
    """Of tensors as wide as the base, only inputs of a learned D are kept, one for each layer."""
    wide = {}
    for n_layers in (2, 5):
        model = attach_side_network(deep(n_layers), QSTConfig(r=4, downsample=downsample))
        if gradients_at_embeddings:  # as trainers set it for adapters under checkpointing
            model.enable_input_require_grads()
        _, wide[n_layers] = bytes_saved(model, input_ids=texts(), labels=texts())

    assert wide[5] - wide[2] == 3 * a_layer


def test_embeddings_that_require_gradients_get_none():
    model = attach_side_network(decoder("Llama"), CONFIG)
    embedded = model.model.embed_tokens(texts()).detach().requires_grad_()

    disturbed_(model)(inputs_embeds=embedded, labels=texts()).loss.backward()

    assert embedded.grad is None


def test_a_fraction_of_what_full_training_keeps_is_kept():
    inputs = {"input_ids": texts(), "labels": texts()}
    full, _ = bytes_saved(deep(5), **inputs)

    side, _ = bytes_saved(attach_side_network(deep(5), QSTConfig(r=4, downsample="mean")), **inputs)

    # Except for the logits that the loss keeps, all tensors are at least r times narrower.
    of_loss = 2 * texts().numel() * SIZES["vocab_size"] * 4
    assert side - of_loss < (full - of_loss) / 3


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_checkpointing_changes_no_gradient(downsample, bf16):
    gradients = []
    kept = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = attach_side_network(decoder("Llama"), QSTConfig(r=4, downsample=downsample))
        disturbed_(model).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(input_ids=texts(), labels=texts()).loss
        loss.backward()
        kept.append(bytes_saved(model, input_ids=texts(), labels=texts())[0])
        model.zero_grad()
        for _ in range(2):  # micro-batches add up
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(input_ids=texts(), labels=texts()).loss
            loss.backward()
        gradients.append({name: p.grad for name, p in side_parameters(model).items()})

    assert kept[1] < kept[0]
    for name, gradient in gradients[0].items():
        assert_same_bits(gradient, gradients[1][name])


@pytest.mark.parametrize("downsample", DOWNSAMPLES)
def test_with_checkpointing_nothing_as_wide_as_the_base_is_kept_in_any_layer(downsample):
    wide = {}
    for n_layers in (2, 5):
        model = attach_side_network(deep(n_layers), QSTConfig(r=4, downsample=downsample))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        _, wide[n_layers] = bytes_saved(model, input_ids=texts(), labels=texts())

    assert wide[5] == wide[2]


@pytest.mark.parametrize("family", ["BERT", "GPT-2"])
def test_a_base_that_runs_again_gives_classifiers_the_same_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = disturbed_(attach_side_network(classifier(family), CONFIG)).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=texts(), labels=torch.tensor([0, 2, 1])).loss.backward()
        gradients.append({name: p.grad for name, p in side_parameters(model).items()})

    for name, gradient in gradients[0].items():
        assert_same_bits(gradient, gradients[1][name])


def test_an_int8_side_network_gets_the_same_gradients_from_a_base_that_runs_again():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = disturbed_(attach_side_network(decoder("Llama"), CONFIG)).train()
        quantize_model_(side_network_of(model), QFTConfig())
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=texts(), labels=texts()).loss.backward()
        gradients.append(
            {name: p.grad.dequantize() if isinstance(p, QFTWeight) else p.grad
             for name, p in side_parameters(model).items()}
        )  # fmt: skip

    for name, gradient in gradients[0].items():
        assert_same_bits(gradient, gradients[1][name])


def test_the_base_runs_without_dropout_and_the_side_network_with_it():
    model = classifier("BERT")
    model.bert.embeddings.dropout.p = 0.5
    attach_side_network(model, CONFIG)
    seen = {}
    model.bert.encoder.layer[0].register_forward_pre_hook(
        lambda layer, args: seen.setdefault("embeddings", []).append(args[0].clone())
    )

    model.train()
    for _ in range(2):
        model(texts())

    assert_same_bits(*seen["embeddings"])
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    in_training = {id(module) for module in dropouts if module.training}
    assert {id(model.dropout)} < in_training  # of the head
    assert not in_training & {id(module) for module in model.bert.modules()}
    assert not any(layer.training for layer in model.bert.encoder.layer)
    assert all(module.training for module in side_network_of(model).modules())
    assert model.training


@pytest.mark.parametrize("frozen", ["one module", "the norms", "all"])
def test_frozen_downsampling_gets_no_gradient_with_checkpointing_either(frozen):
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(2)
        model = disturbed_(attach_side_network(decoder("Llama"), CONFIG)).train()
        modules = side_network_of(model).downsamples
        for module in modules[:1] if frozen == "one module" else modules:
            (module.norm if frozen == "the norms" else module).requires_grad_(False)
        if checkpointed:
            model.gradient_checkpointing_enable()
        model(input_ids=texts(), labels=texts()).loss.backward()
        gradients.append({n: p.grad for n, p in side_parameters(model).items() if p.requires_grad})

    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert_same_bits(gradients[1][name], gradient)


@pytest.mark.parametrize("kernels", [("eager", "sdpa"), ("sdpa", "eager")], ids=str)
def test_side_layers_follow_a_change_of_attention_kernels(kernels):
    """Masks are made for the kernels of the base: none for a causal one in SDPA."""
    model = decoder("Llama")
    model.set_attn_implementation(kernels[0])
    disturbed_(attach_side_network(model, CONFIG))
    expected = logits(model, input_ids=texts())

    model.set_attn_implementation(kernels[1])

    torch.testing.assert_close(logits(model, input_ids=texts()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Gemma 2", "BERT"])
def test_the_last_of_the_hidden_states_is_what_the_head_reads(family):
    model = classifier() if family == "BERT" else decoder(family)
    disturbed_(attach_side_network(model, CONFIG))
    inputs = {"input_ids": texts(), "output_hidden_states": True}
    read = []
    model.base_model.register_forward_hook(lambda module, args, output: read.append(output[0]))

    with torch.no_grad():
        named = model(**inputs).hidden_states
        unnamed = model(**inputs, return_dict=False)[-1]

    assert len(named) == 4
    assert_same_bits(named[-1], read[0])
    assert_same_bits(unnamed[-1], read[1])


def test_an_error_in_the_base_leaves_autograd_on():
    model = attach_side_network(decoder("Llama"), CONFIG)

    with pytest.raises(IndexError):
        model(torch.tensor([[SIZES["vocab_size"] + 1]]))

    assert torch.is_grad_enabled()
    model(texts(), labels=texts()).loss.backward()


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma 3"])
def test_documents_in_one_row_do_not_see_each_other(family):
    model = disturbed_(attach_side_network(decoder(family), CONFIG))
    ids = texts(1, 14)
    positions = torch.tensor([[*range(6), *range(8)]])
    others = ids.clone()
    others[0, :6] = texts(1, 6, seed=5)

    first, second = (
        logits(model, input_ids=tokens, position_ids=positions, use_cache=False)[:, 6:]
        for tokens in (ids, others)
    )

    assert_same_bits(first, second)


def test_a_copy_has_a_side_network_of_its_own():
    model = attach_side_network(decoder("Llama"), CONFIG)
    expected = logits(model, input_ids=texts())

    twin = copy.deepcopy(model)
    trained_(twin, input_ids=texts(), labels=texts())

    assert_same_bits(logits(model, input_ids=texts()), expected)
    assert not torch.equal(logits(twin, input_ids=texts()), expected)


def test_a_pickled_model_computes_the_same():
    model = disturbed_(attach_side_network(decoder("Llama"), CONFIG))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)

    again = torch.load(buffer, weights_only=False)

    assert_same_bits(logits(again, input_ids=texts()), logits(model, input_ids=texts()))


def test_an_int8_base_stays_int8_and_its_classifier_trains_in_float():
    model = quantize_model_(classifier("BERT"), QFTConfig())
    codes = {n: p.codes.clone() for n, p in model.named_parameters() if isinstance(p, QFTWeight)}

    attach_side_network(model, CONFIG)
    losses = trained_(model, steps=6, input_ids=texts(), labels=torch.tensor([0, 2, 1]))

    assert losses[-1] < losses[0]
    assert type(model.classifier) is nn.Linear
    for name, value in codes.items():
        if not name.startswith("classifier."):
            assert_same_bits(model.get_parameter(name).codes, value)


def test_an_int8_decoder_starts_as_it_was_and_learns():
    model = quantize_model_(decoder("Llama"), QFTConfig())
    expected = logits(model, input_ids=texts())

    attach_side_network(model, CONFIG)
    assert_same_bits(logits(model, input_ids=texts()), expected)
    losses = trained_(model, steps=6, input_ids=texts(), labels=texts())

    assert losses[-1] < losses[0]


def test_the_sizes_of_a_model_without_storage_are_those_of_a_real_one():
    with torch.device("meta"):
        skeleton = hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES))

    shapes = {n: p.shape for n, p in side_parameters(attach_side_network(skeleton, CONFIG)).items()}

    real = side_parameters(attach_side_network(decoder("Llama"), CONFIG))
    assert shapes == {name: parameter.shape for name, parameter in real.items()}
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_llama_2_7b_gets_less_than_one_percent():
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(hf.LlamaConfig())  # the defaults are its sizes

    own = sum(p.numel() for p in side_parameters(attach_side_network(model)).values())

    assert 0.004 < own / sum(p.numel() for p in model.parameters()) < 0.01


@pytest.mark.parametrize("n_experts", [0, 4])
def test_of_a_vision_language_model_the_text_decoder_gets_one(n_experts):
    """A vision tower with as many layers was taken for a second stack.

    With experts, the configuration of the whole model has no `initializer_range`: a side network
    ended in an AttributeError.
    """
    text = SIZES | LINEAR_ATTENTION | {"layer_types": ["linear_attention", "full_attention"]}
    text |= {"num_hidden_layers": 2, "head_dim": 12}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"out_hidden_size": 48, "num_position_embeddings": 16, "patch_size": 4}
    if n_experts:
        text |= EXPERTS | {"shared_expert_intermediate_size": 40}
        config = hf.Qwen3_5MoeConfig(text_config=text, vision_config=vision)
    else:
        config = hf.Qwen3_5Config(text_config=text, vision_config=vision)
    model = hf.AutoModelForImageTextToText.from_config(config).eval()
    expected = logits(model, input_ids=texts())

    attach_side_network(model, CONFIG)

    assert_same_bits(logits(model, input_ids=texts()), expected)
    losses = trained_(model, steps=6, labels=texts(), input_ids=texts())
    assert losses[-1] < losses[0]


def t5():
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=20, num_layers=2, num_heads=4)
    )


def bloom():
    return hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=4))


def meta(config):
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(config)


def with_adapters():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(decoder("Llama"), LoraConfig(target_modules=["q_proj"]))


REFUSED = {
    "two stacks": (t5, "T5ForConditionalGeneration has no unique stack of layers"),
    "no model of transformers": (lambda: nn.Linear(3, 3), "model of transformers, got Linear"),
    "no head": (lambda: decoder("Llama").model, "LlamaModel has no head. Load the model with Auto"),
    "adapters": (with_adapters, "has PEFT adapters, .* Merge them"),
    "attached": (lambda: attach_side_network(decoder("Llama"), CONFIG), "a side network already"),
    "ALiBi": (
        bloom,
        "BloomBlock takes alibi, .* Choose a model with rotary or learned positions",
    ),
    "Mamba-2": (
        lambda: meta(hf.GraniteMoeHybridConfig(num_hidden_layers=1, layer_types=["mamba"])),
        r"DecoderLayer has a state space, .*\(method full\), or choose another model",
    ),
    "a router of two": (
        lambda: meta(hf.PhimoeConfig(num_hidden_layers=1)),
        r"PhimoeDecoderLayer has a router that needs two experts or more, .* \(method full\)",
    ),
    "several hidden states": (
        lambda: meta(hf.DeepseekV4Config(num_hidden_layers=1)),
        r"trial .* DeepseekV4DecoderLayer at width .* ended in RuntimeError: .* Choose another r",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_have_one_are_refused_by_name_and_unchanged(kind):
    make, match = REFUSED[kind]
    model = make()
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]

    with pytest.raises(ValueError, match=match):
        attach_side_network(model, CONFIG)

    assert before == [(name, p.requires_grad) for name, p in model.named_parameters()]


@pytest.mark.parametrize("wrapped", [False, True])
def test_adapters_that_come_after_it_are_refused_too(wrapped):
    """They froze the side network, as TRL's `peft_config` does, and next to nothing was trained."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    model = attach_side_network(decoder("Llama"), CONFIG)
    adapters = LoraConfig(target_modules=["q_proj"])
    if wrapped:
        model = get_peft_model(model, adapters)
    else:
        model = inject_adapter_in_model(adapters, model)  # as add_adapter of transformers does

    with pytest.raises(ValueError, match=r"PEFT adapters beside its .* Leave peft_config out"):
        model(input_ids=texts(), labels=texts())


def test_an_r_that_does_not_fit_is_refused_and_the_model_is_unchanged():
    model = decoder("Llama")

    with pytest.raises(
        ValueError, match=r"r=5 does not divide the hidden size 48 .* r that does is 4"
    ):
        attach_side_network(model, QSTConfig(r=5))

    assert all(parameter.requires_grad for parameter in model.parameters())
    assert side_network_of(model) is None


@pytest.mark.parametrize(
    ("make", "labels", "match"),
    [
        (classifier, texts(), r"or 3 numbers for each text, got .* \(3, 14\) .* Load the base"),
        (classifier, torch.zeros(3, 2), r"or 3 numbers for each text, got .* \(3, 2\)"),
        (lambda: decoder("Llama"), torch.zeros(3).long(), r"for each token, got .* \(3,\)"),
    ],
)
def test_labels_for_a_task_that_the_head_has_not_are_refused(make, labels, match):
    model = attach_side_network(make(), CONFIG)

    with pytest.raises(ValueError, match=match):
        model(input_ids=texts(), labels=labels)


def test_a_cache_of_the_base_alone_is_refused():
    model = decoder("Llama")
    output = model(texts(), use_cache=True)
    (name,) = output.keys() & {"cache", "past_key_values"}  # the second one is transformers 5.17's
    attach_side_network(model, CONFIG)

    with pytest.raises(ValueError, match="filled before the side network was attached"):
        model(texts(3, 1), **{name: output[name]})


def test_continuous_batching_is_refused_with_what_to_call():
    cache = object.__new__(PagedAttentionCache)  # a whole one takes most of the memory

    with pytest.raises(ValueError, match=r"Call generate on a padded batch instead"):
        make_room_([cache], 3)
