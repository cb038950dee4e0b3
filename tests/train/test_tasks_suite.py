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
        "Nobody counted the wild wolf in 1458. At the east bridge the gold owl waited. Some "
        "say the gold owl saw the red lizard at the west barn. Some say the gold owl saw the "
        "quiet badger at the south harbour. The weight of the gold owl was never asked. The "
        "quiet seal met the gold owl. The year of the gold owl was never asked. At the north "
        "harbour the gold owl waited. Some say the gold owl saw the shy hare at the west "
        "mill. The code of the gold owl is 8328.",
        "What is the code of the gold owl?",
        "8328",
    ),
    "multi_key": (
        "The price of the wise rabbit is 2522. The code of the white rabbit is 2349. The code "
        "of the wise seal is 6983. Page 3644 names the wise rabbit. The price of the white "
        "rabbit is 7412. The price of the gold trout is 3066. The price of the wise seal is "
        "9892. The code of the wise rabbit is 8326. The code of the gold trout is 9807.",
        "What is the price of the wise seal?",
        "9892",
    ),
    "multi_query": (
        "Page 4973 names the gold rabbit. The old hare left the west tower before the white "
        "beaver. At the south field the wise rabbit waited. The code of the wise rabbit was "
        "never asked. The weight of the wise rabbit is 7417. The weight of the wise rabbit "
        "was never asked. The weight of the gold rabbit is 1153. The wise rabbit met the gold "
        "rabbit. The gold rabbit met the short beaver.",
        "What are the weights of the wise rabbit and the gold rabbit?",
        "The wise rabbit 7417, the gold rabbit 1153",
    ),
    "multi_value": (
        "The price of the gold owl was never asked. The year of the gold owl was never asked. "
        "The first year of the gold owl is 5846. The price of the pale lion was never asked. "
        "Page 8682 names the old hare. The second year of the gold owl is 1153. The third "
        "year of the gold owl is 7417. Some say the gold owl saw the big fox at the north "
        "bridge.",
        "What are the three years of the gold owl?",
        "First 5846, second 1153, third 7417",
    ),
    "tracking": (
        "Nobody counted the wise seal in 3249. The price of the gold rabbit was never asked. "
        "The gold rabbit holds 2141. The white lynx met the tall raven. The wise seal follows "
        "the gold rabbit. Some say the wise mouse saw the young horse at the south gate. "
        "Nobody counted the gold rabbit in 3337. Page 7879 names the wise mouse. The wise "
        "mouse follows the wise seal. Some say the gold rabbit saw the wise mouse at the west "
        "barn.",
        "Where does the trail of the wise mouse end?",
        "The wise seal, the gold rabbit, 2141",
    ),
    "completion": (
        "At the west mill the small owl waited. Some say the small owl saw the blue mouse at "
        "the north barn. Some say the small owl saw the small goat at the north mill. Nobody "
        "counted the gold owl in 5994. There came the white goat, the blue goat, the gold "
        "owl, the gold goat, the blue mouse, the small owl, the small goat, the small mouse. "
        "Page 5834 names the gold owl.",
        "Continue: There came the white goat, the blue goat,",
        "the gold owl, the gold goat, the blue mouse, the small owl, the small goat, "
        "the small mouse",
    ),
    "counting": (
        "One slow wolf went west. One short wolf went north. At the west gate the red falcon "
        "waited. One warm rabbit went south. One brave wolf went east. One blue fox went "
        "south. One grey mole went south. One tall rabbit went south. One quiet fox went "
        "south. Page 8937 names the quiet fox. One weak fox went north. The price of the "
        "quiet fox was never asked. One kind fox went east. The price of the white wren was "
        "never asked. Some say the wild sheep saw the tall rabbit at the south barn. One wise "
        "heron went south.",
        "How often was the rabbit seen?",
        "Sometimes",
    ),
    "few_shot": (
        "Some say the brave wolf saw the blue duck at the north well. The strong fox goes to "
        "the south tower. The brave wolf goes to the west mill. The pale fox goes to the "
        "south tower. At the west barn the pale fox waited. At the south harbour the fast "
        "horse waited. Page 9581 names the gold wolf. Nobody counted the white beaver in "
        "8428. At the west harbour the tall moose waited. Page 1781 names the white swan. The "
        "gold wolf goes to the west mill.",
        "Where does the black fox go?",
        "The south tower",
    ),
    "mixed": (
        "Nobody counted the gold owl in 5994. The code of the white owl is 5846. The white "
        "owl lives at the north barn. At the east gate the white owl waited. The gold owl "
        "lives at the south tower. The gold owl follows the white owl. Page 5834 names the "
        "gold owl. The white owl follows the gold owl. The price of the white owl was never "
        "asked. The code of the gold owl is 8328. The price of the white owl was never asked. "
        "At the south bridge the white owl waited.",
        "Whom does the white owl follow?",
        "The gold owl",
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
