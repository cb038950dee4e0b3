"""Tokenizers and chat templates of Hugging Face folders."""

import datetime
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from kvjax.errors import InputError
from kvjax.models.tokenizer import Tokenizer

TEXT = "hello world, how are you? ünïcode 🙂🙃 日本語"


def byte_level() -> tokenizers.Tokenizer:
    """Bytes merged by BPE, as Llama 3 and Qwen have it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([TEXT] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return backend


def byte_fallback() -> tokenizers.Tokenizer:
    """Pieces with a leading mark, and single bytes for the rest, as Llama 2 and Mistral have it."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [*"▁abcdefghijklmnopqrstuvwxyz", "▁a", "▁h", "▁he"]
    merges = [("▁", "a"), ("▁", "h"), ("▁h", "e")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)}, merges, unk_token="<unk>",
            byte_fallback=True, fuse_unk=True,
        )
    )  # fmt: skip
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(content=" ", left=1)]
    )  # fmt: skip
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


BACKENDS = {"byte_level": byte_level(), "byte_fallback": byte_fallback()}


def make_folder(folder: Path, **files: Any) -> Path:
    """A folder with tokenizer.json and the given files, dots in their names written as __."""
    BACKENDS["byte_level"].save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def test_encode_and_decode(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path))
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 0
    assert tokenizer.encode(TEXT, add_special=False) == ids[1:]
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids, skip_special=False) == "<s>" + TEXT
    assert tokenizer.encode("a</s>", add_special=False)[-1] == 1
    assert tokenizer.vocab_size == BACKENDS["byte_level"].get_vocab_size()
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.chat_template) == ((), None, None)


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("a") == [0, tokenizer.backend.token_to_id("a")]


GENERATION = {"bos_token_id": 7, "eos_token_id": [8, 9]}
CONFIG = {"bos_token_id": 5, "eos_token_id": 6}
NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}


@pytest.mark.parametrize(
    ("files", "bos", "eos"),
    [
        ({"generation_config__json": GENERATION, "config__json": CONFIG}, 7, (8, 9)),
        ({"generation_config__json": {"eos_token_id": None}, "config__json": CONFIG}, 5, (6,)),
        ({"config__json": CONFIG, "tokenizer_config__json": NAMES}, 5, (6,)),
        ({"config__json": {"eos_token_id": 6}, "tokenizer_config__json": NAMES}, 0, (6,)),
        ({"config__json": {}, "tokenizer_config__json": NAMES}, 0, (1,)),
        ({"special_tokens_map__json": NAMES}, 0, (1,)),
        ({"tokenizer_config__json": {"eos_token": None}}, None, ()),
    ],
)
def test_ends(files: dict[str, Any], bos: int, eos: tuple[int, ...], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path, **files))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (bos, eos)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"generation_config__json": {"eos_token_id": "2"}}, ["generation_config", "eos_token_id"]),
        ({"config__json": {"eos_token_id": [True]}}, ["config.json", "eos_token_id"]),
        ({"config__json": {"bos_token_id": -1}}, ["config.json", "bos_token_id"]),
        ({"config__json": "{"}, ["config.json", "JSON"]),
        ({"tokenizer_config__json": {"eos_token": "<end>"}}, ["tokenizer_config", "<end>"]),
        ({"tokenizer_config__json": {"chat_template": 3}}, ["tokenizer_config", "chat_template"]),
        ({"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "x"}]}},
         ["tokenizer_config", "default"]),
        ({"tokenizer__json": "{}"}, ["tokenizer.json"]),
        ({"tokenizer__json": "not\njson"}, ["tokenizer.json"]),
    ],
)  # fmt: skip
def test_files_that_do_not_hold_what_they_should(
    files: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        Tokenizer.load(make_folder(tmp_path, **files))
    assert_one_line(caught.value, str(tmp_path), *words)


def test_no_tokenizer(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(InputError) as caught:
            Tokenizer.load(folder)
        assert_one_line(caught.value, str(folder))


def assert_one_line(error: InputError, *words: str) -> None:
    assert "\n" not in str(error)
    for word in words:
        assert word in str(error), str(error)


@pytest.mark.parametrize("kind", BACKENDS)
def test_stream_shows_whole_characters(kind: str) -> None:
    tokenizer = Tokenizer(BACKENDS[kind])
    text = "he 🙂🙃 a 日本 ü he"
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert len([piece for piece in pieces if piece]) > 5
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", BACKENDS)
def test_stream_flushes_a_cut_character(kind: str) -> None:
    tokenizer = Tokenizer(BACKENDS[kind])
    ids = tokenizer.encode("he 🙃", add_special=False)[:-1]
    stream = tokenizer.stream()
    shown = "".join(stream.push(token) for token in ids)
    assert shown in ("he", "he ")
    assert shown + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


def test_stream_of_any_bytes_is_the_decoded_text() -> None:
    """Untrained models emit anything; byte-level text is the same however it arrives."""
    tokenizer = Tokenizer(BACKENDS["byte_level"])
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        stream = tokenizer.stream(skip_special=False)
        text = "".join(stream.push(token) for token in ids) + stream.flush()
        assert text == tokenizer.decode(ids, skip_special=False)


def test_stream_survives_any_bytes_with_fallback() -> None:
    """A run of byte tokens turns to U+FFFD as a whole, so only the text after it is certain."""
    tokenizer = Tokenizer(BACKENDS["byte_fallback"])
    tail = tokenizer.encode("he a he", add_special=False)
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        stream = tokenizer.stream()
        text = "".join(stream.push(token) for token in ids + tail) + stream.flush()
        assert text.endswith("he a he")


CHATML = """\
{% for message in messages %}
    {% if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role\\n' + message.role) }}
    {% endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>"}]
RENDERED = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n"


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template__jinja": CHATML},
        {"chat_template__jinja": CHATML, "tokenizer_config__json": {"chat_template": "other"}},
        {"tokenizer_config__json": {"chat_template": CHATML}},
        {"tokenizer_config__json": {"chat_template": [{"name": "tool_use", "template": "other"},
                                                      {"name": "default", "template": CHATML}]}},
    ],
)  # fmt: skip
def test_chat_template(files: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path, **files))
    text = tokenizer.apply_chat_template(CHAT)
    assert text == RENDERED + "<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=False) == RENDERED
    assert tokenizer.encode_chat(CHAT) == tokenizer.encode(text, add_special=False)
    assert tokenizer.encode_chat(CHAT)[0] != 0


def render(template: str, messages: Any = (), **options: Any) -> str:
    tokenizer = Tokenizer(
        BACKENDS["byte_level"], special_tokens={"bos_token": "<s>"}, chat_template=template
    )
    return tokenizer.apply_chat_template(messages, **options)


def test_what_templates_may_use() -> None:
    now = datetime.datetime(2024, 7, 26)
    assert render("{{ bos_token }}|{{ eos_token }}|{{ strftime_now('%d %b %Y') }}", now=now) == (
        "<s>||26 Jul 2024"
    )
    assert render("{{ strftime_now('%Y') }}") >= "2024"
    assert render("{{ tools is none }} {{ documents is none }}") == "True True"
    assert render("{{ tools | tojson }}", tools=[{"b": "<ü>", "a": 1}]) == '[{"b": "<ü>", "a": 1}]'
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert (
        render("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}")
        == "1"
    )
    assert (
        render("{% generation %}a{% set x = 1 %}{% endgeneration %}{{ x is defined }}") == "aFalse"
    )
    assert render("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}") == "2"
    assert render("a\n{% if true %}\n  b\n  {% endif %}\nc") == "a\n  b\nc"
    assert render("{{ messages[0].content }}", [{"role": "user", "content": "x"}]) == "x"
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", ["TemplateSyntaxError"]),
        ("{{ raise_exception('two\nlines') }}", ["two lines"]),
        ("{{ messages[0].role.upper() }}", ["UndefinedError"]),
        ("{{ 1 / 0 }}", ["ZeroDivisionError"]),
        ("{{ ().__class__.__base__.__subclasses__() }}", ["SecurityError"]),
        ("{{ messages.append(1) }}", ["SecurityError"]),
        ("{{ tools.update(a=1) }}", ["SecurityError"]),
        ("{{ bos_token.__class__.__mro__ }}", ["SecurityError"]),
        ("{% include '/etc/passwd' %}", ["no loader"]),
    ],
)
def test_template_errors(template: str, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        render(template, tools={})
    assert_one_line(caught.value, "chat_template.jinja", *words)


def test_messages_that_are_no_json() -> None:
    with pytest.raises(InputError) as caught:
        render("x", [{"role": "user", "content": object()}])
    assert_one_line(caught.value, "JSON serializable")


def test_templates_cannot_change_the_messages() -> None:
    messages = [{"role": "user", "content": "x"}]
    assert render("{% set ns = namespace(m=messages[0]) %}{{ ns.m.content }}", messages) == "x"
    assert messages == [{"role": "user", "content": "x"}]


def test_no_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_folder(tmp_path))
    with pytest.raises(InputError) as caught:
        tokenizer.apply_chat_template(CHAT)
    assert_one_line(caught.value, str(tmp_path / "chat_template.jinja"), "no chat template")
