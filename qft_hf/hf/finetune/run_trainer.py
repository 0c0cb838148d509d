"""The Trainer of a run: it counts the tokens of the examples themselves.

A batch does not tell how many it has. Blocks of packed examples have no mask, and neither have the
batches of some tokenizers; and where padding is the end-of-text token, the end of a text is no
padding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import Trainer

from ..trainer import QFTTrainer

N_TOKENS = "n_tokens"  # of each example, beside the model's inputs: int64, `[batch]`


class RunTrainer(QFTTrainer):
    """Counts in `state.num_input_tokens_seen` every token that is not padding.

    Args:
        data_collator: Makes a batch of examples, which have `input_ids`.
        **kwargs: As of `QFTTrainer`.
    """

    def __init__(self, *, data_collator: Callable[[Any], dict[str, Any]], **kwargs: Any) -> None:
        super().__init__(data_collator=partial(_counted, data_collator), **kwargs)
        take_means_for_means_(self)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Make the repository that the run is pushed to, or raise before anything is trained.

        Raises:
            ValueError: The Hub cannot be reached, or does not let us.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except Exception as error:  # of the network, the Hub and its library alike
            raise ValueError(
                "push_to_hub is set, and the Hub does not give a repository: "
                f"{str(error).rstrip('.')}. Log in with "
                "`hf auth login`, correct hub_model_id, or leave push_to_hub out, and upload the "
                "finished folder by `hf upload`."
            ) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the card of the run, which is there when it is pushed and tells more."""

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        of_model = {name: value for name, value in inputs.items() if name != N_TOKENS}
        prepared: dict[str, Any] = super()._prepare_inputs(of_model)
        return prepared

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        n_tokens = inputs[N_TOKENS].sum().to(self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(n_tokens).sum())


def take_means_for_means_(trainer: Trainer) -> None:
    """Have the losses of a classifier averaged over processes and micro-batches.

    Each is the mean of a batch. The Trainer takes the loss of a model that accepts any argument for
    a share of one that is divided by all labels of a step, and sums them up.
    """
    model: Any = trainer.model
    if not model.can_generate():
        trainer.model_accepts_loss_kwargs = False


def _counted(
    collate: Callable[[Any], dict[str, Any]], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    n_tokens = torch.tensor([len(example["input_ids"]) for example in examples])  # they may change
    return {**collate(examples), N_TOKENS: n_tokens}
