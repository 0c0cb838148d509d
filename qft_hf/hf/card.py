"""The model card: `README.md` for the Hub, of figures that are known and of nothing else.

A local path means nothing to a reader, so names of files stand here without their folders.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import QuantizationSpec
from ..memory.ledger import elements
from ..version import __version__
from .drafts import written_whole
from .optimizers import is_ours
from .support import quantization_config_of, unwrapped

TAGS = ["full-parameter-fine-tuning", "int8", "qft"]
MARK = "<!-- Written by qft_hf -->"
CITATIONS = """\
```bibtex
@article{li2023qft,
  title = {{QFT}: Quantized Full-parameter Tuning of {LLMs} with Affordable Resources},
  author = {Li, Zhikai and Liu, Xiaoxuan and Zhu, Banghua and Dong, Zhen and Gu, Qingyi and
            Keutzer, Kurt},
  journal = {arXiv preprint arXiv:2310.07147},
  year = {2023}
}

@article{chen2023lion,
  title = {Symbolic Discovery of Optimization Algorithms},
  author = {Chen, Xiangning and Liang, Chen and Huang, Da and Real, Esteban and Wang, Kaiyuan and
            Liu, Yao and Pham, Hieu and Dong, Xuanyi and Luong, Thang and Hsieh, Cho-Jui and
            Lu, Yifeng and Le, Quoc V.},
  journal = {arXiv preprint arXiv:2302.06675},
  year = {2023}
}
```"""
SIDE_TAGS = ["parameter-efficient-fine-tuning", "qst", "side-tuning"]
SIDE_CITATION = """\
```bibtex
@article{zhang2024qst,
  title = {Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large Language
           Models},
  author = {Zhang, Zhengxin and Zhao, Dan and Miao, Xupeng and Oliaro, Gabriele and Zhang, Zhihao
            and Li, Qing and Jiang, Yong and Jia, Zhihao},
  journal = {arXiv preprint arXiv:2401.07159},
  year = {2024}
}
```"""
_PIPELINES = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card tells; what is None or empty is not told.

    Attributes:
        name: Of the model: its repository on the Hub, or its folder.
        architecture: Class of the model.
        base_model: Name on the Hub of the model that was tuned; None if it was a local one.
        datasets: Names on the Hub of what was learned.
        files: Names of local files of what was learned.
        parameters: All, and those of them that were trained.
        optimizer: The rule and how its state was stored; None without training.
        hyperparameters: By name.
        format: Of the weights.
        side: The fields of a side network's `QSTConfig`, and `base`: how the frozen model beside it
            is stored; None where every parameter was trained.
        state_bytes: Of the training state, by kind.
        history: `log_history` of the Trainer.
        counts: Of the training data, in a line.
        export_dtype: Of an ordinary checkpoint in the sub-folder of that name.
        license: Identifier of the Hub.
        language: Codes of languages.
        tags: Beside ours.
        versions: By package.
    """

    name: str
    architecture: str
    parameters: tuple[int, int]
    base_model: str | None = None
    datasets: Sequence[str] = ()
    files: Sequence[str] = ()
    optimizer: str | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    format: QuantizationSpec | None = None
    side: Mapping[str, Any] | None = None
    state_bytes: Mapping[str, int] = field(default_factory=dict)
    history: Sequence[Mapping[str, Any]] = ()
    counts: str | None = None
    export_dtype: str | None = None
    license: str | None = None
    language: Sequence[str] = ()
    tags: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


def is_card(path: Path) -> bool:
    """Whether a `README.md` is a card that was written here."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def write_card(path: Path, facts: CardFacts) -> None:
    """Write a card; it takes the place of what is there."""
    with written_whole(path) as draft:
        card(facts).save(draft)


def card(facts: CardFacts) -> ModelCard:
    """Make the card: metadata for the Hub, and the text."""
    results = _results(facts)
    data = ModelCardData(
        model_name=facts.name if results else None,  # it heads the results
        eval_results=results or None,
        base_model=facts.base_model,
        base_model_relation=_relation(facts),
        datasets=list(facts.datasets) or None,
        language=list(facts.language) or None,
        library_name="transformers",
        license=facts.license,
        pipeline_tag=_pipeline(facts.architecture),
        tags=sorted({*facts.tags, *(SIDE_TAGS if facts.side else TAGS)}),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts)}", ignore_metadata_errors=False)


def _relation(facts: CardFacts) -> str | None:
    if facts.base_model is None:
        return None
    return "adapter" if facts.side else "finetune"


def facts_of_trainer(trainer: Any, **known: Any) -> CardFacts:
    """Return what a Trainer knows.

    Args:
        trainer: A `QFTTrainer`, trained or not.
        **known: Fields of `CardFacts` that only its user knows, or knows better.
    """
    ledger = trainer.ledger
    origin = getattr(getattr(trainer.model, "config", None), "_name_or_path", "")
    facts: dict[str, Any] = {
        "name": trainer.args.hub_model_id or Path(str(trainer.args.output_dir)).resolve().name,
        "architecture": type(trainer.model).__name__,
        "parameters": parameters_of(trainer.model),
        "base_model": origin if origin and not Path(origin).exists() else None,
        "optimizer": optimizer_of(trainer),
        "hyperparameters": hyperparameters_of(trainer),
        "format": quantization_config_of(trainer.model),
        "state_bytes": {row.state: row.bytes for row in ledger.rows} if ledger else {},
        "history": trainer.state.log_history,
        "versions": {"qft_hf": __version__},
    }
    return CardFacts(**{**facts, **known})


def parameters_of(model: Any) -> tuple[int, int]:
    """Return how many parameters a model has, and how many of them are trained."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return sum(map(elements, parameters)), sum(map(elements, trained))


def optimizer_of(trainer: Any) -> str | None:
    """Return what the optimizer says of itself, or the class of one of others; None without one."""
    optimizer: Any = unwrapped(trainer.optimizer)
    if optimizer is None:
        return None
    return optimizer.description if is_ours(optimizer) else f"PyTorch's {type(optimizer).__name__}"


def hyperparameters_of(trainer: Any) -> dict[str, Any]:
    """Return what a run was trained with: the optimizer's own values, not the Trainer's fields."""
    args, optimizer = trainer.args, unwrapped(trainer.optimizer)
    values: dict[str, Any] = {
        "learning rate": args.learning_rate,
        "schedule": getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type),
        "warm-up steps": args.get_warmup_steps(trainer.state.max_steps),
    }
    if optimizer is not None:
        group = optimizer.param_groups[0]
        values |= {name: group[name] for name in ("betas", "eps") if name in group}
        decays = [group.get("weight_decay", 0.0) for group in optimizer.param_groups]
        values["weight decay"] = max(decays)
    if is_ours(optimizer):
        values |= {"gradients": optimizer.gradient, "seed of rounding": group["seed"]}
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return values | {
        "largest gradient norm": args.max_grad_norm,
        "examples a step": batch,
        "micro-batches a step": args.gradient_accumulation_steps * args.world_size,
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0.0, 4),
        "activations": "bf16 autocast"
        if args.bf16
        else str(getattr(trainer.model, "dtype", "")).removeprefix("torch."),
        "seed": args.seed,
    }


def _pipeline(architecture: str) -> str | None:
    return next((task for end, task in _PIPELINES.items() if architecture.endswith(end)), None)


def _text(facts: CardFacts) -> str:
    total, trained = facts.parameters
    learned = [f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets]
    learned += [f"the local file `{name}`" for name in facts.files]
    base = "a local model"
    if facts.base_model:
        base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    stored = facts.optimizer and f"They were updated by {facts.optimizer}."
    on = f" on {', '.join(learned)}" if learned else ""
    version = facts.versions.get("qft_hf", __version__)
    if facts.side:
        what = (
            f"A side network of {trained:,} parameters beside {base}, a `{facts.architecture}` of "
            f"{total - trained:,}, which stayed frozen, stored {_STORED[facts.side['base']]}, and "
            f"is not in this repository. It was trained{on} by quantized side tuning (QST, "
            f"arXiv:2401.07159), with qft_hf {version}."
        )
    else:
        what = (
            f"A `{facts.architecture}`, tuned from {base}{on}. {trained:,} of its {total:,} "
            f"parameters were trained, with matrices in INT8 (QFT, arXiv:2310.07147), by qft_hf "
            f"{version}."
        )
    parts = [
        f"# {facts.name.rpartition('/')[2]}",
        MARK,
        what + (f" {stored}" if stored else ""),
        "## Results",
        _evaluations(facts.history),
        *([f"Training data: {facts.counts}."] if facts.counts else []),
        "## How to load it",
        _loading(facts),
        "## Training",
        _table(("hyperparameter", "value"), facts.hyperparameters.items()),
        *_weights(facts),
        "### Memory of the training state",
        _memory_table(facts.state_bytes, total),
        "## Licence",
        f"`{facts.license}`"
        if facts.license
        else "None is stated here; that of the model it was tuned from may bind this one, too.",
        "## Citation",
        *([SIDE_CITATION] if facts.side else []),
        CITATIONS,
    ]
    return "\n\n".join(parts) + "\n"


def _evaluations(history: Sequence[Mapping[str, Any]]) -> str:
    """Return every evaluation of the log, or the training loss where there is none."""
    logged = [entry for entry in history if "eval_loss" in entry]
    names = [
        name
        for name in dict.fromkeys(key for entry in logged for key in entry)
        if name.startswith("eval_") and not name.endswith(("_time", "_runtime", "_per_second"))
    ]
    losses = [entry for entry in history if "loss" in entry]
    lines = []
    if logged:
        head = ("step", *(name.removeprefix("eval_") for name in names))
        rows = [
            (entry["step"], *(_shown(entry[name]) if name in entry else "" for name in names))
            for entry in logged
        ]
        lines += ["On held-out data:", _table(head, rows)]
    if losses:
        first, last = losses[0], losses[-1]
        lines.append(
            f"The training loss was {_shown(first['loss'])} at step {first['step']} and "
            f"{_shown(last['loss'])} at step {last['step']}."
        )
    return "\n\n".join(lines) or "No loss was logged."


def _results(facts: CardFacts) -> list[EvalResult]:
    """Return the last evaluation for the Hub, if what it was made on has a name there."""
    logged = [entry for entry in facts.history if "eval_loss" in entry]
    if not logged or len(facts.datasets) != 1 or facts.files:
        return []
    ends = {"eval_loss": "loss", "eval_perplexity": "perplexity", "eval_accuracy": "accuracy"}
    (dataset,) = facts.datasets
    return [
        EvalResult(
            task_type=_pipeline(facts.architecture) or "other",
            dataset_type=dataset,
            dataset_name=dataset.rpartition("/")[2],
            metric_type=metric,
            metric_value=logged[-1][name],
        )
        for name, metric in ends.items()
        if name in logged[-1]
    ]


_STORED = {
    "nf4": "in 4 bits (NF4, by bitsandbytes)",
    "int8": "in INT8",
    "float": "in float",
}
_AS_STORED = {
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True)",
    "int8": "qft_hf.QFTConfig()",
}


def _weights(facts: CardFacts) -> list[str]:
    """Return the section of what was trained and how it was stored."""
    if not facts.side:
        return ["### Weights", _format_table(facts.format)]
    return ["### Side network", _table(("what", "value"), facts.side.items())]


def _side_loading(facts: CardFacts) -> str:
    """Return how base and side network come together."""
    form = _AS_STORED.get((facts.side or {})["base"])
    place = facts.base_model or "FOLDER_OF_THE_BASE"
    imported = "BitsAndBytesConfig, " if form and form.startswith("Bits") else ""
    loaded = f'"{place}"' + (f", quantization_config={form}" if form else "")
    lines = [
        "import qft_hf",
        f"from transformers import {imported}{facts.architecture}\n",
        f"model = {facts.architecture}.from_pretrained({loaded})",
        f'qft_hf.load_side_network(model, "{facts.name}")  # a folder',
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _loading(facts: CardFacts) -> str:
    if facts.side:
        return _side_loading(facts)
    name, architecture = facts.name, facts.architecture
    plain = f"{name.rpartition('/')[2]}-bf16"
    lines = [
        "As INT8, with qft_hf installed, to go on training or to save memory:",
        f'```python\nimport qft_hf  # registers the "qft" format\n'
        f"from transformers import {architecture}\n\n"
        f'model = {architecture}.from_pretrained("{name}")\n```',
        "To go on without qft_hf, convert that once to an ordinary bf16 checkpoint:",
        f'```python\nqft_hf.dequantize_model_(model).save_pretrained("{plain}")\n```',
        "The command does the same with a downloaded folder, tokenizer included:",
        f"```sh\nqft-hf export FOLDER {plain} --dtype bfloat16\n```",
    ]
    if facts.export_dtype:
        place = f'"{name}", subfolder="{facts.export_dtype}"'
        lines += [
            f"An ordinary {facts.export_dtype} checkpoint is here already, and needs no qft_hf:",
            f"```python\nfrom transformers import {architecture}\n\n"
            f"model = {architecture}.from_pretrained({place})\n```",
        ]
    return "\n\n".join(lines)


def _format_table(spec: QuantizationSpec | None) -> str:
    if spec is None:
        return "The model's config does not record the format."
    rows = {
        "codes": "INT8, symmetric, stochastic rounding of updates",
        "scales": "FP32, " + (f"per {spec.group_size} inputs" if spec.group_size else "per row"),
        "outliers in FP32": f"{100 * spec.outlier_fraction:g} % of each row"
        + (", in the same columns" if spec.matmul == "int8" else ""),
        "products": "INT8 x INT8 with stochastic rounding of gradients"
        if spec.matmul == "int8"
        else "with dequantized weights",
        "modules kept in float": ", ".join(spec.modules_to_not_convert or []) or "none",
    }
    return _table(("what", "how"), rows.items())


def _memory_table(state_bytes: Mapping[str, int], parameters: int) -> str:
    if not state_bytes:
        return "Not measured: no step was taken."
    everything = {**state_bytes, "all": sum(state_bytes.values())}
    rows = [
        (state, f"{n_bytes / 1e6:,.1f}", f"{n_bytes / parameters:.3f}")
        for state, n_bytes in everything.items()
    ]
    return (
        "Measured just before an optimizer step, without activations; FP32 Adam keeps 16 bytes a "
        "parameter.\n\n" + _table(("state", "MB", "bytes a parameter"), rows)
    )


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)
