"""`QFTTrainer`: a Trainer with conversion, memory ledger, safe checkpoints and model card."""

from collections.abc import Callable
from inspect import formatannotation, signature
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..memory import MemoryLedger, memory_ledger
from ..optim.flow import RunPart
from ..side import side_network_of
from .arguments import QFTTrainingArguments
from .card import CARD, write_card
from .card_facts import facts_of_trainer
from .checkpoint import SAMPLE_NAME
from .checkpoint_trainer import CheckpointTrainer
from .compatibility import ours, refuse_optimizer, unwrapped
from .graphed_step import Graph, GraphedStep, cuda_graphs
from .health import Health
from .liger import refuse_without_gpu
from .optimizers import named_optimizer, names, optimizer_name
from .peak_memory import PeakMemory
from .prepared_model import prepare_model_
from .trial_pass import trial_pass

N_ITEMS = "num_items_in_batch"  # the Trainer's name for it, used as a key next to the inputs


class QFTTrainer(CheckpointTrainer):
    """Trains every parameter of a model in INT8; accepts the arguments of `transformers.Trainer`.

    In a class that another Trainer is mixed into, the arguments are those of that Trainer, by name.

    A float model, also one made by `model_init`, is quantized in place before it is moved. In a
    model with a side network, only the side network is quantized, and only with one of our
    optimizers. The memory ledger is printed once gradients and momentum both exist, and is kept in
    `ledger`. Checkpoints and saved models appear whole or not at all, and a run resumes exactly
    from a checkpoint or is refused.

    Raises:
        TypeError: A Trainer that is mixed in takes other `args`, or arguments in another order.
        ValueError: The optimizer is not one of ours, or the arguments or the model cannot work with
            INT8 weights; the text says what to do instead.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: Any,
        **kwargs: Any,
    ) -> None:
        kwargs = _by_name(type(self), args, others, kwargs)
        if args is None:
            args = QFTTrainingArguments(output_dir="trainer_output")
        if named_optimizer(args) is not None:
            refuse_optimizer((kwargs.get("optimizers") or (None, None))[0], args)
        if model is not None or not kwargs.get("model_init"):
            _prepare_(model, args)
        self.ledger: MemoryLedger | None = None
        self.make_graph: Callable[[], Graph] | None = None  # None: steps run eagerly
        self._graphed_step: GraphedStep | None = None
        super().__init__(model=model, args=args, **kwargs)
        if getattr(args, "cuda_graph", False):
            self.make_graph = cuda_graphs(args.device)
        self.add_callback(_LedgerCallback(self))
        self.health = Health()
        self.add_callback(self.health)

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Return the model that `model_init` makes, prepared before the Trainer moves it."""
        if trial is not None:
            # The arguments of a trial decide the format; the Trainer sets them after this.
            self._hp_search_setup(trial)
        model: nn.Module = super().call_model_init(trial)
        _prepare_(model, self.args)
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `CheckpointTrainer` does, and free the memory of CUDA graphs at the end."""
        refuse_without_gpu(self.args)  # before Liger changes modules of the model
        self.health.load(None)  # no checkpoint yet
        try:
            return super().train(*args, **kwargs)
        finally:
            self._end_graphs()

    def _end_graphs(self) -> None:
        if self._graphed_step is not None:
            self._graphed_step.end()
            self._graphed_step = None
            self.accelerator.__dict__.pop("clip_grad_norm_", None)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any) -> Tensor:
        """Run forward and backward; twice if released gradients are clipped exactly.

        The first pass finds the global norm and updates nothing; see `trial_pass`.
        """
        optimizer = ours(self.optimizer)
        # Accumulated gradients all exist after the last micro-batch: one pass is enough to clip.
        accumulates = self.current_gradient_accumulation_steps > 1
        if optimizer is not None and optimizer.clipping == "exact" and not accumulates:
            model.train()  # as the Trainer does before it prepares inputs
            inputs = _Prepared(self._prepare_inputs(inputs))
            with trial_pass(model, self), optimizer.measure_norm():
                super().training_step(model, inputs, *args)
        if self.make_graph is not None:
            return self._graphed_training_step(self.make_graph, model, inputs, *args)
        return super().training_step(model, inputs, *args)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Prepare inputs once: trainers of TRL sample completions here, and count their calls."""
        if isinstance(inputs, _Prepared):
            return dict(inputs)  # a loss function may remove some
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def _graphed_training_step(
        self,
        make_graph: Callable[[], Graph],
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        optimizer = unwrapped(self.optimizer)
        if self._graphed_step is None or self._graphed_step.optimizer is not optimizer:
            self._end_graphs()
            self._graphed_step = GraphedStep(optimizer, make_graph)
            if optimizer.gradient == "stack" and self.accelerator.scaler is None:
                self._clip_by_graphs(self._graphed_step.run_part)
        step = super().training_step  # the Trainer's, or that of a Trainer that is mixed in
        model.train()
        batch = dict(self._prepare_inputs(inputs))
        if num_items_in_batch is not None:
            batch[N_ITEMS] = num_items_in_batch

        def run(batch: dict[str, Any]) -> Tensor:
            inputs = _Prepared(batch)
            return step(model, inputs, inputs.pop(N_ITEMS, None))

        # Host values on which the control flow of the Trainer and the optimizer depends.
        kind = (
            self.accelerator.sync_gradients,
            self.current_gradient_accumulation_steps,
            optimizer.clipping,
            optimizer.max_grad_norm,
        )
        return self._graphed_step(run, batch, kind=kind)

    def _clip_by_graphs(self, run_part: RunPart) -> None:
        """Run clipping as part of the graphs: a Trainer clips by this method of its accelerator."""
        clip = self.accelerator.clip_grad_norm_

        def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
            return run_part(
                ("clip", max_norm, norm_type), lambda: clip(parameters, max_norm, norm_type)
            )

        self.accelerator.clip_grad_norm_ = clip_grad_norm_

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.health.save(Path(output_dir, SAMPLE_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.health.load(Path(checkpoint, SAMPLE_NAME))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add figures of the INT8 run to training logs, so that every reporter receives them."""
        if "loss" in logs and self.optimizer is not None:
            figures = self.health.figures()
            if (optimizer := ours(self.optimizer)) is not None:
                figures["skipped_steps"] = float(optimizer.skipped_steps)
            figures["peak_memory_gb"] = PeakMemory.measured(self.args.device).bytes / 1e9
            if self.ledger is not None:
                for kind, n_bytes in self.ledger.bytes_by_kind.items():
                    figures[f"{kind}_gb"] = n_bytes / 1e9
            logs |= {f"qft/{name}": value for name, value in figures.items()}
        super().log(logs, start_time)

    def create_model_card(
        self,
        language: str | list[str] | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        dataset_name: str | None = None,
    ) -> None:
        """Write `README.md` for the Hub, in place of the Trainer's card.

        Args:
            language: Language codes.
            license: License identifier that the Hub knows.
            tags: Tags to add to ours.
            model_name: Name of the model; by default its repository on the Hub, or its folder.
            finetuned_from: Name on the Hub of the model that was fine-tuned.
            tasks: Not used: the task follows from the model's class.
            dataset_tags: Names on the Hub of the training data.
            dataset: Like `dataset_tags`; of a path, the card gives the file name.
            dataset_args: Not used.
            dataset_name: Like `dataset`; TRL's name for it.
        """
        # The folder of a side network already has a card.
        if not self.is_world_process_zero() or side_network_of(self.model) is not None:
            return
        sources = [*_listed(dataset_tags), *_listed(dataset), *_listed(dataset_name)]
        known = {"name": model_name, "base_model": finetuned_from, "license": license}
        facts = facts_of_trainer(
            self,
            **{key: value for key, value in known.items() if value is not None},
            datasets=[name for name in sources if not Path(name).exists()],
            files=[Path(name).name for name in sources if Path(name).exists()],
            language=_listed(language),
            tags=_listed(tags),
        )
        write_card(Path(str(self.args.output_dir)) / CARD, facts)


def _prepare_(model: Any, args: TrainingArguments) -> None:
    """Prepare a model for one of our optimizers; with any other, it needs a side network."""
    if named_optimizer(args) is None:
        if side_network_of(model) is None:
            raise ValueError(
                f"QFTTrainer trains INT8 weights with {names()}, got "
                f"optim={optimizer_name(args)!r}. Set optim={names()} or use transformers.Trainer; "
                "a model with a side network may have any optimizer."
            )
    elif isinstance(model, nn.Module):  # a Trainer that is mixed in may load a model by name
        # Before the Trainer moves the model: the float weights never reach the device.
        prepare_model_(model, args)


class _Prepared(dict[str, Any]):
    """Inputs that `_prepare_inputs` has returned."""


def _by_name(
    cls: type, args: Any, others: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a Trainer after `model` and `args` by name.

    Raises:
        TypeError: One is given twice, `args` is not what the Trainer takes, or a Trainer that is
            mixed in, whose arguments have another order, gets some by position.
    """
    bases = cls.__mro__[cls.__mro__.index(CheckpointTrainer) + 1 :]
    theirs = next(base for base in bases if "__init__" in vars(base))
    parameter = signature(theirs).parameters.get("args")
    annotation = "" if parameter is None else formatannotation(parameter.annotation)
    wanted = annotation.split("|")[0].strip(" '").rpartition(".")[2]
    own = wanted.endswith(("Config", "Arguments")) and wanted != TrainingArguments.__name__
    is_own = wanted in (base.__name__ for base in type(args).__mro__)
    if own and not is_own and isinstance(args, QFTTrainingArguments | None):
        got = "none" if args is None else type(args).__name__
        raise TypeError(
            f"{cls.__name__} is a {theirs.__name__}, which needs args={wanted}(...), got {got}. "
            f"Give it one with optim={names()}; options of the optimizer go into optim_args, such "
            "as optim_args='gradient=release,clipping=previous'."
        )
    if not isinstance(args, TrainingArguments | None) or (others and theirs is not Trainer):
        raise TypeError(
            f"{cls.__name__} takes a model and TrainingArguments by position, and the other "
            f"arguments of {theirs.__name__} by name, since their order may differ."
        )
    given = dict(zip(list(signature(Trainer).parameters)[2:], others, strict=False))
    if twice := sorted(given.keys() & named.keys()):
        raise TypeError(f"{cls.__name__} got {', '.join(twice)} by position and by name.")
    return given | named


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


class _LedgerCallback(TrainerCallback):
    """Measures the ledger while gradients exist: just before a step, and between micro-batches."""

    def __init__(self, trainer: QFTTrainer) -> None:
        self.trainer = trainer
        self.n_seen = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start over: a second `train()` has a new optimizer, and may have another model."""
        self.n_seen, self.trainer.ledger = 0, None

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Measure at the first two steps; momentum exists from the second on."""
        self.n_seen += 1
        if self.n_seen <= 2:
            self._measure()
        if self.n_seen == 2 and state.is_world_process_zero:
            tqdm.write(str(self.trainer.ledger))

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        """Measure between micro-batches, the only time when released gradients exist."""
        if self.n_seen < 2:
            self._measure()

    def _measure(self) -> None:
        if self.trainer.model is None:
            return
        ledger = memory_ledger(self.trainer.model, self.trainer.optimizer)
        largest = self.trainer.ledger
        if largest is None or ledger.total_bytes >= largest.total_bytes:
            self.trainer.ledger = ledger
