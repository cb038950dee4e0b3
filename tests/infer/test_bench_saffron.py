"""The bench of safe searches and its command: what the automaton says, and that runs are kept."""

import json

import models_for_tests
import numpy as np
import pytest
from models_for_tests import CONFIG

from kvjax.errors import InputError
from kvjax.infer import cli
from kvjax.infer.bench import saffron
from kvjax.infer.search.token_search import Found
from kvjax.models import hf
from kvjax.models.mrm import MRM, save_mrm
from kvjax.models.reward import save_reward
from kvjax.safety_exact import least_harm, nucleus, nucleus_floor
from kvjax.safety_world import SafetyWorld
from kvjax.train.chat import save_tokenizer
from kvjax.train.guard import REWARD, world_tokenizer

WORLD = SafetyWorld(
    states=20, basin=4, degree=4, topics=3, vocab_size=80, length=6, limit=2, hazard=0.5
)


def test_the_oracle_reaches_the_nucleus_floor_already_at_width_1():
    """Property 15 of the dossier: greedy by the exact value, nobody in the nucleus is safer."""
    world = WORLD.build()
    attack = saffron.make_attack(world, 60, 3)
    rate, found = saffron.oracle(attack), []
    for i, topic in enumerate(attack.topic):
        answer, state = [], int(attack.start[i])
        for _ in range(world.config.length):
            inside = nucleus(world.next_tokens(int(topic), state), 0.8)
            reward = np.where(inside, rate([(i, tuple(answer))])[0], -np.inf)
            answer.append(int(np.argmax(reward)))
            states, _, _ = world.walk(np.array([*attack.prompts[i][4:], *answer]))
            state = int(states[-1])
        found.append(Found(tuple(answer), 0.0, (), False, 1))
    measured = saffron.measure(attack, found)
    floor = nucleus_floor(world, attack.topic, attack.start, 0.8)
    assert measured["asr"] == floor and measured["strange"] == 0
    assert 0 < floor < attack.chance.mean()
    least = [least_harm(world, int(t), 0.8)[s] for t, s in zip(attack.topic, attack.start)]  # noqa: B905
    assert np.mean(np.array(least) >= 2) == floor


def test_harm_of_the_prefill_is_not_the_answers():
    world = WORLD.build()
    attack = saffron.make_attack(world, 40, 3)
    nothing = [Found((), 0.0, (), False, 1)] * 40
    measured = saffron.measure(attack, nothing)
    assert measured["asr"] == measured["refused"] == 0
    assert not world.in_basin[attack.start].any()


def test_intervals_and_the_papers_table_1():
    low, high = saffron.wilson(25, 32)
    assert (round(low, 3), round(high, 3)) == (0.612, 0.890)
    assert saffron.wilson(0, 10)[0] == 0
    rows = [(500, 122.12, 25, 1.804), (500, 319.54, 18, 0.796), (100, 80.70, 29, 0.237),
            (100, 86.92, 28, 0.160)]  # fmt: skip
    for limit, tflop, hits, published in rows:
        efficiency = saffron.scaling_efficiency(limit, tflop, hits / 32)
        assert efficiency == pytest.approx(published, abs=1e-3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random models of the world's vocabulary: what they say is nonsense."""
    root = tmp_path_factory.mktemp("guards")
    config = models_for_tests.dataclasses.replace(
        CONFIG, vocab_size=80, num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=2,
        head_dim=8, windows=(), qkv_bias=False, max_positions=32,
    )  # fmt: skip
    for seed, name in enumerate(("policy", "judge")):
        hf.save(root / name, config, models_for_tests.random_decoder(config, seed)[1])
        save_tokenizer(root / name, world_tokenizer(WORLD), max_positions=32)
    save_reward(root / "judge", REWARD)
    graph, base = models_for_tests.random_decoder(config, 2)
    mrm = MRM(graph, config)
    save_mrm(root / "reward", mrm, mrm.init(base, 0), np.arange(80) % 4 > 0)
    return root


def models(root):
    return [f"--{name}={root / name}" for name in ("policy", "reward", "judge")]


@pytest.mark.slow
def test_a_bench_keeps_its_runs_and_draws_them(folders, tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    names = ("states", "basin", "degree", "topics", "vocab_size", "length", "limit", "hazard")
    world = [f"--world.{name.replace('_', '-')}={getattr(WORLD, name)}" for name in names]
    argv = ["bench", "saffron", *models(folders), *world, "--prefill=3", "--prompts=6", "--out",
            str(out), "--json", "--picture", str(tmp_path / "curves.png"), "--runs"]  # fmt: skip
    runs = ["saffron,width=2", "best-of-n,width=2", "oracle,width=1"]
    assert cli.main([*argv, *runs]) == 0
    first = json.loads(capsys.readouterr().out)
    assert [r["run"] for r in first["runs"]] == runs
    assert all(
        0 <= r["low"] <= r["asr"] <= r["high"] <= 1 and r["mflop"] > 0 for r in first["runs"]
    )
    assert first["runs"][0]["rated_per_node"] == 1
    assert first["exact"]["floor_0.8"] <= first["exact"]["best_of_1"]
    lines = out.read_text()
    assert cli.main([*argv, *runs]) == 0 and out.read_text() == lines
    assert json.loads(capsys.readouterr().out) == first
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert cli.main([*argv, "saffron,wide=2"]) == 2
    assert "'wide=2'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_answers_a_file_of_prompts(folders, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text('<bos> <user> topic1 <agent>\n{"tokens": [1, 3, 6, 4, 30]}\n')
    argv = ["search", f"--prompts={prompts}", *models(folders), "--max-tokens=4", "--width=2",
            "--min-tokens=4"]  # fmt: skip
    assert cli.main([*argv, "--out", str(out), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["ledger"]["mrm"]["rows"] == figures["ledger"]["policy"]["rows"] == 2 + 2 * 2 * 3
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(answer["tokens"]) for answer in answers] == [4, 4]
    assert answers[0]["answer"].startswith(("w", "topic", "<"))
    for line, message in (("{}", "no JSON with"), ("", "no prompts in it")):
        prompts.write_text(line)
        assert cli.main(argv) == 2
        assert message in capsys.readouterr().err
    other = tmp_path / "other"
    hf.save(other, CONFIG, models_for_tests.random_decoder(CONFIG)[1])
    (other / "tokenizer.json").write_text(
        (folders / "judge" / "tokenizer.json").read_text().replace("topic1", "theme1")
    )
    save_reward(other, REWARD)
    prompts.write_text("<bos>")
    assert cli.main([*argv, f"--judge={other}"]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_runs_are_read_and_refused_in_one_line():
    options, exact = saffron.read_run("oracle,width=2,p=0.5", 3, 6)
    assert (options.method, options.width, options.p, options.seed) == ("saffron", 2, 0.5, 3)
    assert exact and not saffron.read_run("args", 0, 6)[1]
    with pytest.raises(InputError, match="no method"):
        saffron.read_run("mcts", 0, 6)
