"""The long-context tasks T1 to T8: what they say, that it can be answered, how long it is."""

import collections
import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvjax.errors import InputError
from kvjax.train.chat import train_tokenizer
from kvjax.train.tasks import TASKS, Mixture, Setting, make_task
from kvjax.train.tasks import words as lists
from kvjax.train.tasks.encode import ChatEncoder, stretch

LENGTHS = (144, 256, 1024)
NAMES = tuple(TASKS)


@pytest.fixture(scope="module")
def encoder():
    return ChatEncoder(train_tokenizer(Mixture.corpus(), 1024))


def examples(name, count=30, **setting):
    return [make_task(name, 11, index, Setting(**setting)) for index in range(count)]


# A reader of the text, who knows nothing of how it was made.


def value_of(document, key):
    """What the one sentence that begins with `key` says after it."""
    (value,) = re.findall(rf"(?:^|\. )The {key} ([^.]+)\.", document)
    return value


def named(question):
    return re.findall(r"the (\w+ \w+)(?=,| and|\?)", question)


def trail(document, pair):
    steps = []
    while follows := re.findall(rf"The {pair} follows the (\w+ \w+)\.", document):
        (pair,) = follows
        steps.append(f"the {pair}")
    return ", ".join([*steps, value_of(document, f"{pair} holds")])


def seen(document):
    return re.findall(r"One \w+ (\w+) went (\w+)\.", document)


def often(document, animal):
    animals = [noun for noun, _ in seen(document)]
    share = animals.count(animal) / len(animals)
    return "Often" if share > 0.2 else "Rarely" if share <= 0.1 else "Sometimes"


def top_three(document):
    ranked = collections.Counter(noun for noun, _ in seen(document)).most_common(4)
    counts = [count for _, count in ranked]
    assert len(set(counts[:3])) == 3  # no ties
    assert counts[3:] < [counts[2]]
    return ", ".join(f"the {noun}" for noun, _ in ranked[:3])


def goal(document, noun):
    (place,) = set(re.findall(rf"The \w+ {noun} goes to the (\w+ \w+)\.", document))
    return f"the {place}"


def continued(document, beginning):
    (rest,) = re.findall(rf"{beginning} ([^.]+)\.", document)
    return rest


def three_values(document, attribute, pair):
    values = [
        value_of(document, f"{ordinal} {attribute} of the {pair} is")
        for ordinal in ("first", "second", "third")
    ]
    return "first {}, second {}, third {}".format(*values)


READINGS = {
    r"What is the (\w+) of the (\w+ \w+)\?": lambda d, a, p: value_of(d, f"{a} of the {p} is"),
    r"What are the three (\w+)s of the (\w+ \w+)\?": three_values,
    r"What are the (\w+)s of (the .*\?)": lambda d, a, names: ", ".join(
        f"the {p} {value_of(d, f'{a} of the {p} is')}" for p in named(names)
    ),
    r"Where does the trail of the (\w+ \w+) end\?": trail,
    r"Where does the (\w+ \w+) live\?": lambda d, p: value_of(d, f"{p} lives at"),
    r"Whom does the (\w+ \w+) follow\?": lambda d, p: value_of(d, f"{p} follows"),
    r"Where does the \w+ (\w+) go\?": goal,
    r"Continue: (.*)": continued,
    r"Which three animals were seen most\?": top_three,
    r"Which way did most go\?": lambda d: (
        "Most went " + collections.Counter(way for _, way in seen(d)).most_common(1)[0][0]
    ),
    r"How often was the (\w+) seen\?": often,
}


def read(document, question):
    (found,) = [
        solve(document, *match.groups())
        for pattern, solve in READINGS.items()
        if (match := re.fullmatch(pattern, question))
    ]
    return found


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_of_the_document_finds_every_answer(name, tokens):
    for example in examples(name, tokens=tokens):
        assert example.task == name
        for number, question in enumerate(example.questions):
            answer = read(example.document, question)
            answer = answer if name == "completion" else answer[0].upper() + answer[1:]
            assert example.right(number, answer), (question, answer, example.answers[number])
            assert not example.right(number, answer + ".")


GOLDEN = {
    "passkey": (
        "Some say the gold rabbit saw the wild trout at the west barn. Some say the gold "
        "rabbit saw the quiet badger at the south harbour. The weight of the gold rabbit was "
        "never asked. At the west barn the gold rabbit waited. The blue lizard met the gold "
        "rabbit. Nobody counted the gold rabbit in 5165. At the south bridge the gold rabbit "
        "waited. Nobody counted the cold wren in 1458. The weight of the gold rabbit is 1153. "
        "Page 9817 names the big moose.",
        "What is the weight of the gold rabbit?",
        "1153",
    ),
    "multi_key": (
        "The code of the gold trout is 9807. The code of the small rabbit is 1409. The price "
        "of the wise rabbit is 2522. The code of the wise rabbit is 8326. The code of the "
        "wise seal is 6983. The price of the white rabbit is 7412. The price of the gold "
        "trout is 3066. The code of the white rabbit is 2349. The price of the wise seal is "
        "9892.",
        "What is the code of the wise seal?",
        "6983",
    ),
    "multi_query": (
        "The weight of the wise mouse is 2141. The year of the gold fox was never asked. The "
        "price of the white mouse was never asked. The weight of the gold rabbit is 7723. The "
        "weight of the white seal is 3496. Page 8276 names the wise mouse. The weight of the "
        "white mouse is 6942. The weight of the wise seal is 9951.",
        "What are the weights of the white mouse and the white seal?",
        "The white mouse 6942, the white seal 3496",
    ),
    "multi_value": (
        "The first code of the wise rabbit is 2141. The second code of the gold rabbit is "
        "3999. Nobody counted the grey hare in 2538. The first code of the gold rabbit is "
        "7417. The second code of the wise rabbit is 9951. The third code of the gold rabbit "
        "is 4571. The third code of the wise rabbit is 7723.",
        "What are the three codes of the wise rabbit?",
        "First 2141, second 9951, third 7723",
    ),
    "tracking": (
        "The wise seal left the north gate before the white swan. Nobody counted the white "
        "mouse in 8360. The gold rabbit holds 2141. The code of the white seal was never "
        "asked. The wise mouse follows the wise seal. The weight of the wise seal was never "
        "asked. At the west mill the white seal waited. The white seal follows the white "
        "mouse. The white seal met the dark lion. The white mouse holds 9951. The wise seal "
        "follows the gold rabbit.",
        "Where does the trail of the white seal end?",
        "The white mouse, 9951",
    ),
    "completion": (
        "Page 4744 names the green seal. There came the small seal, the small rabbit, the "
        "green trout, the wise sheep, the green mouse, the small sheep, the white trout, the "
        "white seal. There came the wise rabbit, the white sheep, the wise seal, the gold "
        "trout, the green sheep, the green seal, the wise mouse, the white rabbit. The price "
        "of the wise sheep was never asked.",
        "Continue: There came the wise rabbit, the white sheep,",
        "the wise seal, the gold trout, the green sheep, the green seal, the wise mouse, "
        "the white rabbit",
    ),
    "counting": (
        "One slow fox went east. One red moose went north. One weak wolf went north. One kind "
        "otter went north. One pale wolf went east. Some say the pale owl saw the big mole at "
        "the east tower. One wild fox went west. One black wolf went south. One wise moose "
        "went north. One strong moose went north. One quiet crane went north. One small heron "
        "went south. One white wolf went north. One brave wolf went west. One dark wolf went "
        "south. One red moose went north. One red rabbit went west. The price of the red "
        "rabbit was never asked.",
        "How often was the fox seen?",
        "Sometimes",
    ),
    "few_shot": (
        "The black fox goes to the north field. Some say the black fox saw the wise beaver at "
        "the south bridge. The brave seal met the tall mole. The big fox goes to the north "
        "field. The brave moose goes to the south well. The loud fox goes to the north field. "
        "The price of the quiet hare was never asked. The quiet wolf goes to the west mill. "
        "The strong wolf met the small fox. The small fox goes to the north field. The blue "
        "moose goes to the south well. The proud fox goes to the north field. The strong wolf "
        "goes to the west mill.",
        "Where does the gold fox go?",
        "The north field",
    ),
    "mixed": (
        "The wise mouse follows the wise seal. The code of the wise mouse is 2141. The code "
        "of the gold rabbit is 7723. The wise seal follows the wise mouse. The wise seal "
        "lives at the south barn. Some say the gold rabbit saw the wise seal at the west "
        "tower. Page 4744 names the wise seal. The wise mouse lives at the east barn. The "
        "gold rabbit follows the wise seal. The code of the wise seal is 9951. The gold "
        "rabbit lives at the north harbour.",
        "What is the code of the gold rabbit?",
        "7723",
    ),
}


def test_examples_read_like_this():
    """One of each, as a reader sees it."""
    short = Setting(tokens=144, questions=1)
    for name, (document, question, answer) in GOLDEN.items():
        example = make_task(name, 3, 2, short)
        assert (example.document, *example.questions) == (document, question), name
        assert example.answers == (answer,)
        assert example.messages() == [
            {"role": "system", "content": document},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]


@pytest.mark.parametrize("tokens", (*LENGTHS, 2048))
@pytest.mark.parametrize("name", NAMES)
def test_lengths_stay_within_the_setting(name, tokens, encoder):
    mixture = Mixture(tasks=(name,), setting=Setting(tokens=tokens))
    lengths = []
    for index in range(20):
        chat = mixture.make(11, index).messages()
        ids = encoder.encode(chat)
        assert ids.tolist() == encoder.tokenizer.encode_chat(chat, add_generation_prompt=False)
        assert encoder.answer_places(ids).size <= mixture.answer_tokens
        # Two tokens frame a text, three answers and questions: what `count_tokens` leaves to them.
        framed = 3 + 5 * (len(chat) // 2)
        assert ids.size == framed + sum(lists.count_tokens(turn["content"]) for turn in chat)
        lengths.append(ids.size)
    # A sentence of noise has up to 14 tokens, and less than that may stay free.
    assert 0.75 * tokens - 14 <= min(lengths) <= max(lengths) <= tokens
    (full,) = [encoder.encode(mixture.alone().make(11, 0).messages()).size]
    assert tokens - 14 <= full <= tokens


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_asked_four_questions_to_eight(name):
    asked = {len(example.questions) for example in examples(name, tokens=1024)}
    assert asked == {1} if name == "passkey" else min(asked) >= 4 and max(asked) <= 8
    for example in examples(name, tokens=1024):
        assert len(set(example.questions)) == len(example.questions)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_functions_of_seed_and_index(name):
    setting = Setting(tokens=256)
    assert make_task(name, 5, 7, setting) == make_task(name, 5, 7, setting)
    documents = {make_task(name, s, i, setting).document for s in (0, 10**6) for i in range(50)}
    assert len(documents) == 100


def test_a_mixture_takes_its_tasks_in_turn():
    mixture = Mixture(tasks=("passkey", "counting", "counting"), setting=Setting(tokens=144))
    names = [mixture.make(0, index).task for index in range(6)]
    assert names == ["passkey", "counting", "counting"] * 2
    assert mixture.make(0, 4) == make_task("counting", 0, 4, mixture.setting)


def test_every_word_is_one_token_and_comes_up(encoder):
    ids = encoder.tokenizer.backend.get_vocab()
    nouns, adjectives = set(lists.NOUNS), set(lists.ADJECTIVES)
    assert len(nouns) == len(adjectives) == 32
    assert not nouns & adjectives  # no word has two parts to play
    text = [m["content"] for n in NAMES for e in examples(n) for m in e.messages()]
    used = set(re.findall("[A-Za-z]+", " ".join(text)))
    places = {*lists.DIRECTIONS, *lists.PLACES, *lists.ATTRIBUTES}
    assert used >= nouns | adjectives | places
    assert {word for word in used if f"Ġ{word}" not in ids and word not in ids} == set()


# What makes them long-context tasks.


def test_nobody_meets_itself():
    meetings = [
        pair
        for name in NAMES
        for example in examples(name)
        for pair in re.findall(r"(\w+ \w+) (?:met|saw) the (\w+ \w+)", example.document)
    ]
    assert len(meetings) > 100
    assert [pair for pair in meetings if pair[0] == pair[1]] == []


def test_passkeys_are_anywhere_short_and_long():
    """Depths from the first sentence on, and offsets that hit a grid of windows everywhere."""
    depths, offsets, sizes = set(), set(), set()
    for example in examples("passkey", 200, tokens=1024, fill=1.0):
        before, value = re.split(r"The \w+ of the \w+ \w+ is ([\d ]+)\.", example.document)[:2]
        depths.add(int(10 * len(before) / len(example.document)))
        offsets.add(lists.count_tokens(before) % 8)
        sizes.add(len(value.replace(" ", "")))
    assert depths >= set(range(10))
    assert offsets == set(range(8))
    assert sizes == {4, 16}


def test_keys_of_records_share_their_words():
    for example in examples("multi_key", tokens=1024):
        keys = re.findall(r"The (\w+) of the (\w+) (\w+) is", example.document)
        # Leaving any word out of a key makes it that of several records.
        for place in range(3):
            rest = collections.Counter(key[:place] + key[place + 1 :] for key in keys)
            assert max(rest.values()) > 1
    sizes = [
        e.document.count(" is ")
        for e in examples("multi_key", 200, tokens=1024, questions=1, fill=1.0)
    ]
    assert (min(sizes), max(sizes)) == (8, 64)
    for example in examples("multi_key", tokens=144, shared_words=False):
        keys = re.findall(r"The \w+ of the (\w+) (\w+) is", example.document)
        assert len({a for a, _ in keys}) == len({n for _, n in keys}) == len(keys)


def test_noise_speaks_of_what_is_asked():
    """Without records that answer it, the words of a question are still in most documents."""
    spoken = 0
    for example in examples("passkey", 50, tokens=1024):
        (pair,) = named(example.questions[0])
        rest = re.sub(rf"The \w+ of the {pair} is", "", example.document)
        spoken += pair in rest
    assert spoken >= 48


def test_trails_have_one_to_four_hops():
    hops = collections.Counter(
        answer.count(",") for e in examples("tracking", tokens=1024) for answer in e.answers
    )
    assert set(hops) == {1, 2, 3, 4}
    assert min(hops.values()) > 10


def test_counting_needs_the_whole_document():
    """The end of a document, a third of it, often says something else than all of it."""
    wrong = total = 0
    for example in examples("counting", 60, tokens=1024):
        for question, answer in zip(example.questions, example.answers, strict=True):
            if question.startswith("Which three"):
                last = example.document[len(example.document) * 2 // 3 :]
                ranked = collections.Counter(noun for noun, _ in seen(last)).most_common(3)
                wrong += answer != "The " + ", the ".join(noun for noun, _ in ranked)
                total += 1
    assert wrong >= total // 5
    answers = collections.Counter(a for e in examples("counting", 60) for a in e.answers)
    assert min(answers[a] for a in ("Often", "Sometimes", "Rarely")) > 30


def test_cases_of_the_induction_are_new():
    for example in examples("few_shot", tokens=1024):
        for question in example.questions:
            (pair,) = re.findall(r"Where does the (\w+ \w+) go\?", question)
            assert f"The {pair} goes" not in example.document
            noun = pair.split()[1]
            assert len(re.findall(rf"The \w+ {noun} goes", example.document)) >= 2


# Positions with gaps.


@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 99), unique=True, max_size=20).map(sorted),
    st.integers(0, 400),
)
@settings(max_examples=100, deadline=None)
def test_gaps_stand_after_stops(seed, stops, longest):
    positions = stretch(np.random.default_rng(seed), 100, np.asarray(stops, int), longest)
    assert positions[0] == 0
    assert positions[-1] < max(100, longest)
    steps = np.diff(positions)
    assert steps.min() >= 1
    gaps = np.flatnonzero(steps > 1)
    assert gaps.size <= 3
    assert set(gaps) <= set(stops)


def test_gaps_reach_the_longest_distance_and_leave_half_alone():
    stops = np.arange(5, 100, 10)
    last = [stretch(np.random.default_rng(s), 100, stops, 200)[-1] for s in range(400)]
    assert 100 < np.sum(np.asarray(last) == 99) < 300
    assert 190 <= max(last) <= 199


@pytest.mark.parametrize(
    "fields", [{"tokens": 140}, {"questions": 0}, {"fill": 0.1}, {"fill": 1.1}]
)
def test_settings_without_examples_are_refused(fields):
    with pytest.raises(InputError, match="fill 108 tokens"):
        dataclasses.replace(Setting(), **fields)


def test_unknown_tasks_are_refused():
    with pytest.raises(InputError, match="no tasks \\['summaries'\\]: name some of passkey"):
        Mixture(tasks=("summaries",))
