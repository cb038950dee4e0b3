"""The training program, from its command line to the model that it exports."""

import contextlib
import dataclasses
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kvjax.errors import InputError
from kvjax.models.decoder import Decoder, DecoderConfig
from kvjax.models.hf import load
from kvjax.models.tokenizer import Tokenizer
from kvjax.train import lm
from kvjax.train.chat import train_tokenizer
from kvjax.train.lm_config import LMConfig, Stage, read_config
from kvjax.train.tasks import Mixture, Setting
from kvjax.train.tasks.encode import ChatEncoder

pytestmark = pytest.mark.slow

SMALL = Mixture(tasks=("multi_key",), setting=Setting(tokens=144, questions=2))
CONFIG = LMConfig(
    model=DecoderConfig(
        vocab_size=640, num_layers=1, embed_dim=16, mlp_dim=16, num_heads=2, num_kv_heads=1,
        head_dim=8, max_positions=160, qk_norm=True, tie_embeddings=True,
    ),
    stages=(
        Stage(share=0.5, batch_size=3, length=144, difficulty=SMALL),
        Stage(share=0.5, batch_size=2, length=144, difficulty=SMALL),
    ),
    steps=4,
    eval_difficulty=SMALL,
    eval_prompts=18,
    warmup_steps=2,
    save_every=3,
    log_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Mixture.corpus(), CONFIG.model.vocab_size)


@pytest.fixture
def toy(monkeypatch):
    """Makes the toy config the one that `--config lm_tiny` reads."""
    monkeypatch.setattr(lm, "read_config", lambda name: CONFIG)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder and what the command printed last."""
    folder, out = tmp_path_factory.mktemp("run"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(lm, "read_config", lambda name: CONFIG)
        assert lm.main(["--out", str(folder), "--json"]) == 0
    return folder, json.loads(out.getvalue().splitlines()[-1])


def split_decoder(seed=0):
    return nnx.split(Decoder(CONFIG.model, rngs=nnx.Rngs(seed)))


def test_training_text_is_the_template(tokenizer):
    batch = lm.encode_batch(ChatEncoder(tokenizer), 4, 10, 2, 144, SMALL)
    for row in range(2):
        messages = SMALL.make(4, 10 + row).messages()
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        ids = batch.tokens[row]
        length = int((ids != tokenizer.backend.token_to_id("<|pad|>")).sum())
        assert tokenizer.decode(ids[:length], skip_special=False) == text
        # A request is the beginning of a training text.
        prompt = tokenizer.encode_chat(messages[:2])
        assert ids[: len(prompt)].tolist() == prompt


def test_the_loss_looks_at_the_answers_alone(tokenizer):
    batch = lm.encode_batch(ChatEncoder(tokenizer), 4, 10, 2, 144, SMALL)
    for row in range(2):
        asked = SMALL.make(4, 10 + row).answers
        places = batch.places[row][batch.weights[row] == 1]
        learnt = tokenizer.decode(batch.tokens[row][places + 1], skip_special=False)
        assert learnt == "".join(f"{answer}<|eos|>" for answer in asked)


def test_loss_of_even_logits_is_log_of_the_vocabulary(tokenizer):
    graph, params = split_decoder()
    params = jax.tree.map(jnp.zeros_like, params)
    batch = lm.encode_batch(ChatEncoder(tokenizer), 4, 10, 2, 144, SMALL)
    sums = jax.jit(lm.answer_loss(graph))(params, batch)
    assert sums.weight == batch.weights.sum() == 20  # two documents, two answers, five tokens
    np.testing.assert_allclose(sums.loss / sums.weight, np.log(640), rtol=1e-6)  # float32 rounding
    assert sums.metrics["accuracy"] == 0  # no token is likelier than all others


def test_weights_of_padding_change_nothing(tokenizer):
    graph, params = split_decoder()
    batch = lm.encode_batch(ChatEncoder(tokenizer), 4, 10, 2, 144, SMALL)
    longer = lm.encode_batch(ChatEncoder(tokenizer), 4, 10, 2, 160, SMALL)
    more = longer._replace(
        places=np.pad(longer.places, ((0, 0), (0, 5))),
        weights=np.pad(longer.weights, ((0, 0), (0, 5))),
    )
    loss = jax.jit(lm.answer_loss(graph))
    # Sums over other lengths round differently in float32.
    np.testing.assert_allclose(loss(params, batch).loss, loss(params, more).loss, rtol=1e-5)
    assert loss(params, batch).weight == loss(params, more).weight


def test_batches_follow_the_stages_and_repeat_nothing(tokenizer):
    batches = lm.make_batches(CONFIG, tokenizer)
    shapes = [batches(step).tokens.shape for step in range(CONFIG.steps)]
    assert shapes == [(3, 144)] * 2 + [(2, 144)] * 2
    rows = {row.tobytes() for step in range(CONFIG.steps) for row in batches(step).tokens}
    assert len(rows) == 10
    np.testing.assert_array_equal(batches(3).tokens, lm.make_batches(CONFIG, tokenizer)(3).tokens)


def test_command_trains_measures_and_exports(run, tmp_path):
    folder, result = run
    assert (result["steps"], result["eval_prompts"]) == (4, 18)
    assert 0 <= result["exact_match"] <= 1
    graph, params, config = load(result["model"])
    assert config == dataclasses.replace(CONFIG.model, dtype=config.dtype)
    tokenizer = Tokenizer.load(folder / "model")
    assert tokenizer.vocab_size <= config.vocab_size
    assert lm.exact_match_rate(graph, params, tokenizer, CONFIG) == result["exact_match"]


def test_a_killed_command_ends_with_the_same_weights(run, toy, tmp_path, monkeypatch):
    encode = lm.encode_batch

    def interrupt(encoder, seed, first, *rest):
        if (seed, first) == (CONFIG.seed, 8):  # the last step
            raise KeyboardInterrupt
        return encode(encoder, seed, first, *rest)

    monkeypatch.setattr(lm, "encode_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lm.main(["--out", str(tmp_path)])
    monkeypatch.setattr(lm, "encode_batch", encode)
    assert not (tmp_path / "model").exists()
    lm.main(["--out", str(tmp_path)])
    name = "model/model.safetensors"
    assert (tmp_path / name).read_bytes() == (run[0] / name).read_bytes()


def test_fields_of_a_config_can_be_set(toy, tmp_path, monkeypatch):
    asked = []

    def record(*rest, steps, **options):
        asked.append(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(lm, "run", record)
    with pytest.raises(KeyboardInterrupt):
        lm.main(["--out", str(tmp_path), "--steps", "2", "--model.mlp-dim", "8"])
    settings = json.loads((tmp_path / "run.json").read_text())
    assert asked == [settings["steps"]] == [2]
    assert "machine" not in settings  # a run may go on with other devices
    assert settings["model"] == dataclasses.asdict(CONFIG.model) | {"mlp_dim": 8, "windows": []}
    with pytest.raises(InputError, match=r"other settings \(model\.mlp_dim, steps\)"):
        lm.main(["--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--stages.0.share", "0.9"], "sum to 1.4"),
        (["--model.vocab-size", "100"], "vocab_size is 100"),
        (["--step.microbatches", "0"], "microbatches is 0"),
        (["--step.compute-dtype", "float8"], "compute_dtype is 'float8'"),
        (["--remat", "all"], "remat is 'all'"),
        (["--machine.data", "99"], "needs 99 devices"),
        (["--model.max-positions", "64"], "max_positions 64"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(toy, tmp_path, options, message):
    with pytest.raises(InputError, match=message) as error:
        lm.main(["--out", str(tmp_path / "run"), *options])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options", [["--config"], ["--stages.0.difficulty.min-records", "9"]])
def test_what_no_option_takes_ends_in_status_2(toy, options, capsys):
    with pytest.raises(SystemExit) as error:
        lm.main(options)
    assert error.value.code == 2
    assert capsys.readouterr().err


def test_a_stage_too_short_for_its_documents_is_refused(tokenizer):
    with pytest.raises(InputError, match="more than its stage's 16: make the stage longer"):
        lm.encode_batch(ChatEncoder(tokenizer), 0, 0, 1, 16, SMALL)


def test_a_file_is_no_run(toy, tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(InputError, match="is a file"):
        lm.main(["--out", str(path)])


def test_unknown_config_names_the_known_ones():
    with pytest.raises(InputError, match=r"no config 'lm_tinny'.*lm_tiny"):
        lm.main(["--config", "lm_tinny"])


def test_the_built_in_configs_stages_hold_their_documents():
    tokenizer = train_tokenizer(Mixture.corpus(), 1024)
    for stage in read_config("lm_tiny").stages:
        batch = lm.encode_batch(ChatEncoder(tokenizer), 9, 0, 36, stage.length, stage.difficulty)
        assert batch.tokens.max() < read_config("lm_tiny").model.vocab_size
