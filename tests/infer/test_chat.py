"""Conversations and saved prefixes: the pages save work and change no answer."""

import copy
import json

import models_for_tests
import pytest

from kvjax.cache import PageLedger
from kvjax.errors import InputError
from kvjax.infer import LLM, SamplingParams, load_cache, prefix
from kvjax.infer.step import EngineState
from kvjax.plan import FirstCome

SIZE = 4
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SYSTEM = "a document of some length, which every conversation begins with"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """One row of 256 tokens, so 64 pages in all."""
    folder = tmp_path_factory.mktemp("model")
    models_for_tests.save_model(folder)
    settings = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    llm = LLM.load(folder, max_rows=1, page_size=SIZE, token_budget=64, max_length=256)
    llm.engine.warm_up()
    assert llm.engine.planner.ledger.num_pages == 64
    return llm


def empty(llm, num_pages=64):
    """The same model with nothing in its cache, behind the programs that are compiled already."""
    engine = copy.copy(llm.engine)
    engine.state = EngineState.init(*engine.cache.init(), engine.grid)
    engine.planner = FirstCome(engine.grid, PageLedger(num_pages))
    return LLM(engine, llm.tokenizer, llm.eos_ids)


@pytest.fixture
def llm(base):
    return empty(base)


def params(llm, **options):
    """Answers of ten letters: text whose tokens are the ones that were drawn."""
    letters = llm.tokenizer.encode("abcdefghijklmnopqrstuvwxyz")
    bias = dict.fromkeys(letters, 100.0)
    return SamplingParams(**({"max_tokens": 10, "ignore_eos": True, "logit_bias": bias} | options))


def computed(llm, run):
    """What `run` returns, and how many tokens of prompts were computed for it."""
    before = llm.engine.planner.prefill_tokens_computed
    return run(), llm.engine.planner.prefill_tokens_computed - before


def held(llm):
    return llm.engine.planner.ledger.held


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_turn_computes_what_is_new_and_answers_as_without_pages(base, llm, temperature):
    """At most a partly filled page comes before the new tokens."""
    asked = params(llm, temperature=temperature, seed=5)
    chat = llm.chat(SYSTEM)
    known = 0
    for turn, text in enumerate(["hello there", "and", "more of it", "?", "the last one"]):
        said = [*chat.messages, {"role": "user", "content": text}]
        answer, new = computed(llm, lambda text=text: chat.send(text, asked))
        assert answer.prompt_tokens - known <= new < answer.prompt_tokens - known + SIZE, turn
        assert empty(base).generate([said], asked) == [answer]
        assert chat.messages == (*said, {"role": "assistant", "content": answer.text})
        # The last token was drawn, but nothing was drawn after it: it is not computed.
        known = answer.prompt_tokens + len(answer.token_ids) - 1
        assert chat.tokens_held == known // SIZE * SIZE
        assert held(llm) == known // SIZE
    chat.close()
    assert held(llm) == 0 and llm.engine.planner.ledger.available == 64
    assert len(chat.messages) == 11


def test_messages_may_come_from_before(llm):
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    first = llm.chat(SYSTEM, said).send("three", params(llm))
    whole = [{"role": "system", "content": SYSTEM}, *said, {"role": "user", "content": "three"}]
    assert llm.generate([whole], params(llm)) == [first]


def test_conversations_share_the_pages_of_their_system_prompt(llm):
    shared = len(llm.tokenizer.encode(f"system: {SYSTEM}\nuser: ")) // SIZE
    with llm.chat(SYSTEM) as a, llm.chat(SYSTEM) as b:
        a.send("x", params(llm))
        alone = held(llm)
        answer, new = computed(llm, lambda: b.send("y", params(llm)))
        assert new == answer.prompt_tokens - shared * SIZE
        assert held(llm) == alone + b.tokens_held // SIZE - shared
    assert held(llm) == 0


def test_pages_that_a_conversation_holds_are_not_evicted(llm):
    """Other requests sweep through all of memory between two turns."""
    chat = llm.chat(SYSTEM)
    first = chat.send("x", params(llm))
    for seed in range(8):
        llm.generate([[seed] * 120], params(llm, max_tokens=2))
    answer, new = computed(llm, lambda: chat.send("y", params(llm)))
    assert new <= answer.prompt_tokens - first.prompt_tokens


def test_pages_held_that_leave_no_room_end_in_one_error(llm):
    chat = llm.chat()
    chat.send("w" * 120, params(llm))
    with pytest.raises(InputError, match="held by chats or loaded prefixes") as error:
        llm.generate([[1] * 200])
    assert "\n" not in str(error.value)
    assert not llm.engine.planner.busy and held(llm) == chat.tokens_held // SIZE
    other = llm.chat()
    with pytest.raises(InputError, match="held by chats"):
        other.send("v" * 150, params(llm))
    assert other.messages == () and other.tokens_held == 0
    chat.close()
    other.send("v" * 150, params(llm))


def test_a_conversation_that_is_too_long_is_refused_and_goes_on(llm):
    chat = llm.chat(SYSTEM)
    chat.send("x", params(llm))
    before = chat.messages, chat.tokens_held
    with pytest.raises(InputError, match="but a sequence holds 256"):
        chat.send("w" * 300, params(llm))
    assert (chat.messages, chat.tokens_held) == before
    chat.send("y", params(llm))


def test_a_stream_that_is_closed_leaves_the_conversation_as_it_was(llm):
    chat = llm.chat(SYSTEM)
    chat.send("x", params(llm))
    before = chat.messages
    stream = chat.stream("y", params(llm, max_tokens=40))
    assert next(stream).completion is None
    with pytest.raises(InputError, match="unfinished"):
        chat.send("z")
    stream.close()
    assert chat.messages == before and not llm.engine.planner.busy
    pieces = [chunk.text for chunk in chat.stream("y", params(llm, max_tokens=40))]
    assert "".join(pieces) == chat.messages[-1]["content"] and len(pieces) > 1


def test_an_answer_that_is_read_no_further_than_its_end_counts(llm):
    chat = llm.chat(SYSTEM)
    for chunk in chat.stream("x", params(llm)):
        if chunk.completion:
            break
    assert len(chat.messages) == 3 and chat.tokens_held > 0


def test_a_conversation_that_is_closed_while_it_speaks_holds_nothing(llm):
    chat = llm.chat(SYSTEM)
    for _ in chat.stream("x", params(llm)):
        chat.close()
    assert held(llm) == 0 and len(chat.messages) == 3


def test_a_text_that_ends_the_answer_is_no_part_of_the_conversation(base, llm):
    whole = llm.chat().send("x", params(llm)).text
    chat = llm.chat()
    answer = chat.send("x", params(llm, stop=(whole[4],)))
    assert chat.messages[-1]["content"] == answer.text == whole[: whole.index(whole[4])]
    said = [*chat.messages, {"role": "user", "content": "y"}]
    assert empty(base).generate([said], params(llm)) == [chat.send("y", params(llm))]


def test_what_a_template_drops_is_not_held(base, llm):
    """A template that forgets answers, as those of reasoning models forget thoughts."""
    forgetful = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}> "
    llm.tokenizer = copy.copy(base.tokenizer)
    object.__setattr__(llm.tokenizer, "chat_template", forgetful)
    llm.tokenizer.__dict__.pop("_template", None)
    chat = llm.chat()
    chat.send("w" * 40, params(llm, max_tokens=60))
    # 40 letters are found, 164 tokens are new: with those of the 60 letters, 66 pages of 64.
    chat.send("x" * 160, params(llm, max_tokens=1))
    assert chat.tokens_held == 204 and held(llm) == 51


def test_a_conversation_has_one_answer_and_an_end(llm):
    chat = llm.chat(SYSTEM)
    with pytest.raises(InputError, match="n=2"):
        chat.send("x", params(llm, n=2))
    chat.close()
    chat.close()
    for use in (lambda: chat.send("x"), lambda: chat.save("x")):
        with pytest.raises(InputError, match="was closed"):
            use()


# In files.


def test_a_saved_conversation_goes_on_elsewhere(base, llm, tmp_path):
    chat = llm.chat(SYSTEM)
    chat.send("x", params(llm))
    chat.save(tmp_path / "chat")
    other = empty(base)
    with other.load_chat(tmp_path / "chat") as again:
        assert again.messages == chat.messages and again.tokens_held == chat.tokens_held
        found = again.tokens_held
        answer, new = computed(other, lambda: again.send("y", params(llm)))
        assert new == answer.prompt_tokens - found
        assert answer == chat.send("y", params(llm))
    assert held(other) == 0
    with pytest.raises(InputError, match="holds a saved chat, not a saved prefix"):
        other.load_prefix(tmp_path / "chat")


def test_a_conversation_may_be_saved_before_it_begins(llm, tmp_path):
    llm.chat(SYSTEM).save(tmp_path / "chat")
    chat = llm.load_chat(tmp_path / "chat")
    assert chat.messages == ({"role": "system", "content": SYSTEM},) and chat.tokens_held == 0


def document(llm):
    return [{"role": "system", "content": SYSTEM}]


def questions(llm):
    return [[*document(llm), {"role": "user", "content": q}] for q in ("x", "what", "and so on")]


@pytest.mark.parametrize("cached", [False, True])
def test_a_saved_prefix_is_found_by_later_calls(base, llm, tmp_path, cached):
    want = llm.generate(questions(llm), params(llm)) if cached else None
    llm.save_prefix(document(llm), tmp_path / "prefix")
    assert held(llm) == 0
    want = want or llm.generate(questions(llm), params(llm))
    other = empty(base)
    with other.load_prefix(tmp_path / "prefix") as loaded:
        # Without the opening of an answer, which these questions do not go on with.
        tokens = llm.tokenizer.encode(f"system: {SYSTEM}\n")
        assert loaded.tokens == tuple(tokens[: len(tokens) // SIZE * SIZE])
        assert held(other) == len(loaded.pages) == len(tokens) // SIZE
        answers, new = computed(other, lambda: other.generate(questions(llm), params(llm)))
        assert answers == want
        prompts = [answer.prompt_tokens for answer in answers]
        assert new <= sum(prompts) - 3 * len(loaded.tokens)
        for seed in range(4):  # nor is it evicted
            other.generate([[seed] * 150], params(llm, max_tokens=2))
        _, new = computed(other, lambda: other.generate(questions(llm)[:1], params(llm)))
        assert new == prompts[0] - len(loaded.tokens)
    assert held(other) == 0


def test_the_file_of_a_prefix_is_a_cache_like_any_other(llm, tmp_path):
    llm.save_prefix(list(range(43)), tmp_path / "p")
    saved = load_cache(tmp_path / "p")
    assert saved.tokens == (tuple(range(40)),)
    assert (saved.table.length == 40).all() and saved.table.position.tolist() == [40]
    assert saved.table.pages[0, 0, 0, :11].tolist() == [*range(10), 10]


def test_what_is_cached_is_not_computed_to_be_saved(llm, tmp_path):
    tokens = list(range(43))
    saved, new = computed(llm, lambda: llm.save_prefix(tokens, tmp_path / "p"))
    assert (saved, new) == (40, 43)
    saved, new = computed(llm, lambda: llm.save_prefix(tokens[:41], tmp_path / "p"))
    assert (saved, new) == (40, 0)


def test_a_prefix_that_is_partly_there_brings_the_rest(base, llm, tmp_path):
    tokens = list(range(40))
    llm.save_prefix(tokens, tmp_path / "p")
    want = llm.generate([[*tokens, 7]], params(llm))
    other = empty(base)
    other.generate([tokens[:21]], params(llm, max_tokens=1))
    before = other.engine.planner.ledger.available
    with other.load_prefix(tmp_path / "p") as a, other.load_prefix(tmp_path / "p") as b:
        assert (
            a.pages == b.pages and held(other) == 10 == 64 - other.engine.planner.ledger.available
        )
        assert other.generate([[*tokens, 7]], params(llm)) == want
    assert other.engine.planner.ledger.available == before


def test_a_prefix_needs_a_page_and_room(base, llm, tmp_path):
    with pytest.raises(InputError, match="3 tokens, fewer than a page of 4"):
        llm.save_prefix([1, 2, 3], tmp_path / "p")
    with pytest.raises(InputError, match="empty"):
        llm.save_prefix([], tmp_path / "p")
    llm.save_prefix(list(range(80)), tmp_path / "p")
    small = empty(base, num_pages=19)
    with pytest.raises(InputError, match="p: asked for 20 pages, 19 of 19 available"):
        small.load_prefix(tmp_path / "p")
    assert held(small) == 0
    # What was taken for it cannot be found by others.
    assert computed(small, lambda: small.generate([list(range(40))]))[1] == 40


def test_a_copy_that_fails_leaves_nothing_to_be_found(base, llm, tmp_path, monkeypatch):
    tokens = list(range(40))
    llm.save_prefix(tokens, tmp_path / "p")
    want = llm.generate([[*tokens, 7]], params(llm))
    other = empty(base)
    monkeypatch.setattr(prefix, "put_pages", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        other.load_prefix(tmp_path / "p")
    assert held(other) == 0
    answers, new = computed(other, lambda: other.generate([[*tokens, 7]], params(llm)))
    assert answers == want and new == 41


def test_pages_are_taken_only_while_nothing_runs(llm, tmp_path):
    llm.save_prefix(list(range(80)), tmp_path / "p")
    stream = llm.stream([[1, 2, 3]], params(llm, max_tokens=40))
    next(stream)
    for use in (lambda: llm.load_prefix(tmp_path / "p"), lambda: llm.save_prefix([1] * 9, "p"),
                lambda: llm.load_chat(tmp_path / "p"), lambda: llm.chat().send("x")):  # fmt: skip
        with pytest.raises(InputError, match="unfinished"):
            use()
    stream.close()
    assert held(llm) == 0


def test_files_of_other_models_and_page_sizes_are_refused(base, llm, tmp_path):
    llm.save_prefix(list(range(80)), tmp_path / "p")
    with pytest.raises(InputError, match="holds a saved prefix, not a saved chat"):
        llm.load_chat(tmp_path / "p")
    other = LLM(copy.copy(base.engine), base.tokenizer)
    other.engine._params = models_for_tests.random_decoder(seed=1)[1]
    with pytest.raises(InputError, match="another model"):
        other.load_prefix(tmp_path / "p")
    models_for_tests.save_model(tmp_path)
    paged = LLM.load(tmp_path, max_rows=1, page_size=8, max_length=64)
    with pytest.raises(InputError, match="page_size=4, those here page_size=8"):
        paged.load_prefix(tmp_path / "p")
    short = LLM.load(tmp_path, max_rows=1, page_size=4, max_length=64)
    with pytest.raises(InputError, match="has 80 tokens but a sequence holds 64"):
        short.load_prefix(tmp_path / "p")
