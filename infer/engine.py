"""The engine: one pure step, compiled once for each declared shape, and the loop that feeds it."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.cache import (
    CacheConfig,
    KVPool,
    PageLedger,
    PageTable,
    advance,
    grow,
    seat,
    slots_of,
    write_positions,
)
from kvjax.infer.sampling import sample
from kvjax.models.attention import paged_attend
from kvjax.models.decoder import DecoderConfig
from kvjax.pallas_kernels.page_attention import Items, WorkList
from kvjax.plan import Bucket, FirstCome, Grid, Planned, Sampled, StepPlan
from kvjax.sharding import spec

__all__ = ["Engine", "EngineState", "step"]

Array = jax.Array
Params = nnx.State[Any, Any]

# Rows that one call of `seat` gives their first pages; more need more calls.
_SEATS = 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineState:
    """All that lives on the device between steps.

    Attributes:
        pool: the pages.
        table: the rows' pages.
        last_token: int32[B], the token that each row sampled last.
    """

    pool: KVPool
    table: PageTable
    last_token: Array


def step(
    graph: nnx.GraphDef[Any], grid: Grid, params: Params, state: EngineState, plan: StepPlan[Array]
) -> tuple[EngineState, Array]:
    """Computes a plan: writes its tokens' keys and values, attends, draws the next tokens.

    Args:
        graph: of the decoder; static.
        grid: static.
        params: of the decoder.
        state: donate it.
        plan: of one of the grid's shapes.

    Returns:
        The state, and the tokens drawn, int32[B], in the plan's order.
    """
    decoder = nnx.merge(graph, params)
    max_rows = state.last_token.shape[0]
    tokens = jnp.where(
        plan.token < 0, state.last_token[jnp.minimum(plan.row, max_rows - 1)], plan.token
    )
    table = grow(state.table, *plan.grow)
    writer = jnp.where(plan.write, plan.row, max_rows)
    slots = slots_of(table, writer, plan.position, grid.page_size)
    pool = write_positions(state.pool, plan.position, slots)
    table = advance(table, plan.row)
    attend = paged_attend(slots, _work(grid, table, plan, max_rows), decoder.config.layer_windows())
    hidden, pool = decoder(tokens, plan.position, pool, attend)
    logits = decoder.logits(hidden[plan.sample])
    position = plan.position[plan.sample] + 1
    drawn = sample(logits, plan.temperature, plan.top_p, plan.seed, position)
    last_token = state.last_token.at[plan.sample_row].set(drawn, mode="drop")
    return EngineState(pool=pool, table=table, last_token=last_token), drawn


def _work(grid: Grid, table: PageTable, plan: StepPlan[Array], max_rows: int) -> WorkList:
    items = [Items(index=plan.singles, count=plan.num_singles, max_queries=1,
                   max_pages=grid.split_pages)]  # fmt: skip
    if plan.tiles.shape[0]:
        items.append(Items(index=plan.tiles, count=plan.num_tiles, max_queries=grid.tile_queries,
                           max_pages=grid.split_pages))  # fmt: skip
    return WorkList(
        items=tuple(items),
        pages=table.pages,
        length=table.length,
        query_position=jnp.where(plan.row < max_rows, plan.position, -1),
    )


def _seat(state: EngineState, rows: Array, pages: Array, length: Array) -> EngineState:
    return dataclasses.replace(state, table=seat(state.table, rows, pages, length))


def _shardings(state: EngineState, mesh: Mesh | None) -> tuple[EngineState, NamedSharding] | None:
    """Where the state and the drawn tokens lie: KV heads split as the model's, all else whole."""
    if mesh is None:
        return None

    def place(x: Array) -> NamedSharding:
        axes = ("kv_head" if x.ndim == 5 and axis == 2 else None for axis in range(x.ndim))
        return NamedSharding(mesh, spec(tuple(axes), mesh, x.shape))

    return jax.tree.map(place, state), NamedSharding(mesh, PartitionSpec())


class Engine:
    """Answers requests: plans on the host, computes on the device.

    Args:
        graph: of `nnx.split(decoder)`.
        params: likewise.
        model: the decoder's sizes.
        cache: the cache's sizes.
        grid: the planner's sizes, the same where they are the cache's too.
        mesh: over which the parameters lie, with axes of type Auto; None: the default device.

    Raises:
        ValueError: cache and grid differ in what both have.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[Any],
        params: Params,
        model: DecoderConfig,
        cache: CacheConfig,
        grid: Grid,
        mesh: Mesh | None = None,
    ) -> None:
        for name in ("page_size", "max_rows", "pages_per_row"):
            if getattr(cache, name) != getattr(grid, name):
                raise ValueError(f"the cache and the grid have different {name}: {cache}, {grid}")
        self.model: DecoderConfig = model
        self.cache: CacheConfig = cache
        self.grid: Grid = grid
        self._graph, self._params = graph, params
        self._programs: dict[Bucket, Callable] = {}
        self._seat: Callable | None = None
        pool, table = cache.init()
        last_token = jnp.zeros((cache.max_rows,), jnp.int32)
        state = EngineState(pool=pool, table=table, last_token=last_token)
        self._shardings = _shardings(state, mesh)
        self.state: EngineState = jax.device_put(state, self._shardings and self._shardings[0])
        self.planner: FirstCome = FirstCome(grid, PageLedger(cache.num_pages))

    def warm_up(self, progress: Callable[[int, int], Any] = lambda done, total: None) -> None:
        """Compiles every shape of the grid; afterwards nothing is ever compiled."""
        if self._programs:
            return
        states, _ = self._shardings or (None, None)
        place = jax.jit(_seat, donate_argnums=0, out_shardings=states)
        self._seat = place.lower(self.state, *self._seat_arguments([])).compile()
        run = jax.jit(
            functools.partial(step, self._graph, self.grid),
            donate_argnums=1,
            out_shardings=self._shardings,
        )
        lowered = {
            bucket: run.lower(self._params, self.state, StepPlan.empty(self.grid, bucket))
            for bucket in self.grid.buckets
        }
        # XLA compiles outside of the interpreter's lock: side by side where there are cores.
        with ThreadPoolExecutor() as threads:
            compiling = {threads.submit(low.compile): bucket for bucket, low in lowered.items()}
            progress(0, len(compiling))
            for done, program in enumerate(as_completed(compiling), 1):
                self._programs[compiling[program]] = program.result()
                progress(done, len(compiling))

    def run(self) -> Iterator[list[Sampled]]:
        """Steps until the planner has nothing left; yields what each step has sampled."""
        if self.planner.busy:
            self.warm_up()
        while self.planner.busy:
            planned = self.planner.plan()
            drawn = self._compute(planned)
            yield self.planner.accept(drawn.tolist())

    def _compute(self, planned: Planned) -> np.ndarray:
        assert self._seat is not None
        for start in range(0, len(planned.seats), _SEATS):
            seats = list(planned.seats[start : start + _SEATS])
            self.state = self._seat(self.state, *self._seat_arguments(seats))
        program = self._programs[planned.bucket]
        self.state, drawn = program(self._params, self.state, planned.step)
        return np.asarray(drawn)

    def _seat_arguments(
        self, seats: list[tuple[int, list[int], int]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.full(_SEATS, self.grid.max_rows, np.int32)
        pages = np.full((_SEATS, self.grid.pages_per_row), self.cache.num_pages, np.int32)
        length = np.zeros(_SEATS, np.int32)
        for i, (row, prefix, tokens) in enumerate(seats):
            rows[i], length[i], pages[i, : len(prefix)] = row, tokens, prefix
        return rows, pages, length
