"""Random levels of search trees, for the tests of the selection program."""

from kvjax.plan.tree_pruning import Level, rebase_allocation, shares


def random_level(rng, leaves=None, depth=None, clusters=True, uniform=True):
    """A level with its rewards: a tree grown level by level, scores of a Beta(2, 2)."""
    n = leaves or int(rng.integers(3, 13))
    depth = depth or int(rng.integers(2, 6))
    parent, above = [-1], [0]
    for _ in range(depth - 2):
        # A few nodes below each level, each under any of those above, most under few.
        size = int(rng.integers(1, max(2, n // 2) + 1))
        chosen = sorted(rng.choice(above, size).tolist())
        above = list(range(len(parent), len(parent) + size))
        parent += chosen
    leaf_parent = sorted(rng.choice(above, n).tolist())
    parent, leaf_parent = without_barren(parent, leaf_parent)
    cluster = rng.integers(0, max(1, int(rng.integers(1, n + 1))), n) if clusters else None
    level = Level.uniform(parent, leaf_parent, cluster)
    if not uniform:
        level = Level(
            parent=level.parent,
            leaf_parent=level.leaf_parent,
            node_cost=rng.integers(0, 20, len(parent)).astype(float),
            leaf_cost=rng.integers(1, 20, n).astype(float),
            cluster=level.cluster,
        )
    scores = rng.beta(2, 2, n)
    return level, shares(rebase_allocation(scores, max(n, 8), 0.2)), scores


def without_barren(parent, leaf_parent):
    """The tree without ancestors that have no leaf below them."""
    keep = set(leaf_parent)
    for node in range(len(parent) - 1, -1, -1):
        if node in keep and parent[node] >= 0:
            keep.add(parent[node])
    number = {old: new for new, old in enumerate(sorted(keep))}
    parents = [number[parent[old]] if parent[old] >= 0 else -1 for old in sorted(keep)]
    return parents, [number[p] for p in leaf_parent]
