"""`kvjax bench scale` on two devices."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import jax

jax.config.update("jax_num_cpu_devices", 2)
from kvjax.infer.bench.scale import main

main([
    "--model", "tiny", "--shape.requests", "12", "--shape.shared", "16", "--shape.own", "4",
    "--shape.output", "4", "--shape.degree", "3", "--rows", "1", "--kv-tokens", "200",
    "--token-budget", "16", "--decode-rows", "1", "--prompt", "20", "--output", "6",
    "--page-size", "4", "--json",
])
"""


def test_the_command_compares_one_device_with_two():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["batch"].keys() == {"1", "2"}
    assert result["batch"]["2"]["most_over_mean_load"] <= 1.05
    assert result["batch_speedup"]["1"] == result["decode_speedup"]["1"]["1"] == 1
    assert result["decode_step_seconds"]["1"]["2"] > 0
