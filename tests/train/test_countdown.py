"""The game Countdown: its problems, its judge, and what a model is shown of it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.models.countdown.game import (
    DEEP_ENDS,
    Problem,
    calculate,
    judge,
    problem,
    read_problem,
    state_key,
)
from kvjax.train.chat import train_tokenizer
from kvjax.train.lm import encode_batch
from kvjax.train.lm_config import read_config
from kvjax.train.tasks import Mixture
from kvjax.train.tasks.encode import ChatEncoder

ASKED = Problem((3, 7, 10, 2, 5), 24)
PLAY = "3*7=21:10 2 5 21;10/2=5:5 21 5;21+5=26:5 26;"
SOLVED = "3*7=21:10 2 5 21;10/5=2:2 21 2;2/2=1:21 1;"


@given(st.integers(0, 2**31), st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_every_problem_has_a_legal_play_that_the_judge_knows(seed, index):
    asked, play = problem(seed, index)
    assert judge(asked, play)
    assert len(asked.numbers) == 5
    assert all(1 <= n <= 20 for n in asked.numbers)
    assert 10 <= asked.target <= 300
    assert play.count(";") == 4
    assert len(play) <= 96
    assert read_problem(asked.text) == asked
    assert problem(seed, index) == (asked, play)


def replay(asked, play):
    """An independent judge: every step evaluated by Python itself."""
    left = sorted(asked.numbers)
    steps = play.split(";")
    if steps[-1] or len(steps) != 5:
        return False
    for step in steps[:-1]:
        equation, _, rest = step.partition(":")
        formula, _, result = equation.partition("=")
        a, b = map(int, re.split(r"[-+*/]", formula))
        for n in (a, b):
            if n not in left:
                return False
            left.remove(n)
        if "/" in formula and (b == 0 or a % b):
            return False
        numbers = (*re.split(r"[-+*/]", formula), result, *rest.split())
        if any(re.match(r"0\d", n) for n in numbers):
            return False  # 05 is no number here
        if eval(formula) != int(result) or not 0 <= int(result) <= 999:
            return False
        left = sorted([*left, int(result)])
        if sorted(map(int, rest.split())) != left:
            return False
    return left == [asked.target]


@given(st.integers(0, 10**6), st.data())
@settings(max_examples=200, deadline=None)
def test_the_judge_agrees_with_python_on_plays_with_a_digit_changed(index, data):
    asked, play = problem(1, index)
    at = data.draw(st.sampled_from([i for i, c in enumerate(play) if c.isdigit()]))
    changed = play[:at] + data.draw(st.sampled_from("0123456789")) + play[at + 1 :]
    assert judge(asked, changed) == replay(asked, changed)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        ";;;;",
        "nonsense",
        PLAY,
        PLAY + "5+26=31:31;",  # legal, and not the target
        "3*7=22:10 2 5 22;10/2=5:5 22 5;22+5=27:5 27;27-5=22:22;",
        "3*7=21:10 2 5 21;10/2=5:5 21 5;21+5=26:5 26;26-2=24:24;",  # a number that is used up
        "3*7=21:10 2 5;10/2=5:5 5;5+5=10:10;10+14=24:24;",
        "7/3=2:10 2 5 2;10*2=20:2 5 20;20+5=25:2 25;25-1=24:24;",
    ],
)
def test_what_is_no_solution(answer):
    assert not judge(ASKED, answer)


def test_a_solution_by_hand():
    assert not judge(ASKED, SOLVED + "21+1=22:22;")
    assert judge(Problem(ASKED.numbers, 22), SOLVED + "21+1=22:22;")


def test_illegal_results():
    assert calculate(3, "-", 5) is None
    assert calculate(7, "/", 2) is None
    assert calculate(7, "/", 0) is None
    assert calculate(50, "*", 20) is None
    assert calculate(0, "/", 5) == 0


def test_different_texts_come_to_the_same_state():
    ways = ("3*7=21:10 2 5 21;", "7*3=21:10 2 5 21;", "7*3=21:", "3*7=")
    assert {state_key(ASKED, way) for way in ways} == {"2 5 10 21"}
    assert state_key(ASKED, "3+7=10:10 2 5 10;") != state_key(ASKED, ways[0])
    # Two steps in either order.
    a = state_key(ASKED, "3*7=21:10 2 5 21;10/2=5:5 21 5;")
    assert a == state_key(ASKED, "10/2=5:3 7 5 5;7*3=21:5 5 21;") == "5 5 21"
    # A play that has gone wrong is not what it should have been.
    assert state_key(ASKED, "3*7=22:10 2 5 22;") != state_key(ASKED, ways[0])
    assert state_key(ASKED, "3*7=22:") != state_key(ASKED, "3*7=21:")
    assert "9*9" in state_key(ASKED, "9*9=81:")


def test_a_play_is_tokens_of_one_letter_and_fits_its_stage():
    config = read_config("lm_countdown")
    tokenizer = train_tokenizer(Mixture.corpus(), config.model.vocab_size)
    assert tokenizer.vocab_size == config.model.vocab_size
    assert all(tokenizer.backend.token_to_id(c) is not None for c in (*DEEP_ENDS, "?", "y", "n"))
    stage = config.stages[0]
    encoder = ChatEncoder(tokenizer)
    batch = encode_batch(encoder, 0, 0, 8, stage.length, stage.difficulty)
    for index in range(8):
        chat = stage.difficulty.make(0, index).messages()
        assert [m["role"] for m in chat] == ["user", "assistant"]
        assert judge(read_problem(chat[0]["content"]), chat[1]["content"])
        count = int(batch.weights[index].sum())
        assert count == len(chat[1]["content"]) + 1  # and the end
