"""What parties compute together, in the engine's simulator and as processes."""

import dataclasses
import json
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.infer.bench import private as bench
from kvjax.infer.private import arithmetic, session
from kvjax.infer.private.attention import attend
from kvjax.infer.private.environment import environment_folder
from kvjax.infer.private.lowering import cached, lower
from kvjax.infer.private.model import POLICIES, prepare
from kvjax.infer.private.run import add_generation, in_the_clear
from kvjax.infer.private.session import Job, Network, PartyError, run_job
from kvjax.models.decoder import Decoder, DecoderConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (environment_folder() / "ready").exists(),
        reason="no environment for parties: run `kvjax private setup` first",
    ),
]
CONFIG = DecoderConfig(
    vocab_size=40, num_layers=3, embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=8, max_positions=128, qkv_bias=True, qk_norm=True,
)  # fmt: skip
RANDOM = np.random.default_rng(0)


def draw(config):
    """Random weights, drawn without compiling anything."""
    shapes = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[1]
    random = np.random.default_rng(1)

    def one(leaf):
        return (random.normal(size=leaf.shape) / np.sqrt(leaf.shape[-1])).astype(np.float32)

    return prepare(jax.tree.map(one, nnx.to_pure_dict(shapes)), config)


@pytest.fixture(scope="module")
def weights():
    return draw(CONFIG)


def generation(weights, protocol, policy, tokens=48, new_tokens=3, config=CONFIG, **options):
    job = Job(protocol=protocol, **options)
    prompt = RANDOM.integers(0, config.vocab_size, tokens).tolist()
    add_generation(
        job, config, POLICIES[policy], tokens=tokens, new_tokens=new_tokens, weights=weights,
        prompt=prompt,
    )  # fmt: skip
    return job


@pytest.mark.parametrize(
    ("protocol", "policy"),
    [("ABY3", "published"), ("SEMI2K", "full"), ("SEMI2K", "static")],
)
def test_the_clear_run_and_the_private_run_say_the_same(weights, protocol, policy):
    job = generation(weights, protocol, policy, simulate=True, dump=True)
    outcome = run_job(job)
    tokens, logits = in_the_clear(job)
    assert outcome.tokens == tokens
    for label, expected in logits.items():
        np.testing.assert_allclose(outcome.opened[label], expected, atol=2e-2)
    for name, text in outcome.text.items():
        head = next(line for line in text.splitlines() if "@main" in line).partition("->")[2]
        assert "reveal" not in text and head.count("tensor<") == head.count("!pphlo.secret<"), name


def test_a_layer_that_shares_a_choice_compares_nothing_to_choose():
    config = dataclasses.replace(CONFIG, num_layers=6)
    job = generation(draw(config), "ABY3", "ours", 48, 2, config, simulate=True)
    outcome = run_job(job)
    assert outcome.tokens == in_the_clear(job)[0]
    layers = outcome.of("token 1")["runs"][1:-1]
    kinds = ["select"] * 3 + ["share"] + ["select"] * 2
    assert [run["program"] for run in layers] == [f"token_{kind}" for kind in kinds]
    compared = {run["program"]: run["operators"]["pphlo.less"][0] for run in layers}
    assert compared["token_select"] > compared["token_share"]
    assert layers[3]["bytes"] < layers[2]["bytes"]


def test_three_processes_over_loopback_and_their_counters(weights):
    job = generation(weights, "ABY3", "ours", tokens=64, new_tokens=2)
    events = []
    outcome = run_job(job, follow=events.append)
    assert outcome.tokens == in_the_clear(job)[0]
    assert {e["rank"] for e in events if e["event"] == "token"} == {job.client}
    for rank in range(3):
        runs = outcome.of("token 1", rank)["runs"]
        assert len(runs) == CONFIG.num_layers + 2  # embedding, layers, logits
        assert all(run["bytes"] > 0 and run["actions"] > 0 for run in runs[1:])


def test_a_killed_party_ends_all_with_one_line(weights):
    job, children = generation(weights, "ABY3", "full"), []
    start = session._start

    def remember(*args, **options):
        children.append(start(*args, **options))
        return children[-1]

    def kill(event):
        if event["event"] == "linked" and event["rank"] == 2:
            children[2].send_signal(signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_start", remember)
        begin = time.monotonic()
        with pytest.raises(PartyError, match="party 2 "):
            run_job(job, follow=kill)
    assert time.monotonic() - begin < 30
    assert all(child.poll() is not None for child in children)


def test_an_address_nobody_is_at_is_named(weights):
    job = generation(weights, "SEMI2K", "full", addresses=session.free_addresses(2), timeout=3.0)
    with pytest.raises(PartyError, match=f"party 1 at {job.addresses[1]} cannot be reached"):
        run_job(job, ranks=[0])


def test_parties_with_different_jobs_share_nothing(weights):
    addresses, said = session.free_addresses(2), []

    def one(rank, policy):
        job = generation(weights, "SEMI2K", policy, addresses=addresses)
        try:
            run_job(job, ranks=[rank])
        except PartyError as e:
            said.append(str(e))

    other = threading.Thread(target=one, args=(1, "static"))
    other.start()
    one(0, "full")
    other.join()
    assert len(said) == 2
    assert any("holds another job" in line for line in said)


def shares_job(**functions):
    """Each function of a secret array; opened to party 1."""
    job = Job(simulate=True)
    values = {"scores": RANDOM.permutation(64).reshape(1, 64).astype(np.float32) / 7}
    values["rows"] = np.repeat(values["scores"], 8, 0)
    job.share(0, **values)
    for name, (function, argument) in functions.items():
        job.run(lower(name, function, [values[argument]]), [argument], ["out"])
        job.mark(name)
        job.open("out", 1, name)
    return values, run_job(job)


def test_rank_top_k_takes_few_rounds_for_any_number_of_rows_and_opens_nothing():
    rank, engine = (lambda f: lambda x: f(x, 4))(arithmetic.rank_top_k), arithmetic.engine_top_k
    values, outcome = shares_job(
        rank1=(rank, "scores"), rank8=(rank, "rows"),
        engine1=(lambda x: engine(x, 4), "scores"), engine8=(lambda x: engine(x, 4), "rows"),
    )  # fmt: skip
    best = np.sort(np.argsort(-values["scores"][0])[:4])
    for name in ("rank1", "rank8", "engine1", "engine8"):
        for row in outcome.opened[name]:
            np.testing.assert_array_equal(np.sort(row.argmax(1)), best)
    run = {name: outcome.of(name)["runs"][-1] for name in ("rank1", "rank8", "engine1", "engine8")}
    assert run["rank8"]["actions"] <= 24
    assert abs(run["rank8"]["actions"] - run["rank1"]["actions"]) <= 6
    assert run["engine8"]["actions"] >= 4 * run["engine1"]["actions"]
    assert "b2p" not in run["rank8"]["operators"] and "b2p" in run["engine8"]["operators"]


def test_a_program_that_reveals_is_refused():
    job = Job(simulate=True)
    job.share(0, x=np.ones((1, 4), np.float32))
    job.run(lower("leaks", lambda x: jnp.ones_like(x), [np.ones((1, 4), np.float32)]), ["x"], ["y"])
    with pytest.raises(PartyError, match="leaks is refused: an output is public"):
        run_job(job)


def test_bytes_of_the_bench_are_those_of_the_dossier():
    args = bench.BenchPrivate(processes=False)
    case = bench.measure(args, heads=8, dim=64, tokens=256)
    assert max(case["errors"].values()) < 5e-4
    assert 1.25e6 < case["costs"]["full"]["bytes"] < 1.65e6
    assert case["fewer_bytes"]["published"] > 4.5 and case["fewer_bytes"]["ours"] > 9
    wan = case["emulated"]["wan3"]
    assert wan["ours mean"] < wan["full"] < wan["published mean"]


def attention_job(tokens, times=1, *, held=False, **options):
    """SEMI2K: one attention step over random keys and values, several times."""
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(8, *n, 64)).astype(np.float32) for n in [(), *[(tokens,)] * 2])
    q = q / np.float32(8)  # who owns the weights divides by the root of the head size
    job = Job(protocol="SEMI2K", exp="default", simulate=True, **options)
    job.share(0, q=q, k=k, v=v)
    program = lower("full", attend, [q, k, v])
    for name in ("k", "v") if held else ():
        job.run(cached("hold", k), [name], [name])
    for i in range(times):
        job.mark("before")
        job.run(program, ["q", "k", "v"], ["o"])
        job.mark(f"full {i}")
        job.open("o", 1, f"o{i}")
    return job, np.asarray(attend(q, k, v))


def test_two_party_full_attention_counts_are_exact():
    job, expected = attention_job(256)
    outcome = run_job(job)
    run = outcome.of("full 0")["runs"][-1]
    assert (run["bytes"], run["actions"]) == (2641288, 159)
    np.testing.assert_allclose(outcome.opened["o0"], expected, atol=6e-3)


def test_held_keys_and_values_are_opened_once():
    job, expected = attention_job(512, 2, held=True)
    outcome = run_job(job)
    first, second = (outcome.of(f"full {i}")["runs"][-1]["bytes"] for i in range(2))
    assert second <= 0.25 * first
    np.testing.assert_allclose(outcome.opened["o1"], expected, atol=6e-3)


def test_the_network_model_is_what_a_shaped_network_takes():
    network = Network(delay=20e-3, rate=100e6)
    outcome = run_job(attention_job(64, 2, network=network)[0])
    mark = outcome.of("full 1")
    run = mark["runs"][-1]
    cost = {"seconds": 0.05, "actions": run["actions"], "bytes": run["bytes"]}
    assert run["seconds"] == pytest.approx(bench.emulated_seconds(cost, network), rel=0.15)


def test_the_command_says_what_it_cost():
    command = [sys.executable, "-m", "kvjax", "private", "run", "[5, 6, 7, 8]"]
    command += ["--max-tokens", "2", "--simulate", "--check", "--json", "--protocol", "SEMI2K"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["agree"] and len(found["token_ids"]) == 2
    parts = {cost["part"] for cost in found["costs"] if cost["bytes"]}
    assert parts == {"weights", "prompt", "token 1"} or parts == {"prompt", "token 1"}
