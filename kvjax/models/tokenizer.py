"""Text to token ids and back, as the files of a Hugging Face folder say, chats included.

`tokenizers` does the work. This adds what generation needs around it: where sequences begin and
end, text that arrives token by token, and the chat template, which is foreign code and therefore
runs in jinja2's sandbox.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from kvjax.errors import InputError
from kvjax.models.hf_files import check_folder, read_json

__all__ = ["TextStream", "Tokenizer", "named_ids"]

Message = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A folder's tokenizer, its special tokens and its chat template.

    Attributes:
        backend: does the splitting; without truncation or padding.
        eos_ids: the tokens that end a sequence, often several; empty where the folder names none.
        bos_id: the token that begins one, for who wants it; `encode` adds it where the
            tokenizer's own post-processor says so.
        special_tokens: "bos_token", "eos_token" and so on to their texts, for the template.
        chat_template: jinja2 source, or None.
        template_file: where the template came from, for messages.
    """

    backend: tokenizers.Tokenizer
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat_template: str | None = None
    template_file: Path = Path("chat_template.jinja")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads tokenizer.json and, where they are, the configuration files beside it.

        The ids that end a sequence come from the first of generation_config.json, config.json and
        tokenizer_config.json that names any. The template is chat_template.jinja, else the
        "default" one of tokenizer_config.json.

        Raises:
            InputError: no folder, no tokenizer.json, or a file that does not hold what it should.
        """
        folder = check_folder(folder)
        backend = _backend(folder / "tokenizer.json")
        special = _special_tokens(folder)
        template, file = _chat_template(folder)
        bos_ids = _token_ids(folder, "bos", backend, special)
        return cls(
            backend=backend,
            eos_ids=_token_ids(folder, "eos", backend, special),
            bos_id=bos_ids[0] if bos_ids else None,
            special_tokens=special,
            chat_template=template,
            template_file=file,
        )

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's table may be larger."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a text, with the special tokens that the post-processor adds."""
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of some ids; bytes that make no character become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = True) -> "TextStream":
        """A decoder for ids that arrive one at a time."""
        return TextStream(functools.partial(self.decode, skip_special=skip_special))

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        now: datetime.datetime | None = None,
        **variables: Any,
    ) -> str:
        """The text of a chat, as the model was trained to see it.

        Args:
            messages: each with "role" and "content", and what else the template knows; plain JSON
                values, which are all that a template gets to touch.
            add_generation_prompt: whether the text ends with the opening of the model's answer.
            now: the date for templates that print one; None is this machine's clock.
            **variables: what else the template understands, such as tools.

        Raises:
            InputError: the folder has no template, or the template fails or refuses the chat.
        """
        if self.chat_template is None:
            raise InputError(
                f"{self.template_file}: no chat template; give a plain prompt, or put the model's "
                "chat_template.jinja there"
            )
        clock = now or datetime.datetime.now()
        values = {"tools": None, "documents": None} | dict(self.special_tokens) | variables
        values |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            plain = json.loads(json.dumps(values))
            return self._template.render(plain, strftime_now=clock.strftime)
        except Exception as error:  # A template is foreign code: it may raise anything.
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{self.template_file}: the chat template failed on these messages ({reason}); "
                "change the messages or the template"
            ) from None

    def encode_chat(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """The ids of `apply_chat_template`, whose text already holds its special tokens."""
        return self.encode(self.apply_chat_template(messages, **options), add_special=False)

    @functools.cached_property
    def _template(self) -> jinja2.Template:
        return _environment().from_string(self.chat_template or "")


class TextStream:
    """Text from ids that arrive one at a time; a character appears when it is whole.

    Not `tokenizers.decoders.DecodeStream`: that raises on bytes which make no character, and
    models do produce such bytes.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []  # ids already shown, kept since decoders look back
        self._pending: list[int] = []

    def push(self, token: int) -> str:
        """The text that one more id completes, often empty."""
        self._pending.append(int(token))
        text = self._new_text()
        if not text or text.endswith("\ufffd"):
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What is left at the end of the sequence; a cut character shows as U+FFFD."""
        text = self._new_text()
        self._context, self._pending = [], []
        return text

    def _new_text(self) -> str:
        shown = self._decode(self._context)
        return self._decode(self._context + self._pending)[len(shown) :]


def _backend(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise InputError(
            f"{file}: no such file; copy it from the checkpoint's origin, or convert the "
            "tokenizer with transformers' save_pretrained"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        reason = " ".join(str(error).split())
        raise InputError(f"{file}: no tokenizer ({reason}); download it again") from None
    # Settings of whoever saved the file; they would silently cut or pad a prompt.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _special_tokens(folder: Path) -> dict[str, str]:
    """The texts of the tokens with a role; either file may give them plain or with flags."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for role, value in _optional_json(folder / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(text, str):
                found[role] = text
    return found


def named_ids(folder: str | Path, role: str) -> tuple[int, ...]:
    """The ids that generation_config.json, else config.json, gives a role ("bos" or "eos").

    Raises:
        InputError: what stands there is no token id and no list of them.
    """
    for name in ("generation_config.json", "config.json"):
        file = Path(folder) / name
        value = _optional_json(file).get(f"{role}_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            problem = f"{role + '_token_id'!r} is {value!r}, not a token id or a list of them"
            raise InputError(f"{file}: {problem}; mend {name}")
        return tuple(ids)
    return ()


def _token_ids(
    folder: Path, role: str, backend: tokenizers.Tokenizer, special: Mapping[str, str]
) -> tuple[int, ...]:
    """The ids with a role, from the configurations or else from the text of the special token."""
    ids, text = named_ids(folder, role), special.get(f"{role}_token")
    if ids or text is None:
        return ids
    token = backend.token_to_id(text)
    if token is None:
        file = folder / "tokenizer_config.json"
        raise InputError(f"{file}: '{role}_token' {text!r} is not in tokenizer.json; mend either")
    return (token,)


def _chat_template(folder: Path) -> tuple[str | None, Path]:
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8"), file
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read ({error}); download it again") from None
    config = folder / "tokenizer_config.json"
    template = _optional_json(config).get("chat_template")
    if template is None:
        return None, file
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template
                 if isinstance(entry, dict)}  # fmt: skip
        template = named.get("default")
    if not isinstance(template, str):
        problem = "'chat_template' holds neither a text nor a list with one named 'default'"
        raise InputError(f"{config}: {problem}; put the right one into {file.name}")
    return template, config


class _GenerationTag(jinja2.ext.Extension):
    """Lets templates mark the model's own words with a `generation` block; it prints the same."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own protocol)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> jinja2.Environment:
    """The sandbox that templates are written for, with the names that transformers gives them."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: jinja2's own filter would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
