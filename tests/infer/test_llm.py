"""The whole way: a folder of weights, prompts in, answers out, against a dense recompute."""

import gc
import shutil

import jax
import jax.numpy as jnp
import models_for_tests
import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.infer import LLM, SamplingParams
from kvjax.infer.compilations import CompilationCount

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    models_for_tests.save_model(path)
    return path


@pytest.fixture(scope="module")
def llm(folder):
    llm = LLM.load(folder, max_rows=8, page_size=4)
    return models_for_tests.with_grid(llm, row_buckets=(8,), token_buckets=(96,))


@pytest.fixture(scope="module")
def logits(folder):
    graph, params = models_for_tests.random_decoder()
    return models_for_tests.dense_logits(graph, params)


def prompts(n, seed=0, shared=40):
    """Token ids: n prompts over two documents."""
    rng = np.random.default_rng(seed)
    documents = rng.integers(0, 256, (2, shared)).tolist()
    return [documents[i % 2] + rng.integers(0, 256, 1 + 3 * i).tolist() for i in range(n)]


def assert_greedy(logits, prompt, token_ids):
    """Every token is the likeliest, or so close to it that float32 cannot tell (1e-3)."""
    sequence = np.zeros((1, 128), np.int32)
    sequence[0, : len(prompt) + len(token_ids)] = [*prompt, *token_ids]
    scores = np.asarray(logits(sequence))[0]
    for i, token in enumerate(token_ids):
        row = scores[len(prompt) + i - 1]
        assert row[token] >= row.max() - 1e-3, f"token {i}: {token} instead of {row.argmax()}"


def test_greedy_answers_equal_a_dense_recompute(llm, logits):
    """Rows that share prefixes, rows that wait for seats, chunks: same tokens as one by one."""
    many = prompts(14)
    before = llm.engine.planner.prefill_tokens_computed
    answers = llm.generate(many, GREEDY)
    for prompt, answer in zip(many, answers, strict=True):
        assert len(answer.token_ids) == 20 and answer.finish_reason == "length"
        assert answer.prompt_tokens == len(prompt)
        assert_greedy(logits, prompt, answer.token_ids)
    computed = llm.engine.planner.prefill_tokens_computed - before
    assert computed == sum(map(len, many)) - 12 * 40  # two of 14 compute the documents
    assert llm.engine.planner.ledger.held == 0


@pytest.mark.slow
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_chunked_prefill_equals_whole_prefill(folder, logits, budget):
    """Prompts in chunks of at most 1, 7 and 64 tokens, windows straddling them."""
    llm = LLM.load(folder, max_rows=1, page_size=4)
    llm = models_for_tests.with_grid(llm, token_buckets=(budget,), tile_queries=5, split_pages=2)
    prompt = prompts(7)[6]
    (answer,) = llm.generate(prompt, GREEDY)
    assert_greedy(logits, prompt, answer.token_ids)


def test_a_second_call_finds_the_first_ones_pages(llm):
    prompt = prompts(1, seed=5)[0]
    first = llm.generate(prompt, GREEDY)
    before = llm.engine.planner.prefill_tokens_computed
    assert llm.generate(prompt, GREEDY) == first
    # 41 tokens: all whole pages before the last token are found.
    assert llm.engine.planner.prefill_tokens_computed - before == 1


def test_nothing_compiles_after_warm_up(llm):
    rng = np.random.default_rng(1)
    with CompilationCount() as compiled:
        for seed in range(3):
            params = [
                SamplingParams(
                    max_tokens=int(rng.integers(1, 9)),
                    temperature=float(rng.choice([0.0, 0.7])),
                    top_p=float(rng.choice([1.0, 0.9])),
                    seed=seed,
                )
                for _ in range(11)
            ]
            llm.generate(prompts(11, seed=seed), params)
    assert compiled.count == 0


def test_compilations_are_counted():
    with CompilationCount() as compiled:
        jax.jit(lambda x: x * 3 + 41)(jnp.ones(7))
    assert compiled.count >= 1


def test_draws_depend_on_seed_and_position_alone(llm):
    """The same request draws the same tokens alone, in company, and in another order."""
    many = prompts(9, seed=2)
    params = [SamplingParams(max_tokens=12, temperature=0.8, seed=i) for i in range(9)]
    together = llm.generate(many, params)
    alone = [llm.generate(p, q)[0] for p, q in zip(many, params, strict=True)]
    backwards = llm.generate(many[::-1], params[::-1])[::-1]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.token_ids for a in together] == [a.token_ids for a in backwards]
    other = llm.generate(many[0], SamplingParams(max_tokens=12, temperature=0.8, seed=99))
    assert other[0].token_ids != together[0].token_ids


def test_streamed_pieces_make_the_text_and_an_early_end_frees_the_pages(llm):
    pieces = {}
    for chunk in llm.stream(["first words", "others: äöü"], GREEDY):
        pieces[chunk.index] = pieces.get(chunk.index, "") + chunk.text
        if chunk.completion:
            assert pieces[chunk.index] == chunk.completion.text
    assert len(pieces) == 2
    stream = llm.stream(prompts(12), GREEDY)
    before = gc.get_freeze_count()  # since Python 3.12 some objects always are
    next(stream)
    assert gc.get_freeze_count() > before + 1000  # what was there is spared while it runs
    with pytest.raises(InputError, match="unfinished"):
        llm.generate("meanwhile")
    assert llm.engine.planner.ledger.held > 0
    stream.close()
    assert gc.get_freeze_count() <= before
    assert llm.engine.planner.ledger.held == 0 and not llm.engine.planner.busy


def test_prompts_as_text_ids_and_chats(llm):
    text = llm.generate("user: hello\n", GREEDY)[0]
    ids = llm.generate(llm.tokenizer.encode("user: hello\n"), GREEDY)[0]
    chat = llm.generate([{"role": "user", "content": "hello"}], GREEDY)[0]
    assert text == ids == chat
    assert llm.generate(["user: hello\n", [1, 2]], GREEDY)[0] == text


def test_an_end_token_ends_the_answer(llm):
    (long,) = llm.generate([5, 6, 7], GREEDY)
    end = long.token_ids[4]
    first = long.token_ids.index(end)
    ending = LLM(llm.engine, llm.tokenizer, eos_ids=[end])
    (short,) = ending.generate([5, 6, 7], SamplingParams(max_tokens=20))
    assert short.token_ids == long.token_ids[: first + 1] and short.finish_reason == "stop"


def test_what_cannot_be_answered_is_refused_before_anything_runs(llm):
    with pytest.raises(InputError, match="300 tokens but a sequence holds 256"):
        llm.generate([[1, 2], [0] * 300])
    with pytest.raises(InputError, match="empty"):
        llm.generate([[]])
    with pytest.raises(InputError, match="outside"):
        llm.generate([1, 300])
    with pytest.raises(InputError, match="2 sampling parameters for 1 prompts"):
        llm.generate("a", [GREEDY, GREEDY])
    assert not llm.engine.planner.busy


def test_memory_bounds_the_pages(folder):
    page = 2 * 3 * 2 * 4 * 16 * 4  # k and v, layers, heads, tokens, head size, bytes
    llm = LLM.load(folder, max_rows=2, page_size=4, kv_memory=10 * page + 5000)
    cache = llm.engine.cache
    assert 10 * page <= cache.nbytes("cpu") <= 10 * page + 5000
    with pytest.raises(InputError, match="hold no page"):
        LLM.load(folder, max_rows=2, page_size=4, kv_memory=page)


def test_unknown_models_are_named():
    with pytest.raises(InputError, match="no model 'nowhere'"):
        LLM.load("nowhere")


@pytest.mark.slow
def test_a_folder_without_a_tokenizer_answers_token_ids(llm, folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path)
    bare = LLM.load(tmp_path, max_rows=1, page_size=4, token_budget=64)
    (answer,) = bare.generate([5, 6, 7], GREEDY)
    assert answer.token_ids == llm.generate([5, 6, 7], GREEDY)[0].token_ids and answer.text == ""
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        bare.generate("hello")


def test_what_is_wrong_with_the_model_is_said_first(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(InputError, match="BertModel"):
        LLM.load(tmp_path)


@pytest.mark.slow
def test_bfloat16_answers(folder):
    """The same engine in half the bytes; its answers are near the float32 ones, not equal."""
    llm = LLM.load(
        folder, dtype="bfloat16", max_rows=1, page_size=4, max_length=64, token_budget=32
    )
    assert llm.engine.state.pool.k.dtype == jnp.bfloat16
    (answer,) = llm.generate([5, 6, 7], GREEDY)
    assert len(answer.token_ids) == 20
