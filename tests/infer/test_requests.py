"""What requests may ask for, through the whole engine: every option, whoever else is there."""

import dataclasses

import jax
import jax.numpy as jnp
import models_for_tests
import numpy as np
import pytest

from kvjax.errors import InputError
from kvjax.infer import LLM, SamplingParams
from kvjax.infer.compilations import CompilationCount, NoCompilation, UnexpectedCompilation

GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    models_for_tests.save_model(path)
    return path


def load(folder, **sizes):
    """The model behind an engine of few shapes."""
    llm = LLM.load(folder, max_rows=8, page_size=4)
    sizes = {"row_buckets": (8,), "token_buckets": (96,), **sizes}
    return models_for_tests.with_grid(llm, **sizes)


@pytest.fixture(scope="module")
def llm(folder):
    return load(folder)


@pytest.fixture(scope="module")
def logprobs():
    """Log-probabilities float64[T, V] of what follows each token, without a cache."""
    logits = models_for_tests.dense_logits(*models_for_tests.random_decoder())

    def of(tokens):
        sequence = np.zeros((1, 128), np.int32)
        sequence[0, : len(tokens)] = tokens
        return jax.nn.log_softmax(logits(sequence)[0, : len(tokens)].astype(jnp.float32))

    return lambda tokens: np.asarray(of(tokens))


def random_requests(n, seed):
    """Prompts over two documents, and parameters that ask for anything there is."""
    rng = np.random.default_rng(seed)
    documents = rng.integers(0, 256, (2, 24)).tolist()
    prompts, params = [], []
    for _ in range(n):
        part = documents[rng.integers(2)][: rng.integers(25)]
        prompts.append(part + rng.integers(0, 256, rng.integers(1, 12)).tolist())
        params.append(
            SamplingParams(
                max_tokens=int(rng.integers(1, 14)),
                min_tokens=int(rng.integers(0, 2)),
                temperature=float(rng.choice([0.0, 0.7, 1.5])),
                top_k=int(rng.choice([0, 3, 40])),
                top_p=float(rng.choice([1.0, 0.9, 0.3])),
                min_p=float(rng.choice([0.0, 0.05])),
                repetition_penalty=float(rng.choice([1.0, 1.2])),
                presence_penalty=float(rng.choice([0.0, 0.5])),
                frequency_penalty=float(rng.choice([0.0, 0.5])),
                logit_bias={int(rng.integers(256)): 2.0} if rng.random() < 0.3 else {},
                seed=int(rng.integers(2**32)),
                stop=(chr(rng.integers(97, 123)),) if rng.random() < 0.3 else (),
                stop_ids=(int(rng.integers(256)),) if rng.random() < 0.3 else (),
                ignore_eos=bool(rng.random() < 0.5),
                logprobs=int(rng.integers(4)) if rng.random() < 0.3 else None,
                prompt_logprobs=int(rng.integers(4)) if rng.random() < 0.2 else None,
            )
        )
    return prompts, params


def test_500_random_requests_compile_nothing(llm):
    """Every option is data. The count is of anything, by anybody; the engine also forbids it."""
    prompts, params = random_requests(500, seed=0)
    with CompilationCount() as compiled:
        answers = llm.generate(prompts, params)
    assert compiled.count == 0 and len(answers) == 500
    assert llm.engine.planner.ledger.held == 0


def test_a_compilation_after_the_warm_up_is_an_error():
    with pytest.raises(UnexpectedCompilation, match="after the warm-up"), NoCompilation():
        jax.jit(lambda x: x * 5 + 43)(jnp.ones(7))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"token_buckets": (8,), "tile_queries": 5},
        {"decode_steps": 1, "split_pages": 2},
        {"row_buckets": (2, 8), "token_buckets": (16, 64)},
        {"num_pages": 24, "optimistic": True},
        {"fixed": True, "decode_steps": 4},
    ],
    ids=["chunks", "steps", "buckets", "preemption", "fixed"],
)
def test_an_answer_does_not_depend_on_anything_but_its_request(folder, llm, sizes):
    """Other company, order, chunks, calls, shapes, and being thrown out: the same tokens."""
    prompts, params = random_requests(40, seed=1)
    expected = llm.generate(prompts, params)
    other = load(folder, **sizes)
    order = np.random.default_rng(2).permutation(40)
    shuffled = other.generate([prompts[i] for i in order], [params[i] for i in order])
    for i, answer in zip(order, shuffled, strict=True):
        assert (answer.token_ids, answer.text) == (expected[i].token_ids, expected[i].text)
        assert answer.finish_reason == expected[i].finish_reason
        for a, b in ((answer.logprobs, expected[i].logprobs),
                     (answer.prompt_logprobs, expected[i].prompt_logprobs)):  # fmt: skip
            assert [x and x.token for x in a or ()] == [x and x.token for x in b or ()]
            # float32 sums in another order: the last places of numbers around 10.
            np.testing.assert_allclose(
                [x.logprob for x in a or () if x], [x.logprob for x in b or () if x], atol=1e-4
            )
    if sizes.get("optimistic"):
        assert other.engine.planner.preemptions > 0
    assert other.engine.planner.ledger.held == 0


def test_log_probabilities_are_the_models_own(llm, logprobs):
    """Of drawn tokens and of the prompt's, with the likeliest beside them; before any penalty."""
    prompt = [5, 6, 7, 8, 9, 10]
    params = SamplingParams(
        max_tokens=6, temperature=1.0, presence_penalty=1.0, ignore_eos=True, logprobs=3,
        prompt_logprobs=2,
    )  # fmt: skip
    (answer,) = llm.generate([prompt], params)
    exact = logprobs([*prompt, *answer.token_ids])
    assert answer.prompt_logprobs[0] is None
    both = [*answer.prompt_logprobs[1:], *answer.logprobs]
    assert [x.token for x in both] == [*prompt[1:], *answer.token_ids]
    for place, x in enumerate(both):
        # Pages against a dense product in float32: the last places of numbers around 10.
        assert abs(x.logprob - exact[place, x.token]) < 1e-4
        best = np.argsort(-exact[place])[: len(x.top)]
        np.testing.assert_allclose([p for _, p in x.top], exact[place, best], atol=1e-4)
        assert len(x.top) == (2 if place < 5 else 3)


def test_a_prompt_may_be_scored_without_an_answer(llm, logprobs):
    prompt = list(range(60, 90))
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    for _ in range(2):  # the second time its pages are known; the scores are computed all the same
        (answer,) = llm.generate([prompt], params)
        assert answer.token_ids == () and answer.finish_reason == "length"
        exact = logprobs(prompt)[np.arange(29), prompt[1:]]
        np.testing.assert_allclose(
            [x.logprob for x in answer.prompt_logprobs[1:]], exact, atol=1e-4
        )


def test_several_answers_to_one_prompt(llm):
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=7, n=3, ignore_eos=True)
    several = llm.generate(["user: a", "user: b"], params)
    single = dataclasses.replace(params, n=1)
    alone = [
        llm.generate(prompt, dataclasses.replace(single, seed=seed))[0]
        for prompt in ("user: a", "user: b")
        for seed in (7, 8, 9)
    ]
    assert several == alone and len({a.token_ids for a in several}) == 6


def test_texts_that_end_an_answer(llm):
    """The text is cut before the first of them, and no piece shows what is cut later."""
    prompt = [3, 4]
    (whole,) = llm.generate([prompt], dataclasses.replace(GREEDY, max_tokens=60))
    text = whole.text
    middle = len(text) // 2
    stop = text[middle : middle + 3]
    first = text.find(stop)
    params = dataclasses.replace(GREEDY, max_tokens=60, stop=("never there", stop))
    pieces = list(llm.stream([prompt], params))
    completion = pieces[-1].completion
    assert completion.text == text[:first] == "".join(piece.text for piece in pieces)
    assert completion.finish_reason == "stop"
    assert completion.token_ids == whole.token_ids[: len(completion.token_ids)]
    assert llm.engine.planner.ledger.held == 0


def test_no_end_before_min_tokens(llm):
    (free,) = llm.generate([[5, 6, 7]], GREEDY)
    params = dataclasses.replace(GREEDY, stop_ids=free.token_ids[:1])
    (short,) = llm.generate([[5, 6, 7]], params)
    assert short.token_ids == free.token_ids[:1] and short.finish_reason == "stop"
    (longer,) = llm.generate([[5, 6, 7]], dataclasses.replace(params, min_tokens=6))
    assert free.token_ids[0] not in longer.token_ids[:6] and len(longer.token_ids) >= 6


def test_a_bias_decides(llm):
    params = SamplingParams(max_tokens=3, logit_bias={65: 100.0}, ignore_eos=True)
    assert llm.generate([[5, 6, 7]], params)[0].token_ids == (65, 65, 65)


def test_what_cannot_be_asked_for_is_said(llm):
    with pytest.raises(InputError, match=r"logit_bias has token ids outside of 0\.\.299"):
        llm.generate([[1]], SamplingParams(logit_bias={300: 1.0}))
    with pytest.raises(InputError, match="more than 32 tokens may end"):
        llm.generate([[1]], SamplingParams(stop_ids=tuple(range(33))))
    bare = LLM(llm.engine, None)
    with pytest.raises(InputError, match="stop_ids, not stop"):
        bare.generate([[1]], SamplingParams(stop=("x",)))
