"""What several processes hold and receive, and how exact the mean of their gradients is."""

import copy
from math import log10

import pytest
import torch

from qft_hf import dequantize_model_, estimate_memory
from qft_hf.kernels import quantize
from qft_hf.layout import STATE_GROUP_SIZE
from tests.models import tiny_llama
from tests.processes.accounts import BROAD, REAL, UNEVEN, WAYS, backward, model_of

N_PROCESSES = 2


@pytest.fixture
def of_each(runs):
    """What each process has counted, by the name of the count."""
    return [
        {run.partition(":")[2]: found for run, found in of_one.items() if "account:" in run}
        for of_one in runs.two
    ]


def table(rows):
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("name", WAYS)
def test_the_first_process_holds_what_the_estimate_says(name, of_each):
    estimate = estimate_memory(tiny_llama(**UNEVEN), n_processes=N_PROCESSES, **WAYS[name])

    live = of_each[0][name]["rows"]

    assert [(row.state, row.n_tensors, row.bytes) for row in estimate.rows] == live
    assert f"on each of {N_PROCESSES} processes" in str(estimate)


@pytest.mark.parametrize("name", WAYS)
def test_processes_divide_gradients_and_momentum_and_nothing_else(name, of_each):
    model = tiny_llama(**UNEVEN)
    alone = {row.state: row.bytes for row in estimate_memory(model, **WAYS[name]).rows}
    first, second = (table(found[name]["rows"]) for found in of_each)
    # Both hold the gradients and the state of floats: one or two values of 4 bytes for each.
    floats = 4 * sum(p.numel() for p in model.parameters() if p.ndim < 2)
    twice = {"gradients": floats, "momentum": floats * (2 if "adamw" in name else 1)}

    assert first.keys() == second.keys() == alone.keys()
    for state, (_, of_first) in first.items():
        _, of_second = second[state]
        if state in twice:
            assert of_second < of_first
            assert of_first + of_second == alone[state] + twice[state]
        else:
            assert of_first == of_second == alone[state]


def test_the_ledger_says_that_it_is_of_one_process(of_each):
    for found in of_each:
        for name in WAYS:
            assert f"on this process, one of {N_PROCESSES}" in found[name]["text"]


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_a_process_receives_what_the_estimate_says(gradient, of_each):
    """Counted at the collectives, with the shapes of SmolLM2's layers."""
    estimate = estimate_memory(tiny_llama(**REAL), n_processes=N_PROCESSES, gradient=gradient)

    counted = [found[f"traffic of {gradient}"]["received"] for found in of_each]

    assert counted[0] == estimate.received_bytes
    assert max(counted) / estimate.n_parameters < 1.15


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_rows_in_transit_are_those_of_two_weights_at_most(gradient, of_each):
    estimate = estimate_memory(tiny_llama(**REAL), n_processes=N_PROCESSES, gradient=gradient)
    (predicted,) = (r.bytes for r in estimate.activation_rows if r.state == "rows in transit")

    for found in of_each:
        counted = found[f"traffic of {gradient}"]
        assert counted["weights"] == 2
        assert counted["copied"] == 0
    assert of_each[0][f"traffic of {gradient}"]["in transit"] == predicted


@pytest.mark.parametrize("gradient", ["stack", "release"])
def test_rows_travel_while_backward_makes_the_next_gradient(gradient, of_each):
    """With release, the updated rows of a weight are in place once two more gradients are made."""
    for found in of_each:
        events = found[f"traffic of {gradient}"]["events"]
        order = [weight for event, weight in events if event == "made"]
        assert len(order) == len(set(order)) > 2
        expected = []
        for place in range(len(order) + 1):
            made, before, earlier = (
                order[at : at + 1] if at >= 0 else [] for at in (place, place - 1, place - 2)
            )
            expected += [("made", weight) for weight in made]
            expected += [("finished", weight) for weight in earlier]
            expected += [(event, weight) for weight in before for event in ("received", "gathered")]
            expected += [("sent", weight) for weight in made]
        expected.append(("finished", order[-1]))
        if gradient == "stack":  # rows are updated in the step
            events, expected = (
                [one for one in some if one[0] not in ("gathered", "finished")]
                for some in (events, expected)
            )
        assert events == expected


@pytest.mark.parametrize("name", WAYS)
def test_norms_and_finite_flags_of_all_weights_travel_together(name, of_each):
    """There are three collectives per weight, one for float gradients, and one for all squares."""
    n_weights = sum(p.ndim > 1 for p in tiny_llama(**UNEVEN).parameters())
    wanted = {"all_to_all_single": 2 * n_weights, "all_gather": n_weights, "all_reduce": 2}

    for found in of_each:
        calls = found[name]["calls"]
        assert {
            kind: sum(n for call, n in calls.items() if call.startswith(kind)) for kind in wanted
        } == wanted
        assert sum(calls.values()) == sum(wanted.values())


def values(codes, scales):
    return codes.float() * scales.repeat_interleave(STATE_GROUP_SIZE, 1)[:, : codes.shape[1]]


def float_gradients(model, *shares):
    """Return the FP32 gradients of the mean loss over some processes' shares, by name."""
    model = copy.deepcopy(model)
    for rank in shares:
        backward(model, rank, rows=8)
    return {
        name: parameter.grad / len(shares)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2
    }


def test_the_mean_in_int8_has_at_most_twice_the_noise_of_one_process(of_each):
    """Rounding errors are uniform up to half a scale; their power is a twelfth of its square.

    The mean has its own rounding noise, equal to that of one process, and the mean of n earlier
    errors, whose power is 1/n of theirs. If the gradients of shares are `sqrt(n)` times as large as
    their mean, as independent ones are, this is as much again: 3.01 dB.
    """
    model = dequantize_model_(model_of(BROAD), torch.float32)
    exact = float_gradients(model, *range(N_PROCESSES))
    of_shares = [float_gradients(model, rank) for rank in range(N_PROCESSES)]
    noise_of_one = noise_of_all = 0.0
    for name, wanted in exact.items():
        codes, scales = quantize(wanted, group_size=STATE_GROUP_SIZE)
        of_one = square_sum(values(codes, scales) - wanted)
        mean = torch.cat([values(*found["mean"][name]) for found in of_each])
        of_all = square_sum(mean - wanted)
        before = [quantize(of[name], group_size=STATE_GROUP_SIZE)[1] for of in of_shares]
        power = square_sum(scales) + sum(map(square_sum, before)) / N_PROCESSES**2
        if "embed" not in name:  # most of its gradient is zero, and zeros are not rounded
            assert decibels(of_all / of_one) == pytest.approx(
                decibels(power / square_sum(scales)), abs=0.1
            )
        noise_of_one += of_one
        noise_of_all += of_all
    assert 0 < decibels(noise_of_all / noise_of_one) < 3


def square_sum(tensor):
    return float(tensor.double().square().sum())


def decibels(ratio):
    return 10 * log10(ratio)
