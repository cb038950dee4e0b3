"""The text encoder beside transformers', on random weights."""

import json

import numpy as np
import pytest
from parity_packages import required

from kvjax.errors import InputError
from kvjax.models.text_encoder import load_text_encoder

WORDS = ["<pad>", "</s>", "<unk>", "a", "seven", "meets", "two", "and", "leaves"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch, transformers = required("torch"), required("transformers")
    import tokenizers

    path = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(
        vocab_size=12, d_model=16, d_kv=6, d_ff=20, num_layers=3, num_heads=2,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8,
        relative_attention_max_distance=12, dropout_rate=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=0.0 if p.ndim > 1 else 1.0, std=0.4)
    model.save_pretrained(path)
    words = tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    return path, model


def test_texts_are_encoded_as_transformers_does(folder):
    torch = required("torch")
    path, model = folder
    texts = ["a seven meets a two", "seven and two and seven and a two meets a seven leaves two a"]
    embed, mask = load_text_encoder(path)(texts, tokens=12)
    assert mask.sum(axis=1).tolist() == [6, 12]
    ids = np.zeros((2, 12), int)
    for row, text in enumerate(texts):
        found = [WORDS.index(word) for word in text.split()] + [1]
        ids[row, : len(found)] = found[:11] + found[-1:] if len(found) > 12 else found
    with torch.no_grad():
        expected = model(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state
    # float32 through three layers of sums in another order.
    np.testing.assert_allclose(embed[mask], expected.numpy()[mask], rtol=1e-4, atol=1e-5)


def test_long_texts_keep_their_end(folder):
    encoder = load_text_encoder(folder[0])
    embed, mask = encoder(["a two a two a two a two"], tokens=4)
    again, _ = encoder(["a two a"], tokens=4)
    np.testing.assert_array_equal(embed, again)
    assert mask.all()


def test_another_model_is_refused(folder, tmp_path):
    config = json.loads((folder[0] / "config.json").read_text())
    wrong = [
        ({"model_type": "bert"}, "no T5 of version 1.1"),
        ({"num_layers": 4}, "is not in the folder"),
    ]
    for change, said in wrong:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        for name in ("model.safetensors", "tokenizer.json"):
            (tmp_path / name).write_bytes((folder[0] / name).read_bytes())
        with pytest.raises(InputError, match=said):
            load_text_encoder(tmp_path)
