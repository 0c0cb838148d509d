"""A side network on tiny models of each family: start, training, generation."""

import pytest
import torch

from qft_hf.side import QSTConfig, attach_side_network, side_network_of, side_parameters
from tests.side.families import DECODERS, classifier, decoder, texts
from tests.tolerances import assert_same_bits

CONFIG = QSTConfig(r=4, rank=4)


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def disturbed_(model):
    """Make the side network change the logits, as if it had been trained."""
    with torch.no_grad():
        side_network_of(model).upsample.normal_(generator=torch.Generator().manual_seed(7))
    return model


def trained_(model, steps=3, **inputs):
    """Train with some steps of AdamW; return the losses."""
    model.train()
    optimizer = torch.optim.AdamW(side_parameters(model).values(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def left_padded():
    """Return ids and mask of three texts of unequal length, padded on the left."""
    ids = texts()
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, :2] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def frozen_state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", DECODERS)
def test_the_logits_are_those_of_the_base_until_it_is_trained_and_then_learn(family, dtype):
    model = decoder(family, dtype=dtype)
    inputs = left_padded()
    expected, before = logits(model, **inputs), frozen_state(model)

    assert attach_side_network(model, CONFIG) is model
    assert_same_bits(logits(model, **inputs), expected)
    first = {name: p.detach().clone() for name, p in side_parameters(model).items()}
    losses = trained_(model, steps=6, labels=inputs["input_ids"], **inputs)

    assert losses[-1] < losses[0]
    assert not torch.equal(logits(model, **inputs), expected)
    own = side_parameters(model)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() - own.keys()
    for name, value in before.items():
        assert_same_bits(after[name].detach(), value)
        assert after[name].grad is None
    assert all(parameter.dtype == torch.float32 for parameter in own.values())
    still = {name for name, value in first.items() if torch.equal(value, own[name].detach())}
    # The only expert gets all tokens, whatever its router computes.
    assert {name for name in still if "mlp.gate" not in name} == set()


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_caches_equals_that_without(family):
    """Greedy and beam search, left padding. Masked keys add zeros: only sums change their order."""
    model = disturbed_(attach_side_network(decoder(family), CONFIG))
    for settings in ({"num_beams": 1}, {"num_beams": 3}):
        with_cache, without = (
            model.generate(
                **left_padded(), **settings, max_new_tokens=8, min_new_tokens=8, do_sample=False,
                use_cache=cached, return_dict_in_generate=True, output_logits=True,
            )
            for cached in (True, False)
        )  # fmt: skip

        assert torch.equal(with_cache.sequences, without.sequences)
        for cached, full in zip(with_cache.logits, without.logits, strict=True):
            torch.testing.assert_close(cached, full, rtol=1e-4, atol=1e-4)


def test_sampling_draws_the_same_tokens_with_and_without_caches():
    model = disturbed_(attach_side_network(decoder("Llama"), CONFIG))
    drawn = []
    for cached in (True, False):
        torch.manual_seed(3)
        drawn.append(
            model.generate(**left_padded(), do_sample=True, max_new_tokens=9, use_cache=cached)
        )

    assert torch.equal(*drawn)
    assert not torch.equal(
        drawn[0], model.generate(**left_padded(), do_sample=False, max_new_tokens=9)
    )


@pytest.mark.parametrize("family", ["BERT", "Llama", "GPT-2", "Qwen3"])
def test_classifiers_start_as_the_base_and_train_their_head_too(family):
    model = classifier(family)
    inputs = left_padded()
    labels = torch.tensor([0, 2, 1])
    expected, before = logits(model, **inputs), frozen_state(model)

    attach_side_network(model, CONFIG)
    assert_same_bits(logits(model, **inputs), expected)
    losses = trained_(model, steps=6, labels=labels, **inputs)

    assert losses[-1] < losses[0]
    own = side_parameters(model)
    heads = {name for name in own if not name.startswith("side_network.")}
    assert heads == {name for name in before if name.startswith(("classifier.", "score."))}
    for name, parameter in model.named_parameters():
        assert (name in before and torch.equal(parameter, before[name])) == (name not in own)
