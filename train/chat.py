"""The tokenizer of the small models: byte-level BPE, digits apart, and the chat's form.

Any text encodes and decodes exactly. A digit is always a token of its own. The chat template is
the one place that says how a chat is written: training text comes out of it too, so what a model
is asked later is what it was trained on. The system message comes first, so that chats about the
same document share their beginning.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from kvjax.models.tokenizer import Tokenizer

__all__ = ["ASSISTANT", "BOS", "CHAT_TEMPLATE", "EOS", "PAD", "save_tokenizer", "train_tokenizer"]

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] }}
    {%- if message['role'] == 'assistant' %}
        {{- eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer with the special tokens, the 256 bytes and what else is frequent in `texts`.

    Args:
        texts: the corpus; the order does not matter.
        vocab_size: at most how many tokens; fewer where the corpus has no more to merge.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS, SYSTEM, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    ids = backend.get_vocab()
    return Tokenizer(
        backend=backend,
        eos_ids=(ids[EOS],),
        bos_id=ids[BOS],
        special_tokens={"bos_token": BOS, "eos_token": EOS, "pad_token": PAD},
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(folder: Path, tokenizer: Tokenizer, *, max_positions: int) -> None:
    """Writes the files that describe text in a Hugging Face folder.

    These are tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.
    """
    vocab = tokenizer.backend.get_vocab()
    ids = {name: vocab[text] for name, text in tokenizer.special_tokens.items()}
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            **tokenizer.special_tokens,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_positions,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["bos_token"],
            "do_sample": False,
            "eos_token_id": ids["eos_token"],
            "pad_token_id": ids["pad_token"],
        },
    )


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
