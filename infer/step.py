"""The engine's step: pure device functions, compiled once for each declared shape.

Letters: T tokens of a step, B rows that draw, Z seats, S steps that one call may run, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kvjax.cache import KVPool, PageTable, advance, grow, seat, slots_of, write_positions
from kvjax.infer.draw import Logprobs, RowSettings, draw, logprobs_of
from kvjax.infer.sampling import MAX_LOGPROBS
from kvjax.infer.words import from_words
from kvjax.models.attention import own_heads, paged_attend
from kvjax.models.decoder import Decoder, LayerParams
from kvjax.pallas_kernels.page_attention import Items, WorkList, prepare
from kvjax.plan import Bucket, Grid, StepPlan

__all__ = ["Drawn", "EngineState", "Params", "Seats", "give_seats", "step"]

Array = jax.Array
Params = tuple[nnx.State[Any, Any], LayerParams | None]
"""A decoder's parameters: from `split_layers`, or with all layers stacked and None."""

# Tokens of a prompt that are scored at a time: their logits, [64, V], bound the memory.
_SCORED_AT_ONCE = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineState:
    """All that lives on the device between steps.

    Attributes:
        pool: the pages.
        table: the rows' pages.
        last_token: int32[Z], the token that each row drew last.
        history: int32[Z, M * P], the rows' tokens by true position, as far as they are computed.
        settings: what the rows asked for.
    """

    pool: KVPool
    table: PageTable
    last_token: Array
    history: Array
    settings: RowSettings

    @staticmethod
    def init(pool: KVPool, table: PageTable, grid: Grid) -> "EngineState":
        """The state in which nobody is seated."""
        return EngineState(
            pool=pool,
            table=table,
            last_token=jnp.zeros((grid.max_rows,), jnp.int32),
            history=jnp.zeros((grid.max_rows, grid.max_length), jnp.int32),
            settings=jax.tree.map(jnp.asarray, RowSettings.empty(grid.max_rows)),
        )


class _Model(NamedTuple):
    """A decoder, its layers if they are apart, and the devices that they lie on."""

    decoder: Decoder
    layers: LayerParams | None
    mesh: Mesh | None


class Drawn(NamedTuple):
    """What a call brings back.

    Attributes:
        token: int32[S, B] in the plan's order, -1 after a row's last one.
        logprobs: of these tokens, [S, B, ...]; zeros unless the plan asks for them.
        scores: of the plan's targets, [T, ...]; zeros unless it has any.
    """

    token: Array
    logprobs: Logprobs
    scores: Logprobs


class Seats(NamedTuple):
    """Requests to seat on the pages of their beginnings.

    Attributes:
        rows: int32[n]; Z and above are dropped.
        pages: int32[n, M].
        length: int32[n], tokens in these pages.
        tokens: int32[n, M * P], which they are.
        settings: of these n rows.
    """

    rows: Any
    pages: Any
    length: Any
    tokens: Any
    settings: RowSettings

    @staticmethod
    def empty(grid: Grid, num_pages: int, room: int) -> "Seats":
        """Nobody's, to be filled in: numpy arrays with room for `room` requests."""
        return Seats(
            rows=np.full(room, grid.max_rows, np.int32),
            pages=np.full((room, grid.pages_per_row), num_pages, np.int32),
            length=np.zeros(room, np.int32),
            tokens=np.zeros((room, grid.max_length), np.int32),
            settings=RowSettings.empty(room),
        )


def give_seats(like: Seats, state: EngineState, words: Array) -> EngineState:
    """Seats requests.

    Args:
        like: the seats' shapes; static.
        state: donate it.
        words: `to_words` of the seats.
    """
    rows, pages, length, tokens, settings = from_words(like, words)
    return dataclasses.replace(
        state,
        table=seat(state.table, rows, pages, length),
        history=state.history.at[rows].set(tokens, mode="drop"),
        settings=jax.tree.map(
            lambda old, new: old.at[rows].set(new, mode="drop"), state.settings, settings
        ),
    )


def step(
    graph: nnx.GraphDef[Any], grid: Grid, bucket: Bucket, mesh: Mesh | None, params: Params,
    state: EngineState, words: Array,
) -> tuple[EngineState, Drawn]:  # fmt: skip
    """Computes a plan: writes its tokens' keys and values, attends, draws the next tokens.

    With chunks of prompts it is one step. Without, every row brings a token, and up to `plan.steps`
    steps follow each other without the host: a row drops out when it draws a token that ends it or
    has no room left, and the call ends when no row is left.

    Args:
        graph: of the decoder; static.
        grid: static.
        bucket: one of the grid's shapes; static.
        mesh: over which the parameters and the pool lie; static.
        params: of the decoder.
        state: donate it.
        words: `to_words` of a plan of that shape.
    """
    plan: StepPlan[Array] = from_words(StepPlan.empty(grid, bucket), words)
    model = _Model(nnx.merge(graph, params[0]), params[1], mesh)
    state = dataclasses.replace(state, table=grow(state.table, *plan.grow))
    if bucket.chunks:
        return _chunk_step(model, grid, bucket, state, plan)
    return _decode_steps(model, grid, bucket, state, plan)


def _chunk_step(
    model: _Model, grid: Grid, bucket: Bucket, state: EngineState, plan: StepPlan[Array]
) -> tuple[EngineState, Drawn]:  # fmt: skip
    tokens = _tokens(state, plan)
    state, hidden = _compute(model, grid, state, plan, tokens, plan.position, plan.row)
    state, token, logprobs = _draw(model.decoder, bucket, state, plan, hidden, plan.position)
    one = jax.tree.map(lambda x: x[None], (token, logprobs))
    return state, Drawn(*one, scores=_score(model.decoder, bucket, plan, hidden))


def _decode_steps(
    model: _Model, grid: Grid, bucket: Bucket, state: EngineState, plan: StepPlan[Array]
) -> tuple[EngineState, Drawn]:  # fmt: skip
    max_rows, (t, b) = grid.max_rows, (plan.token.shape[0], plan.sample.shape[0])
    place = jnp.where(plan.sample_row < max_rows, plan.sample, t)

    def one(carry: tuple[Array, EngineState, Array, Drawn]) -> tuple:
        i, state, live, drawn = carry  # live: bool[B], the rows that may still draw
        # Before the first draw all tokens are brought, also of rows that draw nothing.
        brings = jnp.zeros((t,), jnp.bool_).at[place].set(live, mode="drop") | (i == 0)
        row = jnp.where(brings, plan.row, max_rows)
        tokens = _tokens(state, plan._replace(token=jnp.where(i == 0, plan.token, -1)))
        position = plan.position + i
        state, hidden = _compute(model, grid, state, plan, tokens, position, row)
        state, token, logprobs = _draw(model.decoder, bucket, state, plan, hidden, position)
        token = jnp.where(live, token, -1)
        stop = state.settings.stop.at[plan.sample_row].get(mode="clip")
        live = live & ~jnp.any(stop == token[:, None], axis=1) & (i + 1 < plan.room)
        drawn = drawn._replace(
            token=drawn.token.at[i].set(token),
            logprobs=jax.tree.map(lambda x, new: x.at[i].set(new), drawn.logprobs, logprobs),
        )
        return i + 1, state, live, drawn

    drawn = Drawn(
        token=jnp.full((bucket.steps, b), -1, jnp.int32),
        logprobs=_no_logprobs(bucket.steps, b),
        scores=_no_logprobs(t),
    )
    carry = (jnp.int32(0), state, plan.room > 0, drawn)
    if grid.fixed:
        _, state, _, drawn = jax.lax.fori_loop(0, bucket.steps, lambda _, carry: one(carry), carry)
        return state, drawn
    # The first step always runs: it may bring tokens of rows that draw nothing.
    _, state, _, drawn = jax.lax.while_loop(
        lambda carry: (carry[0] == 0) | ((carry[0] < plan.steps) & jnp.any(carry[2])), one, carry
    )
    return state, drawn


def _tokens(state: EngineState, plan: StepPlan[Array]) -> Array:
    """The step's tokens; -1 stands for the one that the row drew last."""
    last = state.last_token.at[plan.row].get(mode="clip")
    return jnp.where(plan.token < 0, last, plan.token)


def _compute(
    model: _Model, grid: Grid, state: EngineState, plan: StepPlan[Array], tokens: Array,
    position: Array, row: Array,
) -> tuple[EngineState, Array]:  # fmt: skip
    """Brings tokens into the rows' pages; also their hidden states [T, E]."""
    max_rows = grid.max_rows
    writer = jnp.where(plan.write, row, max_rows)
    slots = slots_of(state.table, writer, position, grid.page_size)
    pool = write_positions(state.pool, position, slots)
    table = advance(state.table, row)
    work = _work(grid, table, plan, jnp.where(row < max_rows, position, -1))
    room = grid.room_for_partials(tokens.shape[0])
    decoder, heads = model.decoder, model.decoder.config.num_heads
    work = prepare(work, *own_heads(pool, heads, model.mesh), max_partials=room)
    attend = paged_attend(slots, work, decoder.config.layer_windows(), model.mesh)
    hidden, pool = decoder(tokens, position, pool, attend, layers=model.layers)
    history = state.history.at[row, position].set(tokens, mode="drop")
    return dataclasses.replace(state, pool=pool, table=table, history=history), hidden


def _work(grid: Grid, table: PageTable, plan: StepPlan[Array], query_position: Array) -> WorkList:
    items = [Items(index=plan.singles, count=plan.num_singles, max_queries=1,
                   max_pages=grid.split_pages)]  # fmt: skip
    if plan.tiles.shape[0]:
        items.append(Items(index=plan.tiles, count=plan.num_tiles, max_queries=grid.tile_queries,
                           max_pages=grid.split_pages))  # fmt: skip
    return WorkList(
        items=tuple(items), pages=table.pages, length=table.length, query_position=query_position
    )


def _draw(
    decoder: Decoder, bucket: Bucket, state: EngineState, plan: StepPlan[Array], hidden: Array,
    position: Array,
) -> tuple[EngineState, Array, Logprobs]:  # fmt: skip
    """Draws the successors of the sampled places: int32[B] and their log-probabilities."""
    logits = decoder.logits(hidden[plan.sample])
    row = plan.sample_row

    def likeliest() -> tuple[Array, Logprobs]:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return token, _no_logprobs(len(token))

    def asked() -> tuple[Array, Logprobs]:
        settings, history = jax.tree.map(
            lambda x: x.at[row].get(mode="clip"), (state.settings, state.history)
        )
        token = draw(logits, settings, history, position[plan.sample] + 1)
        nothing = functools.partial(_no_logprobs, len(token))
        return token, jax.lax.cond(plan.logprobs, lambda: logprobs_of(logits, token), nothing)

    token, logprobs = _if_asked(bucket, plan, asked, likeliest)
    last_token = state.last_token.at[row].set(token, mode="drop")
    return dataclasses.replace(state, last_token=last_token), token, logprobs


def _if_asked(
    bucket: Bucket, plan: StepPlan[Array], asked: Callable[[], Any], plain: Callable[[], Any]
) -> Any:
    """What a plan that asks for something needs; most do not, and do not pay for it."""
    if bucket.asks is None:
        return jax.lax.cond(plan.asks, asked, plain)
    return asked() if bucket.asks else plain()


def _score(decoder: Decoder, bucket: Bucket, plan: StepPlan[Array], hidden: Array) -> Logprobs:
    """Log-probabilities of the plan's targets, if it has any."""

    def block(arguments: tuple[Array, Array]) -> Logprobs:
        return logprobs_of(decoder.logits(arguments[0]), arguments[1])

    def scored() -> Logprobs:
        pad = -len(hidden) % _SCORED_AT_ONCE
        blocks = jax.tree.map(
            lambda x: jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1)).reshape(
                -1, _SCORED_AT_ONCE, *x.shape[1:]
            ),
            (hidden, plan.target),
        )
        out = jax.lax.map(block, blocks)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[: len(hidden)], out)

    def nothing() -> Logprobs:
        return _no_logprobs(len(hidden))

    def asked() -> Logprobs:
        return jax.lax.cond(jnp.any(plan.target >= 0), scored, nothing)

    return _if_asked(bucket, plan, asked, nothing)


def _no_logprobs(*shape: int) -> Logprobs:
    return Logprobs(
        chosen=jnp.zeros(shape, jnp.float32),
        top_token=jnp.zeros((*shape, MAX_LOGPROBS), jnp.int32),
        top=jnp.zeros((*shape, MAX_LOGPROBS), jnp.float32),
    )
