"""`kvjax bench tree`: a recorded search played again, read as a tree and leaf by leaf."""

import itertools
import json

import pytest

from kvjax.errors import InputError
from kvjax.infer.bench import tree as bench
from kvjax.infer.search.picture import tree_json
from kvjax.infer.search.tree import Node


def test_both_ways_draw_the_same_on_the_same_pages(tmp_path, capsys):
    """Of a small tree: what is drawn, what is held, and that nothing is compiled meanwhile."""
    root = Node(None, (), "9 2 2>22", width=6)
    for i in range(6):
        root.children.append(Node(root, (), f"9+{i}=", (i,), score=i / 6, width=2 * (i > 2)))
    for i, node in enumerate(root.children[3:]):
        node.children = [Node(node, (), f"{i}:", (*node.path, j), score=0.5) for j in range(2)]
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(tree_json(root)))
    words = ["--tree", str(path), "--prompt", "96", "--step", "16", "--repetitions", "1", "--json"]
    assert bench.main([*words, "--levels", "2"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["leaves"] == 6 and result["levels"] == 2
    assert result["compilations_after_warmup"] == 0
    for way in ("tree", "rows"):
        assert result[way]["tokens"] == 2 * 6 * 16
        # The prompt's six pages; of each step the last token's keys are not there yet.
        assert result[way]["pages"] == [6, 6 + 3]
        assert all(seconds > 0 for seconds in result[way]["level_seconds"])
        assert result[way]["select_share"] > 0


def test_the_tree_that_comes_along_is_a_whole_search():
    levels = bench._levels(bench.read_tree(None), 12)
    assert [len(level) for level in levels] == [64] * 12
    for level, following in itertools.pairwise(levels):
        assert sum(node.width for node in level) == len(following)
    assert all(node.finished for node in levels[-1])


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "tree.json"
    path.write_text('{"text": 1}')
    with pytest.raises(InputError, match="no tree of kvjax search"):
        bench.read_tree(path)
    with pytest.raises(InputError, match="no model 'huge'"):
        bench.main(["--model", "huge"])
