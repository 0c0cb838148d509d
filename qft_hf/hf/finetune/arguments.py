"""The settings of a fine-tuning run: the model, the method, the data and the output.

The settings of training itself are in `QFTTrainingArguments`. The field names are the keys of a
config file and the command's flags.
"""

import math
from dataclasses import MISSING, dataclass
from typing import Any, ClassVar, Literal, get_args

from ...side import DOWNSAMPLES, QSTConfig
from ..arguments import setting

ExportDtype = Literal["float32", "float16", "bfloat16"]
EXPORT_DTYPES: tuple[str, ...] = get_args(ExportDtype)  # also the names of the sub-folders


@dataclass
class ModelArguments:
    """Which model is tuned and how it is loaded."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str = setting(
        "Checkpoint to start from: a folder, or a model's name on the hub.", default=MISSING
    )
    model_revision: str | None = setting("Branch, tag or commit of a model on the hub.")
    tokenizer_name_or_path: str | None = setting("Tokenizer, if it is not the model's own.")
    new_tokens: list[str] | None = setting(
        "Special tokens to add, with embeddings, such as a chat template's."
    )
    trust_remote_code: bool = setting("Run Python code that comes with the model.", default=False)
    chat_template: str | None = setting(
        "Jinja file that replaces the tokenizer's chat template, or the name of "
        "one that ships, such as vicuna."
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "Dtype of activations and of parameters that stay float (norms, biases).", default="float32"
    )
    attn_implementation: str | None = setting("Attention kernel, as in `from_pretrained`.")


_SIDE = QSTConfig()


@dataclass
class MethodArguments:
    """What is trained: every parameter of the model, or a side network (docs/side-tuning.md)."""

    _argument_group_name: ClassVar[str] = "method"

    method: Literal["full", "qst"] = setting(
        "full: every parameter, in INT8. qst: a small side network that learns from "
        "the hidden states of a frozen base.",
        default="full",
    )
    base: Literal["nf4", "int8", "float"] | None = setting(
        "qst: how the frozen base is stored: 4 bits by bitsandbytes, INT8, or float. "
        "Unset: nf4, but a model that is already quantized stays as it is."
    )
    side_r: int | None = setting(
        f"qst: the base is this many times as wide as the side network. Unset: {_SIDE.r}."
    )
    side_downsample: str | None = setting(
        f"qst: how hidden states are narrowed: {', '.join(DOWNSAMPLES)}. Unset: {_SIDE.downsample}."
    )
    side_rank: int | None = setting(f"qst: rank of the adapter. Unset: {_SIDE.rank}.")

    @property
    def side(self) -> QSTConfig | None:
        """The side network to train; None if every parameter is trained."""
        return None if self.method == "full" else QSTConfig(**self._side_fields)

    def asks_for_another(self, side: QSTConfig) -> bool:
        """Whether a field of the side network is set and differs from `side`."""
        return any(getattr(side, name) != value for name, value in self._side_fields.items())

    @property
    def _side_fields(self) -> dict[str, Any]:
        values = {name: getattr(self, f"side_{name}") for name in ("r", "downsample", "rank")}
        return {name: value for name, value in values.items() if value is not None}

    def __post_init__(self) -> None:
        given = [f"side_{name}" for name in self._side_fields] + ["base"] * (self.base is not None)
        if self.method == "full" and given:
            raise ValueError(
                f"{', '.join(given)} can only be set for side tuning, but method 'full' trains "
                "every parameter. Set method to qst, or leave these out."
            )
        side = self.side
        if side is not None and self.side_rank is not None and side.downsample != "adapter":
            raise ValueError(
                f"side_rank={side.rank} needs side_downsample 'adapter', got {side.downsample!r}. "
                "Leave one of them out."
            )


@dataclass
class DataArguments:
    """Which rows are learned, which are held out, and how a row becomes tokens."""

    _argument_group_name: ClassVar[str] = "data"

    train_data: list[str] = setting(
        "Files (json, jsonl, csv, tsv, txt, also .gz or .zst; parquet), folders of "
        "them, glob:PATTERN, or hub names.",
        default=MISSING,
    )
    train_weights: list[float] | None = setting(
        "How often an epoch has each of train_data: 2 is twice, 0.5 half of it."
    )
    train_split: str = setting("Split of train_data. A file has only `train`.", default="train")
    train_config: str | None = setting("Configuration of train_data, if the hub has several.")
    eval_data: list[str] | None = setting("Held-out data, like train_data: scored, never learned.")
    eval_split: str = setting("Split of eval_data.", default="train")
    eval_config: str | None = setting("Configuration of eval_data, if the hub has several.")
    eval_fraction: float | None = setting(
        "Instead of eval_data: hold out this share of train_data, by seed."
    )
    max_train_rows: int | None = setting(
        "Most rows of the training data: the first of each file, in proportion."
    )
    max_eval_rows: int | None = setting("Most rows of the evaluation data, likewise.")
    task: Literal["chat", "text", "classification", "regression", "multi_label"] = setting(
        "chat: conversations, or questions and answers; text: plain text; "
        "classification, regression, multi_label: a text and its class, number or classes.",
        default="chat",
    )
    messages_field: str | None = setting("chat: field of the messages, if its name is unusual.")
    prompt_field: str | None = setting(
        "chat: field of the question, if its name is unusual; see answer_field."
    )
    answer_field: str | None = setting("chat: field of the answer.")
    text_field: str = setting("All tasks but chat: field of the (first) text.", default="text")
    text_pair_field: str | None = setting("Labeled texts: field of the second text, if any.")
    label_field: str = setting(
        "Labeled texts: field of the class, number or classes.", default="label"
    )
    on_bad_row: Literal["stop", "skip"] = setting(
        "Whether an unreadable row stops the run, or is left out and counted.", default="stop"
    )
    assistant_only_loss: bool = setting("chat: learn only the assistant's turns.", default=True)
    max_length: int = setting("Most tokens in an example; tokens in a packed block.", default=1024)
    packing: bool = setting(
        "chat, text: fill blocks of max_length tokens instead of padding. Examples in "
        "one block do not see each other.",
        default=False,
    )
    preprocessing_workers: int | None = setting("Processes that tokenize. Default: only this one.")

    @property
    def weights(self) -> list[float]:
        """One weight for each entry of `train_data`."""
        return self.train_weights or [1.0] * len(self.train_data)

    def __post_init__(self) -> None:
        if isinstance(self.train_data, str):
            self.train_data = [self.train_data]
        if isinstance(self.eval_data, str):
            self.eval_data = [self.eval_data]
        if len(self.weights) != len(self.train_data) or not all(
            0 < weight < math.inf for weight in self.weights
        ):
            raise ValueError(
                f"train_weights must be a positive number for each of the {len(self.train_data)} "
                f"entries of train_data, got {self.train_weights}."
            )
        if (self.prompt_field is None) != (self.answer_field is None):
            raise ValueError(
                "prompt_field and answer_field go together: a question has an answer. Set both."
            )
        if self.eval_data is not None and self.eval_fraction is not None:
            raise ValueError(
                f"eval_data={self.eval_data!r} and eval_fraction={self.eval_fraction} both say "
                "what is held out. Set one of them."
            )
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction is a share of the rows, between 0 and 1, got {self.eval_fraction}. "
                "For 5 % write 0.05; leave it out to hold out nothing."
            )
        if self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2, got {self.max_length}: a token is predicted from "
                "the one before it."
            )
        if self.packing and self.task not in ("chat", "text"):
            raise ValueError(
                "packing=true joins examples into one sequence, which has no place for their "
                f"labels. Set packing to false for task {self.task!r}."
            )


@dataclass
class OutputArguments:
    """What a run writes in addition to the Trainer's files."""

    _argument_group_name: ClassVar[str] = "output"

    overwrite_output: bool = setting(
        "Replace the run in output_dir, if there is one.", default=False
    )
    export_dtype: ExportDtype | None = setting(
        "Also write an ordinary checkpoint of this dtype, in a sub-folder."
    )
