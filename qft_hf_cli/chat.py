"""Talk to a checkpoint, INT8 or float.

    qft-hf chat runs/demo
    qft-hf chat runs/demo --prompt "Hi! How are you?"    one answer only

For the folder of a side network, its base is loaded as well, stored as it was in training.

An empty line or Ctrl-D ends the chat. Each next token is the most likely one, unless --temperature
is above 0.
"""

import argparse
import sys
from collections.abc import Iterator
from math import inf
from typing import Any

from .command_line import add_trust, parser


def main(argv: list[str]) -> None:
    """Answer one prompt, or each one that is typed."""
    arguments = parser(__name__)
    arguments.add_argument("checkpoint", help="folder, or name on the hub")
    arguments.add_argument("--prompt", help="answer only this")
    arguments.add_argument("--system", help="system message")
    arguments.add_argument("--temperature", type=float, default=0.0, help="default 0")
    arguments.add_argument("--max_new_tokens", type=int, default=256, help="default 256")
    arguments.add_argument("--seed", type=int, default=0, help="seed of sampling; default 0")
    add_trust(arguments)
    options = arguments.parse_args(argv)
    if options.max_new_tokens < 1:
        arguments.error(f"--max_new_tokens must be 1 or more, got {options.max_new_tokens}")

    if not 0 <= options.temperature < inf:
        arguments.error(f"--temperature must be 0 or more, got {options.temperature:g}")
    if not 0 <= options.seed < 2**32:
        arguments.error(f"--seed must be in [0, 2**32), got {options.seed}")

    model, tokenizer = _load(options)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    for prompt in _typed() if options.prompt is None else [options.prompt]:
        messages.append({"role": "user", "content": prompt})
        answer = _answer(model, tokenizer, messages, options)
        messages.append({"role": "assistant", "content": answer})


def _typed() -> Iterator[str]:
    """Yield lines that are typed or piped, until an empty line or the end of input."""
    is_typed = sys.stdin.isatty()
    try:
        while prompt := input("\nyou: " if is_typed else ""):
            yield prompt
    except EOFError:
        if is_typed:
            print()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the piped input is not {sys.stdin.encoding} ({error}). Convert it first, for example "
            "by iconv, or set PYTHONIOENCODING to its encoding."
        ) from error


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    import torch
    from transformers import set_seed

    from qft_hf.hf.finetune.arguments import ModelArguments
    from qft_hf.hf.finetune.loading import read_tokenizer
    from qft_hf.hf.finetune.side_tuning import load_checkpoint, start_of
    from qft_hf.hf.language_model import language_class

    set_seed(options.seed)
    trust = {"trust_remote_code": options.trust_remote_code}
    start = start_of(ModelArguments(options.checkpoint, **trust))
    tokenizer = read_tokenizer(options.checkpoint, **trust)
    for name in start.config.architectures or []:
        if name.endswith("ForSequenceClassification"):
            raise ValueError(
                f"{options.checkpoint} is a {name}: it labels texts and does not chat. "
                "`qft-hf evaluate` scores it."
            )
    if tokenizer.chat_template is None:
        raise ValueError(
            f"the tokenizer of {options.checkpoint} has no chat template, so a conversation cannot "
            "be written in the form that the model knows. Use a checkpoint that was tuned on chats."
        )
    model: Any = load_checkpoint(start, language_class(start.config))
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _answer(
    model: Any, tokenizer: Any, messages: list[dict[str, str]], options: argparse.Namespace
) -> str:
    """Print an answer while it is generated; return it."""
    from jinja2.exceptions import TemplateError
    from transformers import TextStreamer

    from qft_hf.hf.positions import n_positions

    try:
        for message in messages:
            message["content"].encode()
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
    except UnicodeEncodeError as error:  # Python keeps bytes that it cannot decode as surrogates
        raise ValueError(
            f"the text is not in UTF-8 ({error}). Convert it first, for example by iconv."
        ) from error
    except TemplateError as error:
        raise ValueError(
            f"the chat template refuses the conversation: {error}. Its roles are "
            f"{', '.join(message['role'] for message in messages[:3])}; many templates accept no "
            "system message (--system)."
        ) from error
    n_tokens, positions = inputs["input_ids"].shape[1], n_positions(model.config) or inf
    if n_tokens >= positions:
        raise ValueError(
            f"the conversation has {n_tokens:,} tokens, and the model has {positions:,} positions, "
            "which leaves none for an answer. Start a new conversation, or shorten the prompt."
        )
    drawn = {"do_sample": True, "temperature": options.temperature}
    output = model.generate(
        **inputs,
        max_new_tokens=min(options.max_new_tokens, positions - n_tokens),
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **(drawn if options.temperature > 0 else {"do_sample": False}),
    )
    answer: str = tokenizer.decode(output[0, n_tokens:], skip_special_tokens=True)
    return answer
