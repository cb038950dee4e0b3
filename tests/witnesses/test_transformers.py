"""Parity with Hugging Face transformers: random small checkpoints of every family, and templates.

Needs torch and transformers (the `parity` extra); without them these tests are skipped, or fail
where KVJAX_REQUIRE_PARITY=1 says that they must run.
"""

import dataclasses
import datetime
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx
from parity_packages import required

from kvjax.infer import LLM, SamplingParams
from kvjax.models import Decoder, DecoderConfig, Rope, causal_attend
from kvjax.models.hf import load, save
from kvjax.models.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    module = required("torch")
    module.set_num_threads(1)  # these matrices are too small to share
    return module


@pytest.fixture(scope="module")
def transformers(torch: ModuleType) -> ModuleType:
    module = required("transformers")
    module.utils.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint: its architecture, what its configuration changes, how it is stored."""

    name: str
    architecture: str
    fields: dict[str, Any]
    dtype: str = "float32"
    max_shard_size: str = "1GB"
    old_config: bool = False


SMALL = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

CASES = [
    Case("llama2-mha", "Llama", {"num_key_value_heads": 4}, old_config=True),
    Case("llama3-gqa", "Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    Case("llama3.1-scaled-tied-sharded", "Llama",
         {"rope_parameters": LLAMA3_ROPE, "head_dim": 12, "tie_word_embeddings": True},
         max_shard_size="20KB", old_config=True),
    Case("llama-linear-biased-mqa", "Llama",
         {"rope_parameters": LINEAR_ROPE, "attention_bias": True, "mlp_bias": True,
          "num_key_value_heads": 1}, old_config=True),
    Case("mistral-window", "Mistral", {"sliding_window": 9, "head_dim": 16}),
    Case("mistral-no-window", "Mistral", {"sliding_window": None}, max_shard_size="20KB"),
    Case("qwen2-mqa-tied", "Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    Case("qwen2.5-window", "Qwen2", QWEN_WINDOW | {"rms_norm_eps": 1e-5}, old_config=True),
    Case("qwen2-layer-types", "Qwen2", QWEN_WINDOW | {"layer_types": MIXED_LAYERS, "head_dim": 6}),
    Case("qwen3-tied-sharded", "Qwen3", {"head_dim": 20, "tie_word_embeddings": True},
         max_shard_size="20KB"),
    Case("qwen3-window-biased", "Qwen3",
         QWEN_WINDOW | {"head_dim": 8, "attention_bias": True, "rope_parameters": LINEAR_ROPE}),
    Case("qwen3-bf16-file", "Qwen3", {"head_dim": 8}, dtype="bfloat16"),
    Case("llama-fp16-file", "Llama", {}, dtype="float16"),
]  # fmt: skip


def randomise(torch: ModuleType, model: Any, seed: int) -> None:
    """Every weight random, those that begin as zeros and ones too, with logits of a few units."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            scale = 0.4 if weight.ndim == 1 else 1.3 * weight.shape[1] ** -0.5
            weight.copy_(scale * noise + ("norm" in name))


def make_checkpoint(
    torch: ModuleType, transformers: ModuleType, case: Case, folder: Path, seed: int
) -> Any:
    """Saves the case's checkpoint and returns transformers' model of the files, in float32."""
    config = getattr(transformers, case.architecture + "Config")(**SMALL | case.fields)
    model = getattr(transformers, case.architecture + "ForCausalLM")(config)
    randomise(torch, model, seed)
    model = model.to(getattr(torch, case.dtype))
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    if case.old_config:
        use_old_fields(folder / "config.json")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def use_old_fields(file: Path) -> None:
    """Rewrites a config.json of transformers 5 in the fields of transformers 4."""
    fields = json.loads(file.read_text())
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    old = {"type": rope.pop("rope_type")} | rope
    fields["rope_scaling"] = None if old["type"] == "default" else old
    fields["torch_dtype"] = fields.pop("dtype")
    fields.pop("layer_types", None)
    file.write_text(json.dumps(fields))


def our_logits(folder: Path, tokens: np.ndarray, first_position: int = 0) -> np.ndarray:
    graphdef, params, config = load(folder, dtype="float32")

    @jax.jit
    def run(params: nnx.State, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        decoder = nnx.merge(graphdef, params)
        attend = causal_attend(config.layer_windows())
        return decoder.logits(decoder(tokens, positions, None, attend)[0])

    positions = np.broadcast_to(first_position + np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(
        run(params, jnp.asarray(tokens, jnp.int32), jnp.asarray(positions, jnp.int32))
    )


def their_logits(torch: ModuleType, model: Any, tokens: np.ndarray, first: int = 0) -> np.ndarray:
    positions = first + torch.arange(tokens.shape[1])[None].expand(tokens.shape)
    with torch.no_grad():
        return model(torch.tensor(tokens), position_ids=positions).logits.numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_and_greedy_tokens(
    case: Case, tmp_path: Path, torch: ModuleType, transformers: ModuleType
) -> None:
    model = make_checkpoint(torch, transformers, case, tmp_path, seed=CASES.index(case))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (case.max_shard_size != "1GB")
    prompts = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 24))
    inputs = torch.tensor(prompts)
    tokens = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=64
    ).numpy()
    assert tokens.shape == (2, 24 + 64)

    ours, theirs = our_logits(tmp_path, tokens), their_logits(torch, model, tokens)
    # float32 sums of these sizes differ by some 1e-5; another formula would differ by far more.
    assert np.abs(ours - theirs).max() <= 1e-4
    # `tokens` holds transformers' greedy choices, made step by step with its own cache. Given the
    # same prefix ours must be equal wherever the choice is clear.
    ours, chosen = ours[:, 23:-1], tokens[:, 24:]
    top = np.sort(ours, axis=-1)
    clear = top[..., -1] - top[..., -2] > 1e-3
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(ours.argmax(-1)[clear], chosen[clear])


@pytest.mark.parametrize(
    "name",
    ["llama3.1-scaled-tied-sharded", "mistral-window", "qwen2.5-window", "qwen3-tied-sharded"],
)
def test_the_engine_generates_the_same(
    name: str, tmp_path: Path, torch: ModuleType, transformers: ModuleType
) -> None:
    """Pages, chunks of a prompt and a token budget change nothing: 64 tokens of two prompts."""
    case = next(case for case in CASES if case.name == name)
    model = make_checkpoint(torch, transformers, case, tmp_path, seed=11)
    inputs = torch.tensor(np.random.default_rng(3).integers(0, SMALL["vocab_size"], (2, 24)))
    theirs = model.generate(
        inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=64
    ).numpy()
    llm = LLM.load(tmp_path, dtype="float32", max_rows=2, page_size=8, token_budget=16)
    answers = llm.generate(inputs.tolist(), SamplingParams(max_tokens=64, ignore_eos=True))
    logits = their_logits(torch, model, theirs)[:, 23:-1]
    top = np.sort(logits, axis=-1)
    margin = top[..., -1] - top[..., -2]
    for row, answer in enumerate(answers):
        different = np.flatnonzero(np.array(answer.token_ids) != theirs[row, 24:])
        # From the first close call on, the two may go different ways.
        assert not different.size or margin[row, different[0]] <= 1e-3


@pytest.mark.parametrize("name", ["llama3.1-scaled-tied-sharded", "qwen3-window-biased"])
def test_far_positions(
    name: str, tmp_path: Path, torch: ModuleType, transformers: ModuleType
) -> None:
    """Positions far past the first context, where one bit of a rotary frequency would show."""
    case = next(case for case in CASES if case.name == name)
    model = make_checkpoint(torch, transformers, case, tmp_path, seed=7)
    tokens = np.random.default_rng(1).integers(0, SMALL["vocab_size"], (1, 40))
    ours, theirs = our_logits(tmp_path, tokens, 20_000), their_logits(torch, model, tokens, 20_000)
    assert np.abs(ours - theirs).max() <= 1e-4
    near = their_logits(torch, model, tokens[:, ::-1].copy(), 20_000)
    assert np.abs(near - theirs).max() > 0.1  # these logits do depend on what stands where


OURS = DecoderConfig(
    vocab_size=53, num_layers=2, embed_dim=24, mlp_dim=40, num_heads=4, num_kv_heads=2, head_dim=6,
    max_positions=128, norm_eps=1e-6,
)  # fmt: skip
SAVED = {
    "LlamaForCausalLM": {
        "qkv_bias": True, "out_bias": True, "mlp_bias": True,
        "rope": Rope(theta=5e5, kind="llama3", factor=4.0, original_max_positions=8),
    },
    "MistralForCausalLM": {"windows": (5, 5), "tie_embeddings": True},
    "Qwen2ForCausalLM": {"qkv_bias": True, "windows": (5, 0)},
    "Qwen3ForCausalLM": {"qk_norm": True, "rope": Rope(kind="linear", factor=2.0)},
}  # fmt: skip


@pytest.mark.parametrize("architecture", SAVED)
def test_transformers_reads_what_we_save(
    architecture: str, tmp_path: Path, torch: ModuleType, transformers: ModuleType
) -> None:
    config = dataclasses.replace(OURS, **SAVED[architecture])
    shapes = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(2)
    draw = lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    save(tmp_path, config, jax.tree.map(draw, shapes), dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(model).__name__ == architecture
    assert model.dtype == torch.float32
    tokens = rng.integers(0, config.vocab_size, (2, 40))
    ours, theirs = our_logits(tmp_path, tokens), their_logits(torch, model, tokens)
    assert np.abs(ours - theirs).max() <= 1e-4


CHATML = """\
{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}
    {%- for tool in tools %}{{- tool | tojson }}{{- "\\n" }}{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages %}
    {%- if message.content is not string %}{{- raise_exception('content must be text') }}{% endif %}
    {%- if message.role == 'assistant' and loop.index0 != ns.last %}
        {%- set c = message.content.split('</think>')[-1].lstrip('\\n') %}
    {%- else %}{%- set c = message.content %}{%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + c + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
HEADERS = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'note' %}{%- continue %}{%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{ message['content'] | trim }}{% endgeneration %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
INST = """\
{%- if messages[0]["role"] == "system" %}{%- set system = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}{%- set loop_messages = messages %}{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{- '[INST] ' + message['content'] + ' [/INST]' }}{%- endif %}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}
{%- endfor %}
"""
CHATS = {
    "one": [{"role": "user", "content": "Hi <b> & 'you' \u65e5\u672c"}],
    "system": [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "2+2?"}],
    "long": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nb"},
        {"role": "user", "content": "c"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<&> \u00fc"}}]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize(
    ("template", "options"),
    [
        (CHATML, {}),
        (CHATML, {"tools": TOOLS, "enable_thinking": False}),
        (CHATML, {"add_generation_prompt": False}),
        (HEADERS, {}),
        (HEADERS, {"date_string": "1 Jan 2030", "add_generation_prompt": False}),
        (INST, {}),
    ],
    ids=["chatml", "chatml-tools", "chatml-closed", "headers", "headers-date", "inst"],
)
def test_chat_templates(
    template: str, options: dict[str, Any], chat: str, tmp_path: Path, transformers: ModuleType
) -> None:
    words = {"<s>": 0, "</s>": 1, "[UNK]": 2}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="[UNK]",
        chat_template=template,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos_id, ours.eos_ids) == (0, (1,))
    # A date of its own, so that midnight between two calls cannot matter.
    now = datetime.datetime.now()
    ours_text = ours.apply_chat_template(CHATS[chat], now=now, **options)
    options = {"add_generation_prompt": True} | options
    their_text = theirs.apply_chat_template(CHATS[chat], tokenize=False, **options)
    if datetime.datetime.now().date() == now.date():
        assert ours_text == their_text
    assert CHATS[chat][-1]["content"] in ours_text
