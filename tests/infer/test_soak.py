"""Thousands of random requests in too little memory: no page is lost, and no answer changes.

`KVJAX_SOAK=10000 pytest -n 0 -s tests/infer/test_soak.py` runs as many requests as it says, and
prints what happened; without it there are a thousand.
"""

import gc
import os
import random
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kvjax.infer import LLM, SamplingParams

pytestmark = pytest.mark.slow

REQUESTS = int(os.environ.get("KVJAX_SOAK", "1000"))
BATCH = 125
DISTINCT = 300
PAGES = 38  # of 2 tokens: a request may need 36 of them, and eight run at a time
# Log-probabilities of order 1 to 10 from float32 sums in other orders: differences of 1e-6.
TOL = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def llm():
    sizes = {"max_length": 80, "max_rows": 8, "page_size": 2, "token_budget": 64}
    cache = LLM.load("tiny", **sizes).engine.cache
    memory = cache.nbytes("cpu") - (cache.num_pages - PAGES) * cache.page_bytes("cpu")
    llm = LLM.load("tiny", **sizes, kv_memory=memory, optimistic=True)
    assert llm.engine.planner.ledger.num_pages == PAGES
    llm.engine.warm_up()
    return llm


def random_params(rng, words):
    """Any mixture of options; a seed of its own, so that its place in a call does not matter."""
    penalties = rng.random() < 0.3
    return SamplingParams(
        max_tokens=rng.choice([1, 2, 5, 12, 12]),
        min_tokens=rng.choice([0, 0, 1]),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        top_k=rng.choice([0, 0, 20]),
        top_p=rng.choice([1.0, 1.0, 0.9]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.2]) if penalties else 1.0,
        presence_penalty=rng.choice([0.0, 0.5]) if penalties else 0.0,
        frequency_penalty=rng.choice([0.0, 0.5]) if penalties else 0.0,
        logit_bias={rng.randrange(300): 3.0} if rng.random() < 0.2 else {},
        seed=rng.randrange(2**32),
        stop=tuple(rng.sample(words, 2)) if rng.random() < 0.3 else (),
        stop_ids=(rng.randrange(300),) if rng.random() < 0.2 else (),
        ignore_eos=rng.random() < 0.5,
        logprobs=rng.choice([0, 3]) if rng.random() < 0.2 else None,
        prompt_logprobs=rng.choice([0, 2]) if rng.random() < 0.1 else None,
    )


def random_requests(llm, rng):
    """(prompt, params): prompts of 5 to 60 tokens that begin in one of a few documents."""
    documents = [[rng.randrange(512) for _ in range(40)] for _ in range(4)]
    words = [llm.tokenizer.decode([token]) or "x" for token in range(60, 90)]
    requests = []
    for _ in range(DISTINCT):
        length = rng.randint(5, rng.choice([8, 16, 60]))  # short ones: more run at a time
        shared = rng.choice(documents)[: rng.randint(3, length - 1)]
        prompt = shared + [rng.randrange(512) for _ in range(length - len(shared))]
        requests.append((prompt, random_params(rng, words)))
    return requests


def unhurried(llm, requests):
    """The answers when each has all of memory to itself."""
    llm.engine.planner.optimistic = False  # nothing that has begun is thrown out
    answers = [llm.generate([prompt], params)[0] for prompt, params in requests]
    llm.engine.planner.optimistic = True
    assert llm.engine.planner.preemptions == 0
    return answers


def hurried(llm, requests, rng, give_up):
    """Answers as they come, by their place; some are cancelled, perhaps all of them at once."""
    running = [llm._request(i, 0, tuple(prompt), params) for i, (prompt, params) in
               enumerate(requests)]  # fmt: skip
    unfinished = {answer.index: request.id for request, answer in running}
    texts, answers, cancelled = [""] * len(requests), {}, set()
    stream = llm._run(running)
    for chunk in stream:
        texts[chunk.index] += chunk.text
        if chunk.completion:
            answers[chunk.index] = chunk.completion
            unfinished.pop(chunk.index, None)
        if give_up and len(answers) > len(requests) // 2:
            stream.close()
            cancelled |= unfinished.keys()
        elif unfinished and rng.random() < 0.02:
            index = rng.choice(sorted(unfinished))
            llm.engine.planner.cancel([unfinished.pop(index)])
            cancelled.add(index)
    assert answers.keys() | cancelled == set(range(len(requests)))
    return texts, answers, cancelled


def values(logprobs):
    """All numbers in log-probabilities. Not the tokens: equal ones may come in any order."""
    known = [entry for entry in logprobs or () if entry is not None]
    return [x for entry in known for x in (entry.logprob, *(value for _, value in entry.top))]


def assert_same(got, want):
    for name in ("token_ids", "text", "finish_reason", "prompt_tokens"):
        assert getattr(got, name) == getattr(want, name), (name, got, want)
    for name in ("logprobs", "prompt_logprobs"):
        np.testing.assert_allclose(values(getattr(got, name)), values(getattr(want, name)), **TOL)


def memory():
    """Bytes of the process, where the system says so; Python's live blocks; live arrays."""
    gc.collect()
    statm = Path("/proc/self/statm")
    pages = int(statm.read_text().split()[1]) if statm.exists() else 0
    return pages * 4096, sys.getallocatedblocks(), len(jax.live_arrays())


def test_soak(llm):
    rng, planner, history = random.Random(0), llm.engine.planner, []
    requests = random_requests(llm, rng)
    start = time.perf_counter()
    want = unhurried(llm, requests)
    between = time.perf_counter()
    cancels = 0
    for batch in range(-(-REQUESTS // BATCH)):
        picked = [rng.randrange(DISTINCT) for _ in range(BATCH)]
        texts, answers, cancelled = hurried(
            llm, [requests[i] for i in picked], rng, give_up=batch % 8 == 5
        )
        for place, index in enumerate(picked):
            assert want[index].text.startswith(texts[place])
            if place in answers:
                assert_same(answers[place], want[index])
        cancels += len(cancelled)
        assert planner.ledger.held == 0 and planner.ledger.available == PAGES
        assert not planner.busy and len(planner._free_seats) == 8
        history.append(memory())
    seconds = time.perf_counter() - between
    assert planner.preemptions > REQUESTS / 50 and cancels > REQUESTS / 50
    print(f"{len(history) * BATCH} requests in {seconds:.0f} s ({between - start:.0f} s for the "
          f"unhurried ones), {planner.preemptions} preemptions, {cancels} cancelled, "
          f"peak {planner.ledger.peak} of {PAGES} pages; bytes, blocks, arrays: "
          f"{history[0]} {history[len(history) // 4]} {history[-1]}")  # fmt: skip
    assert_flat(history[len(history) // 4 :])


def assert_flat(history):
    """After the first quarter nothing grows with the number of requests."""
    first, last = history[0], history[-1]
    assert last[2] == first[2]
    assert last[1] - first[1] < 2000  # a leak of one object a request would be more
    assert last[0] - first[0] < 8 * 2**20
