"""A tokenizer of a few hundred tokens, and conversations with awkward content."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# Padding and the end of a turn are the same token, as in SmolLM2.
TURN, END = "<|im_start|>", "<|im_end|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The same text, with the assistant's part marked.
CHATML_MARKED = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# As in Qwen3, answers after the last user turn show their thoughts, and earlier answers do not.
FORGETFUL, FORGETFUL_MARKED = (
    "{% set ns = namespace(user=0) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set ns.user = loop.index0 %}{% endif %}{% endfor %}"
    + template.replace(
        "message['content'] +",
        "('<thought>' if message['role'] == 'assistant' and loop.index0 > ns.user else '') "
        "+ message['content'] +",
    )
    for template in (CHATML, CHATML_MARKED)
)

TEXTS = [
    "How are you doing today? I am fine, thank you.",
    "user assistant system what is the answer to the question?",
    "The quick brown fox jumps over the lazy dog, twice.",
]


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte-level BPE that merges a few words and knows every byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # As in GPT-2 and models derived from it, the offsets of " word" are those of "word".
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[TURN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=TURN, eos_token=END, pad_token=END
    )
    fast.chat_template = chat_template
    return fast


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of user and assistant in turn."""
    turns = [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


CHATS = {
    "one answer": chat("How are you?", "I am fine."),
    "system": chat("hi", "hello", "bye", "see you", system="Be brief."),
    "user last": chat("a", "b", "c"),
    "two answers in a row": [*chat("a", "b"), {"role": "assistant", "content": "c"}],
    "lines": chat("one\ntwo\n", "three\n\nfour\n", "five", "six"),
    "spaces": chat(" x ", " leading and trailing "),
    "empty answer": chat("say nothing", ""),
    "more than ASCII": chat("Größe? 👋🏽", "日本語 naïve 🙂‍↔️", "👍", "é"),
    "words of the template": chat("assistant\n", "user\nassistant\nsystem"),
}
