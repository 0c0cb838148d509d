"""The model card: `README.md` for the Hub, which states known facts only.

A local path means nothing to a reader, so files are named without their folders.
"""

import html
import json
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..config import QuantizationSpec
from ..version import __version__
from .atomic_writes import atomic_path
from .card_facts import CardFacts
from .wording import score_text

CARD = "README.md"
TAGS = ["full-parameter-fine-tuning", "int8", "qft"]
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

# The last line of a card: a checksum of the text above it, without the metadata.
_MARK = "<!-- Written by qft_hf; CRC-32 of the text above: {:08x} -->"

_IN_WORDS = {"nf4": "in 4 bits (NF4, by bitsandbytes)", "int8": "in INT8", "float": "in float"}
_IN_CODE = {
    "nf4": 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
    "bnb_4bit_use_double_quant=True)",
    "int8": "qft_hf.QFTConfig()",
}
_PIPELINES = {"ForCausalLM": "text-generation", "ForSequenceClassification": "text-classification"}


def is_card(path: Path) -> bool:
    """Return whether this package wrote a `README.md`, and nobody has changed its text since.

    The metadata of a card may have been changed: they are kept when it is written again.
    """
    if not path.is_file():
        return False
    content = path.read_text(encoding="utf-8", errors="replace")
    text = re.sub(r"\A---\n.*?\n---\n", "", content, flags=re.DOTALL)
    above, _, last = text.strip().rpartition("\n")
    return last == _mark(above)


def marked_card(data: ModelCardData, text: str) -> ModelCard:
    """Make a card that `is_card` recognizes, from its metadata and its text."""
    content = f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n\n{_mark(text)}\n"
    return ModelCard(content, ignore_metadata_errors=False)


def _mark(text: str) -> str:
    return _MARK.format(zlib.crc32(text.strip().encode()))


def write_card(path: Path, facts: CardFacts) -> None:
    """Write a card, replacing an existing file."""
    with atomic_path(path) as draft:
        card(facts).save(draft)


def card(facts: CardFacts) -> ModelCard:
    """Make the card: metadata for the Hub, and the text."""
    results, relation = _results(facts), "adapter" if facts.side else "finetune"
    data = ModelCardData(
        model_name=facts.name if results else None,  # the heading of the results
        eval_results=results or None,
        base_model=facts.base_model,
        base_model_relation=relation if facts.base_model else None,
        datasets=list(facts.datasets) or None,
        language=list(facts.language) or None,
        library_name="transformers",
        license=facts.license,
        pipeline_tag=_pipeline(facts.architecture),
        tags=sorted({*facts.tags, *(SIDE_TAGS if facts.side else TAGS)}),
    )
    return marked_card(data, _text(facts))


def _pipeline(architecture: str) -> str | None:
    return next((task for end, task in _PIPELINES.items() if architecture.endswith(end)), None)


def _text(facts: CardFacts) -> str:
    total, trained = facts.parameters
    learned = [f"[{name}](https://huggingface.co/datasets/{name})" for name in facts.datasets]
    learned += [f"the local file {_code(name)}" for name in facts.files]
    base = "a local model"
    if facts.base_model:
        base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
    stored = facts.optimizer and f"They were updated by {facts.optimizer}."
    on = f" on {', '.join(learned)}" if learned else ""
    version = facts.versions.get("qft_hf", __version__)
    if facts.side:
        form = facts.side["base"]
        stored_as = _IN_WORDS.get(form, f"as {form}")
        what = (
            f"A side network of {trained:,} parameters beside {base}, a `{facts.architecture}` of "
            f"{total - trained:,}, which stayed frozen, stored {stored_as}, "
            f"and is not in this repository. It was trained{on} by quantized side tuning (QST, "
            f"arXiv:2401.07159), with qft_hf {version}."
        )
    else:
        what = (
            f"A `{facts.architecture}`, tuned from {base}{on}. {trained:,} of its {total:,} "
            f"parameters were trained, with matrices in INT8 (QFT, arXiv:2310.07147), by qft_hf "
            f"{version}."
        )
    parts = [
        f"# {html.escape(_line(facts.name.rpartition('/')[2]), quote=False)}",
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
        "## License",
        f"`{facts.license}`"
        if facts.license
        else "None is stated here; that of the model it was tuned from may apply to this one, too.",
        "## Citation",
        *([SIDE_CITATION] if facts.side else []),
        CITATIONS,
    ]
    return "\n\n".join(parts)


def _evaluations(history: Sequence[Mapping[str, Any]]) -> str:
    """Return the section on results: all evaluations of the log, and the training loss."""
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
    """Return the last evaluation for the Hub, if it was made on one dataset that is named there."""
    logged = [entry for entry in facts.history if "eval_loss" in entry]
    datasets = facts.evaluated
    if datasets is None:  # a part of the training data
        datasets = [] if facts.files else facts.datasets
    if not logged or len(datasets) != 1:
        return []
    ends = {"eval_loss": "loss", "eval_perplexity": "perplexity", "eval_accuracy": "accuracy"}
    (dataset,) = datasets
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


def _weights(facts: CardFacts) -> list[str]:
    """Return the section on the trained weights and how they are stored."""
    if not facts.side:
        return ["### Weights", _format_table(facts.format)]
    return ["### Side network", _table(("what", "value"), facts.side.items())]


def _side_loading(facts: CardFacts, base: str) -> str:
    """Return code that loads a base in the format `base`, and the side network into it."""
    form = _IN_CODE.get(base)
    place, loader, trust = facts.base_model or "FOLDER_OF_THE_BASE", *_loader(facts)
    imported = "BitsAndBytesConfig, " if form and form.startswith("Bits") else ""
    loaded = _literal(place) + (f", quantization_config={form}" if form else "") + trust
    lines = [
        "import qft_hf",
        f"from transformers import {imported}{loader}\n",
        f"model = {loader}.from_pretrained({loaded})",
        f"qft_hf.load_side_network(model, {_literal(facts.name)})  # a folder",
    ]
    return "```python\n" + "\n".join(lines) + "\n```"


def _loader(facts: CardFacts) -> tuple[str, str]:
    """Return the class that loads the model, and the end of its argument list."""
    if facts.auto_class is None:
        return facts.architecture, ""
    return facts.auto_class, ", trust_remote_code=True"


def _loading(facts: CardFacts) -> str:
    if facts.side:
        return _side_loading(facts, facts.side["base"])
    name, (loader, trust) = facts.name, _loader(facts)
    plain = f"{name.rpartition('/')[2]}-bf16"
    lines = [
        "As INT8, with qft_hf installed, to continue training or to save memory:",
        f'```python\nimport qft_hf  # registers the "qft" format\n'
        f"from transformers import {loader}\n\n"
        f"model = {loader}.from_pretrained({_literal(name)}{trust})\n```",
        "To use it without qft_hf, convert that once to an ordinary bf16 checkpoint:",
        f"```python\nqft_hf.dequantize_model_(model).save_pretrained({_literal(plain)})\n```",
        "The command does the same with a downloaded folder, tokenizer included:",
        f"```sh\nqft-hf export FOLDER {shlex.quote(plain)} --dtype bfloat16"
        + (" --trust_remote_code" if trust else "")
        + "\n```",
    ]
    if facts.export_dtype:
        place = f'{_literal(name)}, subfolder="{facts.export_dtype}"'
        lines += [
            f"An ordinary {facts.export_dtype} checkpoint is also here, which needs no qft_hf:",
            f"```python\nfrom transformers import {loader}\n\n"
            f"model = {loader}.from_pretrained({place}{trust})\n```",
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
        "Measured just before an optimizer step, without activations; FP32 Adam keeps 16 bytes per "
        "parameter.\n\n" + _table(("state", "MB", "bytes per parameter"), rows)
    )


def _shown(value: Any) -> str:
    return score_text(value) if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in rows:
        cells = (_line(str(cell)).replace("|", "\\|") for cell in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _line(text: str) -> str:
    """Return a text without line breaks, which would end a heading, a code span or a table."""
    return " ".join(text.split())


def _code(text: str) -> str:
    """Return a text as code; one that has backticks is put between more of them."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return f"{fence}{pad}{_line(text)}{pad}{fence}"


def _literal(text: str) -> str:
    """Return a text as a literal in Python."""
    return json.dumps(text, ensure_ascii=False)
