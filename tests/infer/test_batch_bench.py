"""`kvjax bench batch`: what a batch costs at least, counted by hand, and the command itself."""

import json

import numpy as np
import pytest

from kvjax.cache import PageLedger
from kvjax.errors import InputError
from kvjax.infer.bench.batch import main
from kvjax.infer.bench.roofline import Calls, Rates, Usage, perfect_seconds, work_of_call
from kvjax.infer.planners import make_planner
from kvjax.models import DecoderConfig
from kvjax.plan import Grid, Request

pytestmark = pytest.mark.slow

# A layer multiplies a token with 2 * (4 + 2 + 2 + 4) + 3 * 2 * 5 = 54 weights, the logits are 7 * 2
# more; a token of the cache has 2 * 1 * 2 * 1 numbers of 4 bytes.
MODEL = DecoderConfig(
    vocab_size=7, num_layers=1, embed_dim=2, mlp_dim=5, num_heads=2, num_kv_heads=1, head_dim=2,
    max_positions=64,
)  # fmt: skip
REQUESTS = [Request(id=i, prompt=(1, 2, 3, 4), max_tokens=2) for i in range(2)]


def test_what_a_perfect_plan_costs():
    """Two prompts that share 3 of 4 tokens and draw 2: of 7 tokens computed, the first drawn are 2.

    Query-key pairs: 6 of the shared tokens, then 4 and 5 of each row. Keys read: the shared 3 in
    two steps, 2 of its own by each row that decodes.
    """
    flops = 2 * 7 * 54 + 2 * 4 * 14 + 4 * 24 * 2 * 2
    read = (3 * 2 + 2 * 2) * 16 + 7 / 4 * (54 + 14) * 4
    rates = Rates(flops=10.0, bytes=3.0)
    seconds = perfect_seconds(REQUESTS, MODEL, rates, budget=4)
    assert seconds == pytest.approx(flops / 10 + read / 3)


def test_what_a_call_does_is_counted_from_its_work_items():
    """The shared 2 tokens (a page) are one row's call, the 2 others of each row the next one's."""
    grid = Grid(
        page_size=2, max_rows=4, pages_per_row=4, row_buckets=(4,), token_buckets=(8,),
        decode_steps=2, shared_pages=1,
    )  # fmt: skip
    planner = make_planner("exact", grid, PageLedger(16))
    for request in REQUESTS:
        planner.add(request)
    planned = planner.plan()
    # One page of two tokens, and two rows of two pages with two queries each; two tokens drawn.
    pairs, keys, weights = 2 * 2 + 2 * (4 * 2), 2 + 2 * 4, (54 + 14) * 4
    expected = Usage(2 * 6 * 54 + 2 * 2 * 14 + 4 * pairs * 4, keys * 16 + weights, 6)
    assert work_of_call(planned, grid, MODEL) == expected
    calls = Calls()
    calls.add(True, 2.0, expected)
    calls.add(True, 2.0, expected)
    found = calls.figures(Rates(flops=expected.flops, bytes=expected.bytes))["with_prompts"]
    assert (found["calls"], found["tokens_per_call"], found["least_seconds"]) == (2, 6, 4)
    assert found["flop_utilisation"] == found["bandwidth_utilisation"] == 0.5


def test_the_command_compares_policies(capsys):
    options = (
        "--shape.requests 12 --shape.shared 20 --shape.own 5 --shape.output 4 --shape.degree 4"
    )
    sizes = "--rows 4 --token-buckets 16 --page-size 4 --decode-steps 2 --kv-tokens 60 400 --json"
    assert main([*options.split(), *sizes.split()]) == 0
    out, err = capsys.readouterr()
    figures = json.loads(out.splitlines()[-1])
    assert figures["kv_tokens"].keys() == {"60", "400"} and "fcfs-lru" in err
    for some in figures["kv_tokens"].values():
        assert some["exact"]["saved"] == pytest.approx(1 - (3 * 20 + 12 * 5) / (12 * 25))
        assert all(run["compilations"] == 0 for run in some.values())
        assert all(run["answers_equal"] == 1 for run in some.values())  # float32
    assert figures["kv_tokens"]["60"]["exact"]["peak_pages"] <= 15
    assert np.isfinite(figures["roofline_seconds"])
    with pytest.raises(InputError, match="no model 'huge'"):
        main(["--model", "huge"])
