"""The engine on four devices answers as on one."""

import os
import subprocess
import sys

import models_for_tests
import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import sys

import jax

jax.config.update("jax_num_cpu_devices", 4)
from jax.sharding import AxisType

import kvjax.infer.engine
from kvjax.infer import LLM, SamplingParams

kvjax.infer.engine._LARGE = int(sys.argv[2])
prompts = [[1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 9]]
params = SamplingParams(max_tokens=12, ignore_eos=True)
answers, pools = [], []
for shape in (None, (2, 2)):
    mesh = shape and jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    llm = LLM.load(sys.argv[1], max_rows=2, page_size=4, max_length=64, mesh=mesh)
    answers.append([a.token_ids for a in llm.generate(prompts, params)])
    pools.append(llm.engine.state.pool.k)
assert answers[0] == answers[1], answers
shapes = [pool.addressable_shards[0].data.shape for pool in pools]
assert shapes[1] == (*shapes[0][:2], shapes[0][2] // 2, *shapes[0][3:]), shapes
print("same")
"""


@pytest.mark.parametrize("large", [0, 2**30], ids=["joined products", "stacked layers"])
def test_answers_on_a_mesh_equal_those_on_one_device(tmp_path, large):
    models_for_tests.save_model(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path), str(large)],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr
