"""Fine-tuning runs: from a config file to a trained checkpoint, a loss curve and a summary."""

from .arguments import DataArguments, ModelArguments, OutputArguments
from .export import export_checkpoint
from .parsing import RunArguments, parse_arguments
from .preparation import Run, prepare
from .run import finetune, train
from .summary import RunSummary

__all__ = [
    "DataArguments",
    "ModelArguments",
    "OutputArguments",
    "Run",
    "RunArguments",
    "RunSummary",
    "export_checkpoint",
    "finetune",
    "parse_arguments",
    "prepare",
    "train",
]
