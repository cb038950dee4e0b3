"""Two copies of a model, each on two devices, answer as one on one device."""

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
prompts += [[*range(20, 29), i] for i in range(4)] + [[*range(30, 33), i] for i in range(3)]
params = SamplingParams(max_tokens=12, ignore_eos=True)
options = dict(max_rows=2, page_size=4, max_length=64, token_budget=16, plan=sys.argv[3])
one = LLM.load(sys.argv[1], **options)
expected = [a.token_ids for a in one.generate(prompts, params)]
kind = getattr(AxisType, sys.argv[4])
mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
two = LLM.load(sys.argv[1], mesh=mesh, **options)
assert [a.token_ids for a in two.generate(prompts, params)] == expected
pools = [engine.state.pool.k for engine in (one.engine, *two.engines)]
whole, *shapes = [pool.addressable_shards[0].data.shape for pool in pools]
assert shapes == [(*whole[:2], whole[2] // 2, *whole[3:])] * 2, shapes
used = [pool.sharding.device_set for pool in pools[1:]]
assert not used[0] & used[1] and len(used[0] | used[1]) == 4
# A beginning of several prompts is computed once, by one of the two.
computed = [engine.planner.prefill_tokens_computed for engine in (one.engine, *two.engines)]
assert computed[0] == sum(computed[1:]) and all(computed), computed
print("same")
"""


@pytest.mark.parametrize(
    "large, plan, kind",
    [(0, "multi", "Auto"), (2**30, "fcfs-lru", "Explicit")],
    ids=["joined products", "stacked layers"],
)
def test_answers_on_a_mesh_equal_those_on_one_device(tmp_path, large, plan, kind):
    models_for_tests.save_model(tmp_path)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(tmp_path), str(large), plan, kind],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "same\n", done.stderr
