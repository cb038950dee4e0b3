"""The batch form: every option read, and answers as clients of OpenAI and vLLM read them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.infer import Completion, SamplingParams, TokenLogprob
from kvjax.infer.batch_form import BatchRequest, read_requests
from kvjax.infer.batch_records import TokenNames, answer_record
from kvjax.models.tokenizer import TextStream

CHAT, COMPLETIONS, SCORE = "/v1/chat/completions", "/v1/completions", "/v1/score"
TWO = {"logprobs": True, "top_logprobs": 2}
HELLO = [{"role": "user", "content": "hello"}]


def parse(tmp_path, url, **body):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"custom_id": "x", "url": url, "body": body}))
    (request,) = read_requests(path)
    return request


def parse_line(tmp_path, line):
    path = tmp_path / "in.jsonl"
    path.write_bytes(line)
    (request,) = read_requests(path)
    return request


EVERYTHING = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "presence_penalty": 0.2,
    "frequency_penalty": -0.3, "repetition_penalty": 1.1, "seed": 11, "n": 3, "stop": ["a", "b"],
    "stop_token_ids": [4, 5], "min_tokens": 2, "logit_bias": {"7": -100, "8": 1.5},
    "ignore_eos": True, "prompt_logprobs": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("url", "own"),
    [
        (
            CHAT,
            {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_completion_tokens": 9},
        ),
        (COMPLETIONS, {"prompt": "hello", "logprobs": 2, "max_tokens": 9, "best_of": 3}),
    ],
)
def test_every_sampling_option_arrives(tmp_path, url, own):
    request = parse(tmp_path, url, **EVERYTHING, **own)
    assert request.error is None
    assert request.params == SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, presence_penalty=0.2,
        frequency_penalty=-0.3, repetition_penalty=1.1, seed=11, n=3, stop=("a", "b"),
        stop_ids=(4, 5), min_tokens=2, logit_bias={7: -100.0, 8: 1.5}, ignore_eos=True,
        prompt_logprobs=4, logprobs=2,
    )  # fmt: skip


def test_what_is_not_said_is_the_forms_default(tmp_path):
    """Draws from the model's distribution; completions of 16 tokens, chats until they end."""
    chat = parse(tmp_path, CHAT, messages=HELLO, stop=None, logprobs=False, n=None)
    assert chat.params == SamplingParams(max_tokens=None, temperature=1.0)
    completion = parse(tmp_path, COMPLETIONS, prompt=[1, 2], stop=[], logprobs=None, top_k=-1)
    assert completion.params == SamplingParams(max_tokens=16, temperature=1.0)
    assert parse(tmp_path, COMPLETIONS, prompt="", stop="x").params.stop == ("x",)


def test_messages_in_parts_are_joined(tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = parse(tmp_path, CHAT, messages=[{"role": "user", "content": parts}])
    assert request.prompt == [{"role": "user", "content": "one\ntwo"}]


@pytest.mark.parametrize(
    ("url", "body", "said"),
    [
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, '"top_logprobs" needs'),
        (CHAT, {"messages": HELLO, "logprobs": 2}, "must be true or false"),
        (CHAT, {"messages": HELLO, "prompt": "x"}, '"prompt"'),
        (CHAT, {"messages": HELLO, "tools": [{}]}, '"tools"'),
        (CHAT, {"messages": HELLO, "echo": True}, '"echo"'),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        (COMPLETIONS, {"prompt": "x", "best_of": 2}, '"best_of"'),
        (COMPLETIONS, {"prompt": "x", "n": 0}, "n must be from 1"),
        (COMPLETIONS, {"prompt": "x", "n": True}, '"n" must be an integer'),
        (COMPLETIONS, {"prompt": "x", "logprobs": 21}, "logprobs must be from 0 to 20"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens must be 1"),
        (COMPLETIONS, {"prompt": "x", "stop": [1]}, '"stop"'),
        (COMPLETIONS, {"prompt": "x", "stop": [""]}, "not empty"),
        (COMPLETIONS, {"prompt": "x", "stop_token_ids": ["1"]}, '"stop_token_ids"'),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"the": 1}}, '"logit_bias"'),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {"1": "2"}}, '"logit_bias"'),
        (COMPLETIONS, {"prompt": "x", "temperature": float("nan")}, "temperature must be"),
        (COMPLETIONS, {"prompt": "x", "top_p": 10**400}, "too large"),
        (COMPLETIONS, {"prompt": "half \ud800"}, "surrogate"),
        (SCORE, {"prompt": "x"}, '"continuation"'),
        (SCORE, {"prompt": "x", "continuation": "y", "temperature": 1}, '"temperature"'),
    ],
)
def test_what_would_not_be_honoured_is_refused(tmp_path, url, body, said):
    assert said in parse(tmp_path, url, **body).error


@given(line=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_no_line_ends_the_reading(tmp_path_factory, line):
    """Whatever a line holds, it is a request or its error; only files without lines are refused."""
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(line)
    try:
        requests = read_requests(path)
    except InputError as e:
        assert "no requests" in str(e)
        return
    assert all(isinstance(request.error, str) for request in requests)


def test_nested_lines_are_errors_too(tmp_path):
    assert "nested" in parse_line(tmp_path, b"[" * 100_000).error


class Letters:
    """A tokenizer whose token 7 is the letter 'h', and so on; 0 is the end of a text."""

    def decode(self, ids, *, skip_special=True):
        return "".join("abcdefghij"[i] if i else "" if skip_special else "<end>" for i in ids)

    def stream(self):
        return TextStream(self.decode)


def answer(request, *, ids=False, **completion):
    names = TokenNames(Letters(), ids=ids)
    done = Completion(
        text="dc", token_ids=(3, 2, 0), finish_reason="stop", prompt_tokens=2, **completion
    )
    return answer_record(request, (1, 2), [done], names, "m")["response"]["body"]


OWN = (
    TokenLogprob(3, -0.5, ((3, -0.5), (4, -1.5))),
    TokenLogprob(2, -2.5, ((1, -0.25), (5, -3.0))),
    TokenLogprob(0, float("-inf"), ((1, -0.125), (3, -4.0))),
)
PROMPT = (None, TokenLogprob(2, -3.5, ((6, -0.75), (2, -3.5))))


def test_log_probabilities_of_a_chat():
    body = answer(BatchRequest(1, "x", CHAT, params=SamplingParams(logprobs=2)), logprobs=OWN)
    (choice,) = body["choices"]
    first, _, last = choice["logprobs"]["content"]
    assert first == {
        "token": "d", "logprob": -0.5, "bytes": [100],
        "top_logprobs": [
            {"token": "d", "logprob": -0.5, "bytes": [100]},
            {"token": "e", "logprob": -1.5, "bytes": [101]},
        ],
    }  # fmt: skip
    assert (last["token"], last["logprob"]) == ("<end>", -9999.0)  # JSON has no infinity
    assert choice["message"] == {"role": "assistant", "content": "dc"}
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_log_probabilities_of_a_completion_that_echoes_its_prompt():
    request = BatchRequest(
        1, "x", COMPLETIONS, "bc", SamplingParams(logprobs=1, prompt_logprobs=1), echo=True
    )
    (choice,) = answer(request, logprobs=OWN, prompt_logprobs=PROMPT)["choices"]
    assert choice["text"] == "bcdc"
    assert choice["logprobs"] == {
        "tokens": ["b", "c", "d", "c", "<end>"],
        "token_logprobs": [None, -3.5, -0.5, -2.5, -9999.0],
        "top_logprobs": [
            None, {"g": -0.75, "c": -3.5}, {"d": -0.5}, {"b": -0.25, "c": -2.5},
            {"b": -0.125, "<end>": -9999.0},
        ],
        "text_offset": [0, 1, 2, 3, 4],
    }  # fmt: skip


def test_log_probabilities_of_the_prompt_as_vllm_writes_them():
    expected = [
        None,
        {
            "2": {"logprob": -3.5, "rank": 2, "decoded_token": "c"},
            "6": {"logprob": -0.75, "rank": 1, "decoded_token": "g"},
        },
    ]
    for url in (CHAT, COMPLETIONS):
        body = answer(BatchRequest(1, "x", url, prompt_logprobs=1), prompt_logprobs=PROMPT)
        holder = body if url == CHAT else body["choices"][0]
        assert holder["prompt_logprobs"] == expected


def test_scores_and_names_by_id():
    request = BatchRequest(1, "x", SCORE, continuation="c")
    body = answer(request, ids=True, prompt_logprobs=PROMPT)
    assert body["object"] == "score" and "choices" not in body
    assert (body["logprob"], body["token_logprobs"]) == (-3.5, [-3.5])
    assert body["tokens"] == ["token_id:2"]
