"""The arithmetic beside the measured times, and the command."""

import json

import pytest

from kvjax.errors import InputError
from kvjax.infer.bench import video
from kvjax.infer.bench.video import BenchVideo, chunk_macs, main

pytestmark = pytest.mark.slow


def macs(method, variant, number, **options):
    config = BenchVideo(**options).config(method, variant)
    return chunk_macs(config, method, number, steps=1, released=True) / 1e12


def test_multiply_adds_are_those_counted_by_hand():
    """Per denoising call at XL/2, in 10^12, as counted from the released model."""
    assert [macs("ca2", "none", i) for i in (0, 1, 2, 3, 9)] == pytest.approx(
        [1.253, 1.254, 1.255, 1.256, 1.256], abs=6e-4
    )
    assert macs("ca2", "code", 0) == pytest.approx(1.659, abs=6e-4)
    assert [macs("os-ext", "none", i) for i in (0, 1, 2, 3)] == pytest.approx(
        [1.409, 2.664, 3.921, 5.180], abs=2e-3
    )
    assert macs("os-fix", "none", 5) == pytest.approx(2.507, abs=6e-4)


@pytest.mark.parametrize(
    "other, variant, bound",
    [
        ("os-ext", "code", 2.66),
        ("os-ext", "none", 3.53),
        ("os-fix", "code", 1.51),
        ("os-fix", "none", 2.00),
    ],
)
def test_the_bounds_of_80_frames(other, variant, bound):
    theirs = sum(macs(other, "none", i) for i in range(10))
    assert theirs / sum(macs("ca2", variant, i) for i in range(10)) == pytest.approx(
        bound, abs=6e-3
    )


def test_command(capsys, monkeypatch):
    peer = {"framework": "PyTorch", "peer": "torch", "prefix_attention": "none", "call_ms": 100.0}
    monkeypatch.setattr(video, "_peer", lambda args, variant: dict(peer))
    sizes = ["--model", "tiny", "--dtype", "float32", "--steps", "1", "--frames", "2"]
    sizes += ["--chunk", "2", "--max-prefix", "3", "--variants", "none", "--methods", "ca2"]
    assert main([*sizes, "os-fix", "--peer", "torch", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [timing["method"] for timing in found["timings"]] == ["ca2", "os-fix"]
    assert found["timings"][0]["cache_bytes"] == 2 * 6 * 64 * 3 * 192 * 4
    assert found["ratios"][0]["over"] == "os-fix"
    ours = found["timings"][0]
    assert ours["first_seconds"] > ours["seconds"][0]  # it compiled
    assert found["peers"][0]["ratio"] == pytest.approx(100 / ours["call_ms"])


@pytest.mark.parametrize(
    "arguments, message",
    [(["--model", "XXL"], "no model 'XXL'"), (["--frames", "9"], "no whole chunks"),
     (["--methods", "magic"], "no method 'magic'"), (["--peer", "jax"], "no peer 'jax'")],
)  # fmt: skip
def test_wrong_options_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        main(arguments)
