"""Solves 200 random selection programs with PuLP and CBC, as ETS's released code states them.

Run once, in the tests' environment with PuLP beside it:

    pip install --target pulp pulp
    PYTHONPATH=pulp:tests python tests/witnesses/make_ets_witness.py

It writes tests/plan/ets_witness.json. The statement is the paper's, and the released code's of
SqueezeAILab/ETS at ac937a7: y_j >= x_i for every leaf i under ancestor j, y_j <= sum x, z_k <= sum
x, sum x >= 1, all binary; where lambda_b is 0 every node earns 1e-4 instead.
"""

import json
from pathlib import Path

import numpy as np
import pulp
from random_trees import random_level

SEED, CASES = 1234, 200


def optimum(level, rewards, lambda_b, lambda_d):
    m, n = len(level.parent), len(rewards)
    program = pulp.LpProblem("ets", pulp.LpMaximize)
    x = [pulp.LpVariable(f"x{i}", cat="Binary") for i in range(n)]
    y = [pulp.LpVariable(f"y{j}", cat="Binary") for j in range(m)]
    clusters = sorted(set(level.cluster.tolist()))
    z = {k: pulp.LpVariable(f"z{k}", cat="Binary") for k in clusters}
    value = pulp.lpSum(float(rewards[i]) * x[i] for i in range(n))
    value -= lambda_b / (m + n) * pulp.lpSum([*x, *y])
    if lambda_d > 0:
        value += lambda_d / len(clusters) * pulp.lpSum(z.values())
    program += value
    under = {j: [] for j in range(m)}
    for i, node in enumerate(level.leaf_parent.tolist()):
        while node >= 0:
            program += y[node] >= x[i]
            under[node].append(i)
            node = int(level.parent[node])
    for j in range(m):
        program += y[j] <= pulp.lpSum(x[i] for i in under[j])
    for k in clusters:
        program += z[k] <= pulp.lpSum(x[i] for i in range(n) if level.cluster[i] == k)
    program += pulp.lpSum(x) >= 1
    program.solve(pulp.PULP_CBC_CMD(msg=False))
    assert pulp.LpStatus[program.status] == "Optimal"
    return pulp.value(program.objective)


def main():
    rng, choose = np.random.default_rng(SEED), np.random.default_rng(SEED + 1)
    cases = []
    for _ in range(CASES):
        lambda_b = float(choose.choice((0.1, 0.5, 1, 1.5, 2, 3)))
        lambda_d = float(choose.choice((0, 0.5, 1, 1.4)))
        level, rewards, _ = random_level(rng, leaves=int(rng.integers(3, 33)))
        cases.append([lambda_b, lambda_d, round(optimum(level, rewards, lambda_b, lambda_d), 9)])
    golden = {"solver": f"PuLP {pulp.__version__}, CBC", "seed": SEED, "cases": cases}
    path = Path(__file__).parents[1] / "plan" / "ets_witness.json"
    path.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
