"""The Trainer of a run, which counts tokens in the examples themselves.

A batch does not show its number of tokens. Packed blocks, and the batches of some tokenizers, have
no mask; and if padding is the end-of-text token, the end of a text cannot be told from padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Trainer

from ..trainer import QFTTrainer

N_TOKENS = "n_tokens"  # key in a batch: tokens of each example, int64, `[batch]`


class RunTrainer(QFTTrainer):
    """Counts in `state.num_input_tokens_seen` every token that is not padding.

    Args:
        data_collator: Makes a batch of examples, which have `input_ids`.
        **kwargs: As for `QFTTrainer`.
    """

    def __init__(self, *, data_collator: Callable[[Any], dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(data_collator=partial(_counted, data_collator), **kwargs)
        average_batch_mean_losses_(self)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Create the repository that the run is pushed to, or raise ValueError before it trains."""
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # errors of the network, the Hub and its library
            raise ValueError(
                "push_to_hub is set, but the Hub does not provide a repository: "
                f"{str(error).rstrip('.')}. Log in with "
                "`hf auth login`, correct hub_model_id, or leave push_to_hub out, and upload the "
                "finished folder with `hf upload`."
            ) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keep the card of the run, which is written before the push and says more."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        of_model = {name: value for name, value in inputs.items() if name != N_TOKENS}
        prepared: dict[str, Any] = super()._prepare_inputs(of_model)
        return prepared

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        n_tokens = inputs[N_TOKENS].sum().to(self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(n_tokens).sum())


def average_batch_mean_losses_(trainer: Trainer) -> None:
    """Make the Trainer average losses that are batch means over processes and micro-batches.

    Classifiers return such losses, and so may models with their own code. If a model accepts any
    keyword argument, the Trainer assumes that its loss is divided by the number of labels of the
    whole step, and sums the losses.
    """
    model: Any = trainer.model
    if trainer.model_accepts_loss_kwargs and not _divides_by_all_labels(model):
        trainer.model_accepts_loss_kwargs = False


def _divides_by_all_labels(model: Any) -> bool:
    """Whether the loss is divided by the number of labels of a step if that is passed."""
    if type(model).__module__.startswith("transformers."):
        return bool(model.can_generate())
    was_training = model.training
    model.eval()
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    with torch.no_grad():
        of_one, of_two = (
            model(input_ids=tokens, labels=tokens, num_items_in_batch=torch.tensor(n)).loss
            for n in (1, 2)
        )
    model.train(was_training)
    return not of_one.equal(of_two)


def _counted(
    collate: Callable[[Any], dict[str, Any]], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    n_tokens = torch.tensor([len(example["input_ids"]) for example in examples])  # before `collate`
    return {**collate(examples), N_TOKENS: n_tokens}
