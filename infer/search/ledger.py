"""What a search by tokens costs, counted by what was asked of each model and not by profilers.

FLOPs are those of the products, a multiplication and an addition each counted: they depend on the
tokens, on what they attend to and on the outputs that are read, and on nothing else. Padding of
compiled shapes is not counted, nor are other models.
"""

import dataclasses

import numpy as np

from kvjax.models.decoder import DecoderConfig

__all__ = ["Ledger", "ModelCost", "forward_flops"]


def forward_flops(config: DecoderConfig, tokens: int, pairs: int, outputs: int) -> float:
    """FLOPs of forward passes.

    Args:
        config: of the decoder.
        tokens: that were brought.
        pairs: of a query and a key that it sees, summed over the tokens; of one layer.
        outputs: logits that were read, summed over the tokens.
    """
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    layer = config.embed_dim * (heads * config.head_dim + 3 * config.mlp_dim)
    attention = 2 * config.num_heads * config.head_dim * pairs
    return 2.0 * (config.num_layers * (layer * tokens + attention) + outputs * config.embed_dim)


@dataclasses.dataclass
class ModelCost:
    """What one model was asked.

    Attributes:
        calls: of its program.
        rows: of these calls.
        tokens: that the rows brought.
        flops: see `forward_flops`.
        kv_bytes: the most that its keys and values took at a time.
    """

    calls: int = 0
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0
    kv_bytes: int = 0


@dataclasses.dataclass
class Ledger:
    """The cost of a search, by model.

    Attributes:
        models: by name: policy, mrm, prm.
        seconds: of the whole search.
    """

    models: dict[str, ModelCost] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def add(
        self, name: str, config: DecoderConfig, count: np.ndarray, length: np.ndarray, outputs: int
    ) -> None:
        """Counts a call.

        Args:
            name: of the model.
            config: of its decoder.
            count: int[R], tokens that each row brings; rows of 0 are not there.
            length: int[R], tokens before these.
            outputs: logits that are read of a row.
        """
        cost, there = self.models.setdefault(name, ModelCost()), count > 0
        pairs = int(np.sum(count * length + count * (count + 1) // 2))
        cost.calls += 1
        cost.rows += int(there.sum())
        cost.tokens += int(count.sum())
        cost.flops += forward_flops(
            config, int(count.sum()), pairs, outputs * int(there.sum())
        )  # fmt: skip

    def hold(self, name: str, nbytes: int) -> None:
        """Notes the bytes that a model's keys and values take now."""
        cost = self.models.setdefault(name, ModelCost())
        cost.kv_bytes = max(cost.kv_bytes, nbytes)

    @property
    def flops(self) -> float:
        """Of all models."""
        return sum(cost.flops for cost in self.models.values())

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        models = {name: dataclasses.asdict(cost) for name, cost in self.models.items()}
        return {"flops": self.flops, "seconds": self.seconds, **models}
