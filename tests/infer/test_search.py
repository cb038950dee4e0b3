"""Tree search on a small random model: what is drawn, what is held, and what is given back."""

import dataclasses
import math
import sys
import types
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import models_for_tests
import numpy as np
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.infer import LLM
from kvjax.infer.search import (
    DVTS,
    ETS,
    Beam,
    BestOfN,
    Frontier,
    Node,
    Rebase,
    Reward,
    SearchParams,
    chat_turns,
    choose,
    fold_seed,
    kv_sizes,
    last_number_or_box,
    same_answer,
    search,
    tags_between,
)
from kvjax.infer.search.features import hidden_clusters
from kvjax.infer.search.picture import tree_json, tree_svg
from kvjax.infer.search.rows import Held, StepEnds, judge, step_ends
from kvjax.infer.search.tasks import equal_text
from kvjax.infer.search.tree import page_level_of
from kvjax.models import causal_attend
from kvjax.models.reward import TokenReward, ValueReward, value_decoder

PAGE = 4
ENDS = tuple("aeiou" + "AEIOU" + " ,.;:!?0123456789")
PARAMS = SearchParams(
    width=8, step_ends=ENDS, step_tokens=9, max_tokens=40, max_levels=5, seed=3, merge=False
)
QUESTIONS = ("What is the code of the bear?", "What is the code of the bear now?", "Why not", "So?")
POLICIES = {
    "best": BestOfN(),
    "rebase": Rebase(0.02),
    "beam": Beam(),
    "dvts": DVTS(4),
    "ets": ETS(lambda_b=1.5, temperature=0.02, clusters=equal_text),
    "ets-pages": ETS(lambda_b=2.0, lambda_d=0.5, temperature=0.05, cost="pages"),
}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models_for_tests.save_model(folder)
    loaded = LLM.load(folder, max_rows=8, page_size=PAGE)
    # Every page that rows share is read for all of them at once: attention over the tree.
    sizes = {"row_buckets": (8,), "token_buckets": (96,), "shared_pages": 1}
    return models_for_tests.with_grid(loaded, **sizes)


@pytest.fixture(scope="module")
def reward(llm):
    return Reward(llm, TokenReward(good=65, bad=66, ask=(67,)))


def sample(llm, reward, policy, questions=QUESTIONS[:2], params=PARAMS, **options):
    return search(llm, list(questions), policy, reward, params, **options)


def drawn(tree):
    """What decides whether two trees are the same."""
    return [(node.path, node.tokens, node.fate, node.width) for node in tree.root.walk()]


def live_pages(trees):
    """Different full pages of the live leaves' sequences."""
    leaves = [leaf.sequence() for tree in trees for leaf in tree.leaves]
    return {s[: i + PAGE] for s in leaves for i in range(0, len(s) - PAGE + 1, PAGE)}


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_every_step_is_what_its_sequence_alone_would_draw(llm, reward, name):
    """Attention through shared, pruned and used-again pages equals attention without a cache."""
    logits = models_for_tests.dense_logits(*models_for_tests.random_decoder())
    (tree,), _ = sample(llm, reward, POLICIES[name], QUESTIONS[:1])
    leaves = [node for node in tree.root.walk() if not node.children and node.parent]
    tokens = np.zeros((len(leaves), 96), np.int32)
    for row, leaf in zip(tokens, leaves, strict=True):
        row[: len(leaf.sequence())] = leaf.sequence()
    scores = logits(tokens)

    @jax.jit
    def redraw(logits, seed, position):
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.categorical(key, logits)

    for row, leaf in enumerate(leaves):
        at = len(tree.root.tokens)
        for node in leaf.lineage()[1:]:
            seed = np.uint32(fold_seed(PARAMS.seed, 0, node.path))
            # A step ends with an end, with its most tokens, or with the solution.
            text = llm.tokenizer.decode(node.tokens[-1:])
            assert text.endswith(ENDS) or len(node.tokens) == 9 or node.fate == "too long"
            for token in node.tokens:
                assert int(redraw(scores[row, at - 1], seed, jnp.int32(at))) == token
                at += 1


def test_judgements_are_those_of_the_sequences_alone(llm, reward):
    logits = models_for_tests.dense_logits(*models_for_tests.random_decoder())
    (tree,), _ = sample(llm, reward, Rebase(), QUESTIONS[:1])
    nodes = [node for node in tree.root.walk() if node.parent]
    tokens = np.zeros((len(nodes), 96), np.int32)
    for row, node in zip(tokens, nodes, strict=True):
        row[: len(node.sequence()) + 1] = (*node.sequence(), 67)
    ends = np.array([len(node.sequence()) for node in nodes])
    last = np.asarray(logits(tokens))[np.arange(len(nodes)), ends]
    expected = 1 / (1 + np.exp(last[:, 66] - last[:, 65]))
    # Logits of float32 agree to 1e-5 between the two ways to attend; a sigmoid is flatter.
    np.testing.assert_allclose([node.score for node in nodes], expected, atol=1e-5)


@pytest.mark.parametrize("name", POLICIES)
def test_pages_are_those_of_the_live_leaves_and_all_are_free_at_the_end(llm, reward, name):
    ledger = llm.engine.planner.ledger
    assert ledger.held == 0
    held = []
    seen = []

    def look(level, own):
        held.append(ledger.held)
        seen.append(own.pages)

    trees, cost = sample(llm, reward, POLICIES[name], on_level=look)
    assert ledger.held == 0
    assert cost.pages_after == held == seen
    assert all(after <= before for before, after in zip(cost.pages_before, held, strict=True))
    assert cost.pages_peak >= max(cost.pages_before)
    # Level by level again, from the trees: a node is live where it was continued.
    for level, count in enumerate(held):
        alive = [
            node.sequence()
            for tree in trees
            for node in tree.root.walk()
            if node.depth == level and node.width
        ]
        pages = {s[: i + PAGE] for s in alive for i in range(0, len(s) - PAGE + 1, PAGE)}
        if level:
            assert count == len(pages)
            sizes = [kv_sizes([n for n in tree.root.walk() if n.depth == level and n.width]).unique
                     for tree in trees if any(n.depth == level and n.width
                                              for n in tree.root.walk())]  # fmt: skip
            slack = 2 * len(alive) * (PAGE - 1)
            assert sum(sizes) - slack <= count * PAGE + len(QUESTIONS[0])
            assert count * PAGE <= sum(sizes) + slack


def test_what_free_pages_hold_changes_nothing(llm, reward):
    expected = [drawn(tree) for tree in sample(llm, reward, POLICIES["ets"])[0]]
    engine, poisoned = llm.engine, []

    def poison(level, own):
        ledger = engine.planner.ledger
        free = ledger.take(ledger.available)  # what could still be found is forgotten
        ledger.release(free)
        pool = engine.state.pool
        pages = np.asarray(free)
        pool = dataclasses.replace(
            pool, k=pool.k.at[pages].set(jnp.nan), v=pool.v.at[pages].set(jnp.nan)
        )
        engine.state = dataclasses.replace(engine.state, pool=pool)
        poisoned.append(len(free))

    trees, _ = sample(llm, reward, POLICIES["ets"], on_level=poison)
    assert min(poisoned) > 0
    assert [drawn(tree) for tree in trees] == expected


@pytest.mark.parametrize("name", ["rebase", "ets", "dvts"])
def test_a_question_has_the_same_tree_alone_and_among_others(llm, reward, name):
    together, _ = sample(llm, reward, POLICIES[name], QUESTIONS)
    for number, question in enumerate(QUESTIONS[:3]):
        (alone,), _ = sample(llm, reward, POLICIES[name], (question,), first=number)
        assert drawn(alone) == drawn(together[number])


def test_a_cache_that_is_too_small_is_refused_and_left_as_it_was(llm, reward):
    ledger = llm.engine.planner.ledger
    others = ledger.take(ledger.available - 24)
    with pytest.raises(InputError, match="less wide"):
        sample(llm, reward, BestOfN(), QUESTIONS)
    assert ledger.held == len(others)
    ledger.release(others)


def test_where_the_cache_costs_nothing_ets_is_rebase(llm, reward):
    free = ETS(lambda_b=0.0, lambda_d=1.0, temperature=0.1, clusters=equal_text, floor_one=False)
    assert [drawn(t) for t in sample(llm, reward, free)[0]] == [
        drawn(t) for t in sample(llm, reward, Rebase(0.1))[0]
    ]


def test_equal_siblings_become_one_and_change_nothing(llm, reward):
    params = dataclasses.replace(PARAMS, step_tokens=1, max_levels=3, width=24)
    apart, _ = sample(llm, reward, Rebase(0.05), params=params)
    joined, _ = sample(llm, reward, Rebase(0.05), params=dataclasses.replace(params, merge=True))
    first = [[n for n in t.root.walk() if n.depth == 1] for t in (apart[0], joined[0])]
    assert sum(node.count for node in first[1]) == len(first[0]) == 24
    by_text = [{}, {}]
    for nodes, total in zip(first, by_text, strict=True):
        for node in nodes:
            total[node.tokens] = total.get(node.tokens, 0) + node.width
    assert len(first[1]) < len(first[0])
    assert by_text[0] == by_text[1]
    assert kv_sizes(first[0]).unique == kv_sizes(first[1]).unique
    assert kv_sizes(first[0]).nodes == kv_sizes(first[1]).nodes


def leaves_of(scores, counts=None):
    root = Node(None, (1, 2, 3))
    leaves = [
        Node(root, (i, i + 1), path=(i,), score=s, count=(counts or [1] * len(scores))[i])
        for i, s in enumerate(scores)
    ]
    return leaves


def deal(policy, scores, width, **options):
    frontier = Frontier(leaves=leaves_of(scores), width=width, full_width=width, **options)
    return policy.allocate(frontier).counts.tolist()


def test_beam_spends_the_width_exactly():
    assert deal(Beam(), [0.1, 0.9, 0.5, 0.7, 0.3], 10) == [0, 3, 2, 3, 2]
    assert deal(Beam(2), [0.1, 0.9, 0.5], 5) == [0, 3, 2]


def test_dvts_keeps_the_best_of_each_subtree():
    scores = [0.1, 0.4, 0.9, 0.2, 0.3, 0.3, 0.8, 0.7]
    assert deal(DVTS(4), scores, 8) == [0, 2, 2, 0, 2, 0, 2, 0]
    ended = leaves_of(scores)[:1]
    assert deal(DVTS(4), scores, 8, ended=ended) == [0, 1, 2, 0, 2, 0, 2, 0]


def test_a_leaf_kept_for_what_it_covers_is_continued():
    scores = [0.9, 0.8, 0.7, 0.65, 0.5]
    clusters = lambda leaves: np.array([0, 0, 0, 0, 1])  # noqa: E731
    published = ETS(lambda_b=2.0, lambda_d=1.5, clusters=clusters, floor_one=False)
    kept = ETS(lambda_b=2.0, lambda_d=1.5, clusters=clusters)
    assert deal(published, scores, 8)[4] == 0
    assert deal(kept, scores, 8)[4] == 1
    assert sum(deal(kept, scores, 8)) == sum(deal(published, scores, 8)) == 8
    assert deal(kept, scores, 1) == [1, 0, 0, 0, 0]


def test_pages_of_a_level_are_counted_once():
    root = Node(None, tuple(range(6)))
    a, b = Node(root, (7, 8, 9), path=(0,)), Node(root, (7, 8, 9, 10, 11, 12, 13), path=(1,))
    level = page_level_of([a, b], 4)
    assert level.total_cost == 3  # 0-3, 4 5 7 8, and of b alone 9-12
    assert kv_sizes([a, b]) == kv_sizes([b, a])
    assert kv_sizes([a, b]).nodes == 6 + 3 + 7


def test_weighted_votes_add_and_ties_go_to_the_best_single_score():
    root = Node(None, (1,))

    def leaf(answer, score, count=1):
        return Node(root, (2,), f"The answer is {answer}", (0,), score, True, count)

    def chosen(leaves, vote):
        return choose(leaves, vote=vote, extract=last_number_or_box, same=same_answer).answer

    leaves = [leaf("7", 0.4), leaf("7.0", 0.3), leaf("9", 0.6), Node(root, (3,), "no", (1,), 0.99)]
    assert chosen(leaves, "weighted") == "7"
    assert chosen(leaves, "best") == "9"
    assert chosen(leaves, "majority") == "7"
    assert chosen([leaf("1", 0.5), leaf("2", 0.2), leaf("2", 0.3)], "weighted") == "1"
    assert chosen([leaf("1", 0.2, 3), leaf("2", 0.5)], "weighted") == "1"
    assert chosen([Node(root, (3,), "no", (1,), 0.9)], "weighted") == ""
    with pytest.raises(InputError, match="vote"):
        choose(leaves, vote="loudest", extract=last_number_or_box, same=same_answer)


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        ("1/2", r"\frac{1}{2}", True),
        ("0.5", "50%", True),
        ("1,000", "1000", True),
        (r"\left( x \right)", "x", True),
        ("3", "4", False),
        ("x", "y", False),
        ("1/0", "2/0", False),
    ],
)
def test_answers_are_equal_as_numbers_or_as_text(a, b, equal):
    assert same_answer(a, b) is equal


def test_other_answers_are_compared_as_mathematics_if_a_package_can(monkeypatch):
    """Texts and numbers are decided without it, and so is everything where it is not there."""
    asked = []

    def verify(gold, other, timeout_seconds):
        asked.append((gold, other, timeout_seconds))
        return {gold, other} == {"<$x+y$>", "<$y+x$>"}

    package = types.SimpleNamespace(parse=lambda text, parsing_timeout: f"<{text}>", verify=verify)
    monkeypatch.setitem(sys.modules, "math_verify", package)
    assert same_answer("x+y", "y+x") and not same_answer("x+y", "x-y")
    assert same_answer("1/2", "0.5") and not same_answer("3", "4")
    assert [pair[:2] for pair in asked] == [("<$x+y$>", "<$y+x$>"), ("<$x+y$>", "<$x-y$>")]
    assert all(seconds for *_, seconds in asked)
    with ThreadPoolExecutor() as thread:  # where no signal can end it
        assert thread.submit(same_answer, "x+y", "y+x").result()
    assert asked[-1][2] is None
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert not same_answer("x+y", "y+x")


def test_answers_are_found_where_they_are_announced():
    assert last_number_or_box(r"so \boxed{\frac{1}{2}} it is") == r"\frac{1}{2}"
    assert last_number_or_box("The answer is 3.\nNo: the answer is 12.") == "12"
    assert last_number_or_box(r"\boxed{1") is None
    assert last_number_or_box("nothing") is None


@pytest.mark.slow
def test_a_model_with_a_head_judges_from_a_cache_of_its_own(llm, tmp_path):
    """`ValueReward` on `value_decoder` is the sigmoid of the head."""
    graph, params = models_for_tests.random_decoder()
    kernel = jnp.asarray(np.random.default_rng(5).normal(size=48) * 0.3, jnp.float32)
    made = value_decoder(models_for_tests.CONFIG, params, kernel)
    loaded = LLM.load(_saved(tmp_path), max_rows=8, page_size=PAGE)
    grid = dataclasses.replace(loaded.engine.grid, row_buckets=(8,), token_buckets=(96,))
    loaded.engines = (type(loaded.engine)(*made, grid, loaded.engine.cache.num_pages),)
    head = ValueReward(vocab_size=300, bias=0.25)
    other = Reward(loaded, head)
    (tree,), cost = sample(llm, other, Rebase(0.05), QUESTIONS[:1])
    assert llm.engine.planner.ledger.held == loaded.engine.planner.ledger.held == 0
    assert cost.pages_peak > 0
    nodes = [node for node in tree.root.walk() if node.parent][:5]
    sequences = [node.sequence() for node in nodes]
    held = Held(loaded.engine)
    found = judge(other, held, range(len(sequences)), sequences)
    assert held.pages > 0
    held.close()
    decoder = nnx.merge(graph, params)
    attend = causal_attend(models_for_tests.CONFIG.layer_windows())
    for node, value, sequence in zip(nodes, found, sequences, strict=True):
        tokens = jnp.zeros((1, 96), jnp.int32).at[0, : len(sequence)].set(jnp.asarray(sequence))
        hidden, _ = decoder(tokens, jnp.arange(96, dtype=jnp.int32)[None], None, attend)
        z = float(hidden[0, len(sequence) - 1] @ kernel) + 0.25
        # The value is read back from a log-probability of float32 among 300.
        assert value == pytest.approx(1 / (1 + math.exp(-z)), abs=1e-4)
        assert node.score == pytest.approx(value, abs=1e-5)


def test_what_other_kinds_of_judges_are_shown(llm):
    root = Node(None, (1, 2), "Why?")
    a = Node(root, (3,), "so. ", path=(0,))
    b = Node(a, (4, 5), "then. ", path=(0, 0))
    assert tags_between((9,))(a) == (1, 2, 3)
    assert tags_between((9,))(b) == (1, 2, 3, 9, 4, 5)
    shown = llm.tokenizer.decode(list(chat_turns(llm)(b)))
    assert shown == "user: Why? so.\nassistant: +\nuser: then.\n"


def _saved(folder):
    models_for_tests.save_model(folder)
    return folder


def test_the_ends_of_steps_are_tokens_and_more_of_them_than_the_device_takes_are_cut(llm, reward):
    ends = step_ends(llm, ENDS)
    assert len(ends.step) == len(ENDS)
    many = StepEnds(frozenset(range(40)), frozenset({256}))
    assert many.on_device == {256}
    assert many.cut([99, 3, 4]) == 2
    with pytest.raises(InputError, match="no token"):
        step_ends(llm, ("never seen",))
    letters = tuple(chr(c) for c in range(33, 123))
    params = dataclasses.replace(PARAMS, step_ends=letters, max_levels=3)
    (tree,), _ = sample(llm, reward, Rebase(), QUESTIONS[:1], params)
    texts = [bytes(node.text, "utf8") for node in tree.root.walk() if node.parent]
    assert all(not any(33 <= byte < 123 for byte in text[:-1]) for text in texts)
    assert llm.engine.planner.ledger.held == 0


def test_a_tree_can_be_looked_at(llm, reward):
    (tree,), _ = sample(llm, reward, POLICIES["ets"], QUESTIONS[:1])
    last = max(tree.root.walk(), key=lambda node: node.depth)
    picture = ET.fromstring(tree_svg(tree.root, last))
    dots = picture.findall(".//{http://www.w3.org/2000/svg}circle")
    nodes = list(tree.root.walk())
    assert len(dots) == len(nodes)
    told = tree_json(tree.root)
    assert told["width"] == PARAMS.width
    assert len(told["children"]) == len(tree.root.children)


def test_hidden_states_are_the_same_with_joined_products(tmp_path, monkeypatch):
    """A large model's engine has other parameters, and a graph to go with them."""
    folder = _saved(tmp_path)
    leaves = [Node(Node(None, (1, 2, 3), ""), (4, 5), "", path=(0,)), Node(None, (7, 8), "")]
    vectors = []
    for large in (2**30, 0):
        monkeypatch.setattr("kvjax.infer.engine._LARGE", large)
        loaded = LLM.load(folder, max_rows=2, page_size=PAGE)
        vectors.append(hidden_clusters(loaded, 0.1).vectors(leaves))
    assert "qkv" in loaded.engine.params[1][0]
    # The same products, some of them wider: the last bits of float32.
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5)
