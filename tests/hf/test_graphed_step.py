"""Steps run by graphs have the bits of eager steps; on a CPU a recorder stands in for CUDA graphs.

The recorder refuses every read of a value by the host, so a synchronization that is added to
forward, backward or release fails here.
"""

import logging
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer, TrainerCallback
from transformers.utils import import_utils

import qft_hf
from qft_hf import QFTTrainer, QFTTrainingArguments
from qft_hf.hf.graphed_step import N_EAGER, GraphedStep, cuda_graphs
from qft_hf.hf.optimizers import OPTIMIZERS
from qft_hf.hf.uncapturable import uncapturable
from tests.hf.checkpoints import assert_same_state
from tests.hf.test_trainer import arguments, history, sequences
from tests.models import tiny_llama
from tests.recorded_graph import RecordedGraph

RELEASE = {"gradient": "release", "max_grad_norm": 0}
PREVIOUS = {"gradient": "release", "clipping": "previous", "max_grad_norm": 0.3}
N_STEPS = 20
# One replay fewer: the first step creates states and a norm, whose addresses are new.
N_REPLAYED = N_STEPS - N_EAGER - 1
# An epoch's 16 batches are five windows of three and one of one: of 20 windows, 17 have a first,
# a middle and a last pass, and three have a single pass.
N_ACCUMULATED = 3 * (17 - N_EAGER - 1) + 3 - N_EAGER


def packed(n: int = 64) -> list[dict[str, torch.Tensor]]:
    """Rows of one length, which need no mask."""
    return [{key: row[key] for key in ("input_ids", "labels")} for row in sequences(n)]


class Graphed(QFTTrainer):
    """A QFTTrainer that runs steps by recorded graphs and keeps the graphs."""

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        self.graphs: list[RecordedGraph] = []
        self.make_graph = self._make

    def _make(self) -> RecordedGraph:
        self.graphs.append(RecordedGraph())
        return self.graphs[-1]

    @property
    def n_replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)


def trainer(cls, folder, *, model=None, data=None, **overrides) -> QFTTrainer:
    schedule = {"max_steps": N_STEPS, "lr_scheduler_type": "cosine", "warmup_steps": 3}
    args = arguments(folder, QFTTrainingArguments, **schedule | overrides)
    model = tiny_llama(attention_dropout=0.2) if model is None else model
    data = data or packed()
    return cls(model=model, args=args, train_dataset=data, eval_dataset=data[:8])


def run(cls, folder, *, resume=None, **options) -> QFTTrainer:
    made = trainer(cls, folder, **options)
    made.train(resume_from_checkpoint=resume)
    return made


def assert_same_run(one: QFTTrainer, other: QFTTrainer) -> None:
    """Assert equal bits of weights, optimizer state, the norm for the next clipping, and logs."""
    assert_same_state(one.model.state_dict(), other.model.state_dict())
    states = [made.optimizer.state_dict() for made in (one, other)]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for number, state in states[0]["state"].items():
        assert_same_state(state, states[1]["state"][number])
    assert states[0].get("previous_norm") == states[1].get("previous_norm")
    for key in ("loss", "learning_rate", "grad_norm", "eval_loss"):
        assert history(one, key) == history(other, key) != []


EVALUATED = {"eval_strategy": "steps", "eval_steps": 7}
CHECKPOINTED = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False, "preserve_rng_state": False},
}


@pytest.mark.parametrize(
    ("options", "accumulation", "n_replays"),
    [
        # Graphs of the pass, clipping, the check for finite gradients, and the update.
        pytest.param({"max_grad_norm": 0.3}, 1, 4 * N_REPLAYED, id="stack"),
        pytest.param(
            {"max_grad_norm": 0.3}, 3, N_ACCUMULATED + 3 * (14 + 1), id="accumulated"
        ),
        pytest.param(
            {"optim": "qft_adamw", "max_grad_norm": 0.3}, 1, 4 * N_REPLAYED, id="adamw"
        ),
        pytest.param(
            {"optim": "qft_adamw", "bf16": True, "max_grad_norm": 0.3},
            3,
            N_ACCUMULATED + 3 * (14 + 1),
            id="adamw-bf16-accumulated",
        ),
        pytest.param(
            {"optim": "qft_sgd", "learning_rate": 1.0, "max_grad_norm": 0.3}, 1,
            4 * (N_STEPS - N_EAGER), id="sgd",
        ),
        pytest.param(
            {"matmul": "int8", "momentum_bits": 4, "max_grad_norm": 0}, 1, 4 * N_REPLAYED,
            id="int8-4-bit",
        ),
        # Graphs of the pass, the norms, and the update of parameters that wait for the step.
        pytest.param(RELEASE, 1, 3 * N_REPLAYED, id="release"),
        pytest.param(PREVIOUS, 1, 3 * N_REPLAYED, id="previous"),
        pytest.param(PREVIOUS, 3, N_ACCUMULATED + 2 * (14 + 1), id="previous-accumulated"),
        pytest.param(
            PREVIOUS | {"matmul": "int8", "momentum_bits": 4, "bf16": True}, 1, 3 * N_REPLAYED,
            id="int8-bf16",
        ),
        pytest.param(PREVIOUS | {"clipping": "tensor"}, 1, 3 * N_REPLAYED, id="own-norms"),
        pytest.param(
            PREVIOUS | {"optim": "qft_adamw"}, 3, N_ACCUMULATED + 2 * (14 + 1),
            id="previous-adamw",
        ),
        pytest.param(
            RELEASE | {"optim": "qft_sgd", "learning_rate": 1.0}, 1, 3 * N_REPLAYED,
            id="release-sgd",
        ),
    ],
)  # fmt: skip
def test_a_replayed_run_has_the_bits_of_an_eager_one(options, accumulation, n_replays, tmp_path):
    """Covers a schedule, dropout, clipping, accumulation and evaluation."""
    options = options | EVALUATED | {"gradient_accumulation_steps": accumulation}

    eager, replayed = (run(cls, tmp_path, **options) for cls in (QFTTrainer, Graphed))

    assert_same_run(eager, replayed)
    assert replayed.n_replays == n_replays


def documents(n: int = 64) -> list[dict[str, torch.Tensor]]:
    """Rows of two documents each."""
    positions = torch.tensor([*range(8), *range(5)])
    return [row | {"position_ids": positions} for row in packed(n)]


OTHERS = {
    "tied": ({"tied": True}, {}),
    "checkpointed": ({}, CHECKPOINTED),
    # The table exceeds the size up to which float parameters wait for each other.
    "float table": ({"vocab_size": 1601}, {"modules_to_not_convert": ["embed_tokens"]}),
    "packed, in bf16": ({}, {"data": documents(), "bf16": True}),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("options", [{}, PREVIOUS], ids=["stack", "release"])
def test_other_models_and_data(options, other, tmp_path):
    model, more = OTHERS[other]
    options = options | more | EVALUATED | {"max_steps": 7}

    eager, replayed = (
        run(cls, tmp_path, model=tiny_llama(**model), **options) for cls in (QFTTrainer, Graphed)
    )

    assert_same_run(eager, replayed)
    assert replayed.n_replays >= 7 - N_EAGER - 1


@pytest.mark.parametrize("options", [{}, PREVIOUS], ids=["stack", "release"])
def test_a_run_that_is_resumed_by_graphs_equals_the_straight_eager_one(options, tmp_path):
    options = options | EVALUATED | {"save_strategy": "steps", "save_steps": 9}
    straight = run(QFTTrainer, tmp_path / "eager", **options)
    saved = run(Graphed, tmp_path / "graphed", **options)
    assert_same_run(straight, saved)

    resumed = run(
        Graphed, tmp_path / "other", resume=str(tmp_path / "graphed" / "checkpoint-9"), **options
    )

    assert_same_run(straight, resumed)
    n_graphs = 3 if options.get("gradient") == "release" else 4
    assert resumed.n_replays == n_graphs * (N_STEPS - 9 - N_EAGER)


@pytest.mark.parametrize("options", [{}, PREVIOUS], ids=["stack", "release"])
def test_other_shapes_run_eagerly_and_are_named_once(options, tmp_path, caplog):
    """Batches 3 and 12, a window's second and another one's first micro-batch, are shorter."""
    rows = [
        {name: value[:11] for name, value in row.items()} if i // 4 in (3, 12) else row
        for i, row in enumerate(packed())
    ]
    options = options | EVALUATED | {"gradient_accumulation_steps": 2, "max_steps": 24}
    options |= {"data": rows, "train_sampling_strategy": "sequential"}
    eager = run(QFTTrainer, tmp_path, **options)
    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        replayed = run(Graphed, tmp_path, **options)

    assert_same_run(eager, replayed)
    said = [record.message for record in caplog.records if "cuda_graph" in record.message]
    assert len(said) == 1
    assert "differs from the first one" in said[0]
    assert "(4, 11)" in said[0]
    assert replayed.n_replays >= 24


def test_a_loss_that_the_trainer_divides_is_divided_by_its_own_window(tmp_path):
    """The 8 batches are windows of three, three and two; the model accepts no count of tokens."""
    options = EVALUATED | {"gradient_accumulation_steps": 3, "max_steps": 14, "data": packed(32)}
    runs = []
    for cls in (QFTTrainer, Graphed):
        model = tiny_llama()
        model.accepts_loss_kwargs = False
        runs.append(run(cls, tmp_path, model=model, **options))

    assert_same_run(*runs)
    assert runs[1].n_replays >= 20


def test_batches_with_a_mask_run_eagerly_and_are_named(tmp_path, caplog):
    """The values of a mask decide which kernel attention uses."""
    options = EVALUATED | {"max_steps": 7, "data": sequences()}
    replayed = run(Graphed, tmp_path, **options)

    assert "has an attention_mask" in caplog.text
    assert replayed.n_replays == 0
    assert_same_run(run(QFTTrainer, tmp_path, **options), replayed)


def test_a_state_that_is_loaded_in_between_is_captured_anew(tmp_path):
    """Loading replaces the tensors whose addresses a graph has recorded."""
    runs = []
    for cls in (QFTTrainer, Graphed):
        made = trainer(cls, tmp_path, **PREVIOUS)
        step = made.training_step
        made.training_step = lambda *args, made=made, step=step: (
            made.state.global_step == 9
            and made.optimizer.load_state_dict(made.optimizer.state_dict()),
            step(*args),
        )[1]
        made.train()
        runs.append(made)

    assert_same_run_without_evaluation(*runs)
    assert len([graph for graph in runs[1].graphs if graph.operations]) == 2 * 3


def assert_same_run_without_evaluation(one: QFTTrainer, other: QFTTrainer) -> None:
    for made in (one, other):
        made.state.log_history.append({"eval_loss": 0.0})
    assert_same_run(one, other)


def test_steps_of_a_loop_of_ones_own_after_training_have_their_own_numbers(tmp_path):
    runs = []
    for cls in (QFTTrainer, Graphed):
        made = run(cls, tmp_path, **PREVIOUS | EVALUATED | {"max_steps": 7})
        optimizer = made.optimizer.optimizer
        optimizer.train()
        for rate in (1e-2, 3e-3):
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = {name: value[None] for name, value in packed(1)[0].items()}
            made.model.eval()(**batch).loss.backward()
            optimizer.step()
        runs.append(made)
    assert_same_run(*runs)


def test_a_step_after_training_that_ended_between_pass_and_step_has_its_own_numbers():
    states = []
    for is_graphed in (False, True):
        model = qft_hf.quantize_model_(tiny_llama(), qft_hf.QFTConfig())
        optimizer = qft_hf.QFTLion(model.parameters(), lr=1e-2)
        batch = {name: value[None] for name, value in packed(1)[0].items()}

        def one_pass(batch, model=model):
            loss = model(**batch).loss
            loss.backward()
            return loss

        if is_graphed:
            graphed = GraphedStep(optimizer, RecordedGraph)
            graphed(one_pass, batch, kind="training")
            graphed.end()
        else:
            one_pass(batch)
        optimizer.param_groups[0]["lr"] = 3e-3
        optimizer.step()
        states.append(model.state_dict())

    assert_same_state(*states)


def change_the_rate(made: QFTTrainer) -> None:
    for group in made.optimizer.param_groups:
        group["lr"] *= 7.0


def replace_a_gradient(made: QFTTrainer) -> None:
    weight = made.model.lm_head.weight
    weight.grad = weight.grad * 0.5


def load_the_state(made: QFTTrainer) -> None:
    made.optimizer.load_state_dict(made.optimizer.state_dict())


@pytest.mark.parametrize("change", [change_the_rate, replace_a_gradient, load_the_state])
def test_what_changes_between_the_parts_of_a_step_counts(change, tmp_path):
    """The change comes after clipping and before the update; steps around it are replayed."""
    runs = []
    for cls in (QFTTrainer, Graphed):
        made = trainer(cls, tmp_path, max_grad_norm=0.3)
        made.add_callback(Between(made, change))
        made.train()
        runs.append(made)

    assert_same_run_without_evaluation(*runs)
    assert runs[1].n_replays >= 3 * N_REPLAYED - 2


def clip_to_less(made: QFTTrainer) -> None:
    made.optimizer.optimizer.max_grad_norm = 0.1


def clip_each(made: QFTTrainer) -> None:
    made.optimizer.optimizer.clipping = "tensor"


@pytest.mark.parametrize("cls", [QFTTrainer, Graphed])
@pytest.mark.parametrize(
    ("change", "name"),
    [(change_the_rate, "lr of parameter group 0"), (clip_to_less, "max_grad_norm")],
)
def test_an_option_that_changes_after_released_weights_took_it_is_refused(
    cls, change, name, tmp_path
):
    made = trainer(cls, tmp_path, **PREVIOUS)
    made.add_callback(Between(made, change))
    with pytest.raises(RuntimeError, match=rf"{name} was .* and is .* now"):
        made.train()
    assert made.state.global_step == 9  # the step that would have been the tenth


@pytest.mark.parametrize("change", [clip_to_less, clip_each])
def test_other_clipping_counts_from_the_next_pass_on(change, tmp_path):
    class Before(Between):
        def on_step_begin(self, *others, **kwargs) -> None:
            super().on_pre_optimizer_step(*others, **kwargs)

        def on_pre_optimizer_step(self, *_, **__) -> None: ...

    runs = []
    for cls in (QFTTrainer, Graphed):
        made = trainer(cls, tmp_path, **PREVIOUS, optim="qft_sgd")
        made.add_callback(Before(made, change))
        made.train()
        runs.append(made)

    assert_same_run_without_evaluation(*runs)
    plain = run(QFTTrainer, tmp_path, **PREVIOUS, optim="qft_sgd")
    losses = [[entry.get("loss") for entry in made.state.log_history] for made in (plain, runs[0])]
    assert losses[0][:10] == losses[1][:10]
    assert losses[0][12] != losses[1][12]


class Between(TrainerCallback):
    """Changes something before the update of step 9."""

    def __init__(self, made: QFTTrainer, change) -> None:
        self.made, self.change = made, change

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step == 9:
            self.change(self.made)


def test_what_a_replayed_update_leaves_is_what_an_eager_one_leaves(tmp_path):
    """Gradients are None, and weights have new versions, so autograd rejects old saved tensors."""
    seen = []

    class Watching(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
            parameters = list(model.parameters())
            assert all(parameter.grad is None for parameter in parameters)
            seen.append([parameter._version for parameter in parameters])

    made = trainer(Graphed, tmp_path)
    made.add_callback(Watching())
    made.train()

    assert made.n_replays == 4 * N_REPLAYED
    for before, after in pairwise(seen):
        assert all(a > b for a, b in zip(after, before, strict=True))


class Unread(qft_hf.QFTSGD):
    """A third-party optimizer that was written without knowledge of graphs."""

    reads_live = False


def test_an_optimizer_that_reads_no_live_numbers_updates_eagerly_and_says_so(
    tmp_path, caplog, monkeypatch
):
    named = replace(OPTIMIZERS["qft_sgd"], optimizer_class=Unread)
    monkeypatch.setitem(OPTIMIZERS, "qft_sgd", named)
    options = EVALUATED | {"optim": "qft_sgd", "learning_rate": 1.0, "max_grad_norm": 0.3}
    with caplog.at_level(logging.WARNING, logger="qft_hf"):
        eager, replayed = (run(cls, tmp_path, **options) for cls in (QFTTrainer, Graphed))

    assert_same_run(eager, replayed)
    assert replayed.n_replays == 3 * (N_STEPS - N_EAGER)
    assert caplog.text.count("updates by Unread run without a graph") == 1


def test_released_updates_of_such_an_optimizer_are_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Unread([weight], lr=1.0, gradient="release")
    with pytest.raises(ValueError, match=r"Unread does not read rate .* Set gradient='stack'"):
        GraphedStep(optimizer, RecordedGraph)


def test_an_update_that_cannot_be_captured_is_refused_and_nothing_has_moved(tmp_path):
    made = trainer(Graphed, tmp_path)
    made.create_optimizer()
    inner, before = made.optimizer, {}
    step_weight = inner.step_weight

    def looking(weight, gradient, *rest) -> None:
        step_weight(weight, gradient, *rest)
        assert gradient.scales.sum().item() < torch.inf

    def watched() -> None:
        before.update({name: value.clone() for name, value in made.model.state_dict().items()})
        before["steps"] = [int(state["step"]) for state in inner.state.values()]

    inner.step_weight = looking
    made.training_step = _before(made.training_step, watched)
    with pytest.raises(RuntimeError, match="what follows the backward pass cannot be captured"):
        made.train()
    assert before.pop("steps") == [int(state["step"]) for state in inner.state.values()]
    assert_same_state(made.model.state_dict(), before)
    assert all(parameter.grad is None for parameter in made.model.parameters())
    assert made.n_replays > 0


@pytest.mark.parametrize(("options", "text"), [({}, "not taken"), (RELEASE, "detected after")])
def test_a_gradient_that_is_not_finite_stops_the_run_after_the_replay(options, text, tmp_path):
    made = trainer(Graphed, tmp_path, **options)
    norm = made.model.model.norm.weight

    def poison() -> None:
        if made.state.global_step == 9:
            norm.data.fill_(float("inf"))

    made.training_step = _before(made.training_step, poison)
    with pytest.raises(FloatingPointError, match=text):
        made.train()
    assert made.state.global_step == 9
    assert made.n_replays > 0


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    made = trainer(Graphed, tmp_path, nonfinite="skip")
    norm = made.model.model.norm.weight
    good = norm.detach().clone()

    def poison() -> None:
        norm.data.copy_(good if made.state.global_step != 9 else torch.full_like(good, torch.inf))

    made.training_step = _before(made.training_step, poison)
    made.train()
    assert made.optimizer.optimizer.skipped_steps == 1


def _before(step, function):
    def both(*args):
        function()
        return step(*args)

    return both


def _look(gradient):
    assert gradient.sum().item() < torch.inf


@pytest.mark.parametrize("options", [{}, PREVIOUS], ids=["stack", "release"])
def test_a_host_that_looks_at_a_value_is_refused_when_captured(options, tmp_path):
    """The host reads at the end of backward, after Python has run all updates of release."""
    made = trainer(Graphed, tmp_path, **options)
    made.model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: (output.register_hook(_look), None)[1]
    )
    before = {}
    step = made.training_step

    def watched(*args):
        before.update({name: value.clone() for name, value in made.model.state_dict().items()})
        before["steps"] = [int(state["step"]) for state in made.optimizer.state.values()]
        return step(*args)

    made.training_step = watched
    with pytest.raises(RuntimeError, match=r"the host has to see values in between, .* Leave cuda"):
        made.train()
    assert before.pop("steps") == [int(state["step"]) for state in made.optimizer.state.values()]
    assert_same_state(made.model.state_dict(), before)
    assert all(parameter.grad is None for parameter in made.model.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_capture_counts_no_step(error, tmp_path):
    """Host code counted steps before the interrupt, of updates that no kernel has made."""
    made = trainer(Graphed, tmp_path, **PREVIOUS)
    before = {}

    def interrupt(gradient) -> None:  # at the end of backward, after the updates
        if import_utils.is_cuda_stream_capturing():
            raise error

    made.model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: (output.register_hook(interrupt), None)[1]
    )

    def watched() -> None:
        before.update({name: value.clone() for name, value in made.model.state_dict().items()})
        before["steps"] = [int(state["step"]) for state in made.optimizer.state.values()]

    made.training_step = _before(made.training_step, watched)
    with pytest.raises(error):
        made.train()
    assert before.pop("steps") == [int(state["step"]) for state in made.optimizer.state.values()]
    assert_same_state(made.model.state_dict(), before)
    assert all(parameter.grad is None for parameter in made.model.parameters())


def test_a_hook_of_the_user_is_refused_since_it_would_run_once(tmp_path):
    made = trainer(Graphed, tmp_path)
    made.model.lm_head.weight.register_hook(lambda gradient: None)
    with pytest.raises(ValueError, match=r"\(131, 44\) has a hook .* Remove the hook"):
        made.train()


# --- what is refused at the start


def test_a_run_without_a_gpu_is_refused(tmp_path):
    model = tiny_llama()
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and this run is on cpu"):
        trainer(QFTTrainer, tmp_path, model=model, cuda_graph=True)
    assert type(model.lm_head) is torch.nn.Linear


def test_the_stock_trainer_captures_nothing_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("qft_hf.hf.unsupported.refuse_uncapturable", lambda args, model: None)
    args = arguments(tmp_path, QFTTrainingArguments, cuda_graph=True)
    made = Trainer(model=tiny_llama(), args=args, train_dataset=packed())
    with pytest.raises(ValueError, match=r"Use qft_hf\.QFTTrainer"):
        made.train()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (PREVIOUS | {"clipping": "exact"}, "clipping='exact' runs each pass twice. Use clipping="),
        ({"gradient_checkpointing": True}, r'"use_reentrant": False, "preserve_rng_state": False'),
        ({"torch_empty_cache_steps": 3}, "torch_empty_cache_steps .* Leave it unset"),
    ],
)  # fmt: skip
def test_options_that_no_graph_can_have_are_named(options, text, tmp_path):
    args = arguments(tmp_path, QFTTrainingArguments, **options)
    (reason,) = uncapturable(args, tiny_llama())
    assert re.search(text, reason)


def test_what_graphs_can_have_is_not_refused(tmp_path):
    own_norms, adamw = PREVIOUS | {"clipping": "tensor"}, RELEASE | {"optim": "qft_adamw"}
    for options in ({}, RELEASE, PREVIOUS, CHECKPOINTED, own_norms, adamw):
        args = arguments(tmp_path, QFTTrainingArguments, **options)
        assert uncapturable(args, tiny_llama()) == []


def test_experts_are_refused_by_name_before_and_after_conversion(tmp_path):
    config = Qwen3MoeConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    args = arguments(tmp_path, QFTTrainingArguments)
    for _ in range(2):
        (reason,) = uncapturable(args, model)
        assert "each expert of model.layers.0.mlp.experts" in reason
        QFTTrainer(model=model, args=args, train_dataset=packed())


class Pools:
    """Handles of CUDA memory pools: as in PyTorch's allocator, a pool dies with its last graph."""

    def __init__(self) -> None:
        self.n_named = 0
        self.n_alive: Counter[int] = Counter()  # graphs by handle
        self.used: list[int] = []

    def graph_pool_handle(self) -> int:
        self.n_named += 1
        return self.n_named

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pools = self

        class CUDAGraph:
            name = None

            def __del__(self) -> None:
                if self.name is not None:
                    pools.n_alive[self.name] -= 1

        @contextmanager
        def graph(made: CUDAGraph, *, pool: int, stream: object, capture_error_mode: str):
            assert pool not in pools.n_alive or pools.n_alive[pool] > 0, "INTERNAL ASSERT FAILED"
            pools.n_alive[pool] += 1
            pools.used.append(pool)
            made.name = pool
            yield

        for name, value in {
            "graph_pool_handle": self.graph_pool_handle,
            "CUDAGraph": CUDAGraph,
            "Stream": lambda device: None,
            "graph": graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_graphs_share_memory_and_those_after_all_others_have_gone_get_their_own(monkeypatch):
    pools = Pools()
    pools.patch(monkeypatch)
    make = cuda_graphs(torch.device("cuda"))
    one, other = make(), make()
    assert one.capture(lambda: 1) == 1 == other.capture(lambda: 1)
    del one
    third = make()
    third.capture(lambda: 1)
    assert len(set(pools.used)) == 1, "a graph is left whose memory the third takes, too"
    del other, third  # as at the end of train(), or when a state is loaded
    make().capture(lambda: 1)
    assert len(set(pools.used)) == 2
