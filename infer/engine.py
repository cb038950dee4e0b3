"""The engine: the loop that feeds the step, and never waits for it longer than it must."""

import contextlib
import dataclasses
import functools
import gc
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvjax.cache import CacheConfig, OutOfPages, PageLedger
from kvjax.infer.compilations import NoCompilation
from kvjax.infer.draw import Logprobs, settings_of
from kvjax.infer.planners import make_planner
from kvjax.infer.step import Drawn, EngineState, Params, Seats, give_seats, step
from kvjax.infer.words import to_words
from kvjax.models.decoder import DecoderConfig, join_products, split_layers
from kvjax.plan import Bucket, FirstCome, Grid, Planned, Sampled, Seat, StepPlan
from kvjax.sharding import pool_spec

__all__ = ["Engine", "Output"]

# Requests that one call seats, and the tokens that it brings for them; more need more calls.
_SEATS, _SEATED_TOKENS = 8, 2**16

# Bytes of weights from which on layers are taken apart and products joined: that spares every step
# a copy of them, but takes longer to compile, which matters more for a model tried out on a CPU.
_LARGE = 32 * 2**20

# On a GPU XLA would join products with the same left side by laying their weights side by side in
# every step. On an H200 the MLP's two products of 256 rows took 41 us so, and 29 us by themselves.
_GPU_OPTIONS: dict[str, str | bool] = {"xla_gpu_dot_merger_threshold_mb": "0"}


@dataclasses.dataclass(frozen=True)
class Output:
    """What a call brought a request.

    Attributes:
        id: of the request.
        tokens: those drawn, in order.
        finish_reason: "stop" or "length" with the last ones.
        logprobs: of these tokens, numpy [n, ...]; None unless the request asked for them.
        scores: of the next tokens of its prompt, numpy [n, ...]; None where there are none.
    """

    id: int
    tokens: tuple[int, ...]
    finish_reason: str | None
    logprobs: Logprobs | None
    scores: Logprobs | None


def _shardings(state: EngineState, mesh: Mesh | None) -> tuple[EngineState, NamedSharding] | None:
    """Where the state and what is drawn lie: KV heads split as the model's, all else whole."""
    if mesh is None:
        return None

    place = jax.tree.map(lambda x: NamedSharding(mesh, pool_spec(x, mesh)), state)
    return place, NamedSharding(mesh, PartitionSpec())


class Engine:
    """Answers requests: plans on the host, computes on the device.

    While the device computes a call, the host plans the next one and gives it to the device; only
    then does it read what the first has drawn. So the device never waits for a plan, as long as a
    plan takes less time than a call.

    Args:
        graph: of `nnx.split(decoder)`.
        params: likewise.
        model: the decoder's sizes.
        grid: the planner's sizes.
        num_pages: of the pool.
        mesh: over which the parameters lie, with axes of type Auto and none called `data`, see
            `kvjax.infer.replicas`; None: the default device.
        plan: the policy by which requests are planned, see `make_planner`.
        optimistic: whether requests are admitted that may later have to make room, see `FirstCome`.
        consume: give up `params` as they are taken apart, so that memory holds them once.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[Any],
        params: nnx.State[Any, Any],
        model: DecoderConfig,
        grid: Grid,
        num_pages: int,
        *,
        mesh: Mesh | None = None,
        plan: str = "fcfs-lru",
        optimistic: bool = False,
        consume: bool = False,
    ) -> None:
        self.model: DecoderConfig = model
        self.grid: Grid = grid
        self.cache: CacheConfig = cache_config(model, grid, num_pages)
        layers = None
        if sum(x.nbytes for x in jax.tree.leaves(params)) >= _LARGE:
            split = split_layers(params, consume=consume)
            graph, params, layers = join_products(graph, *split)
        self.graph: nnx.GraphDef[Any] = graph  # of the decoder that the parameters are of
        self._params: Params = (params, layers)
        self._programs: dict[Bucket, Callable[..., tuple[EngineState, Drawn]]] = {}
        self._give_seats: Callable[..., EngineState] | None = None
        self._running: deque[tuple[Planned, Future[Drawn]]] = deque()
        # A search seats all of its rows at once, and each call takes the host as long as a step.
        self._seats: int = max(_SEATS, min(grid.max_rows // 8, _SEATED_TOKENS // grid.max_length))
        state = EngineState.init(*self.cache.init(), grid)
        self._mesh = mesh
        self._shardings = _shardings(state, mesh)
        self.state: EngineState = jax.device_put(state, self._shardings and self._shardings[0])
        self.planner: FirstCome = make_planner(
            plan, grid, PageLedger(num_pages), optimistic=optimistic, grouped=True
        )

    @property
    def params(self) -> Params:
        """The decoder's parameters."""
        return self._params

    def warm_up(self, progress: Callable[[int, int], Any] = lambda done, total: None) -> None:
        """Compiles every shape of the grid; afterwards nothing is ever compiled."""
        if self._programs:
            return
        states, _ = self._shardings or (None, None)
        seats = Seats.empty(self.grid, self.cache.num_pages, self._seats)
        give = functools.partial(give_seats, seats)
        place = jax.jit(give, donate_argnums=0, out_shardings=states)
        options = _GPU_OPTIONS if jax.default_backend() == "gpu" else None
        buckets = self.grid.buckets
        progress(0, len(buckets) + 1)
        # XLA compiles outside of the interpreter's lock: side by side where there are cores, and
        # while the next one is traced.
        with ThreadPoolExecutor() as threads:
            compiling: dict[Any, Bucket | None] = {
                threads.submit(place.lower(self.state, to_words(seats)).compile, options): None
            }
            for bucket in buckets:
                run = functools.partial(step, self.graph, self.grid, bucket, self._mesh)
                jitted = jax.jit(run, donate_argnums=1, out_shardings=self._shardings)
                nothing = to_words(StepPlan.empty(self.grid, bucket))
                lowered = jitted.lower(self._params, self.state, nothing)
                compiling[threads.submit(lowered.compile, options)] = bucket
            for done, program in enumerate(as_completed(compiling), 1):
                if (bucket := compiling[program]) is None:
                    self._give_seats = program.result()
                else:
                    self._programs[bucket] = program.result()
                progress(done, len(compiling))

    @property
    def ready(self) -> bool:
        """Whether the next of `run` need not wait for the device."""
        if len(self._running) < 2:
            return True
        oldest = self._running[0][1]
        if not oldest.done():
            return False
        token: Any = oldest.result().token  # jax.Array's own stub does not know `is_ready`
        return token.is_ready()

    def run(self) -> Generator[list[Output], None, None]:
        """Computes until the planner has nothing left; yields what each call has brought.

        Raises:
            OutOfPages: a request cannot be seated, since pages are held by nobody who will end.
        """
        if self.planner.busy:
            self.warm_up()
        running = self._running
        running.clear()
        with self._device_thread() as device, _spared_heap():
            while self.planner.busy or running:
                planned = self.planner.plan()
                if planned is not None:
                    seats = self._seat_arguments(planned.seats)
                    step = self._put(to_words(planned.step))
                    running.append((planned, device.submit(self._compute, planned, seats, step)))
                elif not running:
                    raise OutOfPages(
                        f"{self.planner.ledger.held} of {self.planner.ledger.num_pages} pages are "
                        "held by chats or loaded prefixes, too many for the next request: close "
                        "some of them or raise the KV memory"
                    )
                if planned is None or len(running) > 1:
                    yield self._receive(*running.popleft())

    def _device_thread(self) -> Executor:
        """Where calls are given to the device.

        A device's loop may keep the thread that started it until it ends: it is not the one that
        plans. A fixed grid has no such loops, and two threads would only wait for each other.
        """
        return _Here() if self.grid.fixed else ThreadPoolExecutor(max_workers=1)

    def _put(self, words: np.ndarray) -> jax.Array:
        """Sends words to the device ahead of the call that needs them."""
        return jax.device_put(words, self._shardings and self._shardings[1])

    def _compute(self, planned: Planned, seats: list[jax.Array], step: jax.Array) -> Drawn:
        """Gives a call to the device."""
        assert self._give_seats is not None
        with NoCompilation():
            for words in seats:
                self.state = self._give_seats(self.state, words)
            self.state, drawn = self._programs[planned.bucket](self._params, self.state, step)
        for array in jax.tree.leaves(_wanted(planned, drawn)):
            array.copy_to_host_async()
        return drawn

    def _receive(self, planned: Planned, drawn: Future[Drawn]) -> list[Output]:
        """Waits for a call and deals out what it brought."""
        wanted = _wanted(planned, drawn.result())
        token, logprobs, scores = jax.tree.map(np.asarray, wanted)
        return [_output(s, logprobs, scores) for s in self.planner.accept(planned, token)]

    def _seat_arguments(self, seats: tuple[Seat, ...]) -> list[jax.Array]:
        """What `give_seats` takes, for as many calls as these seats need."""
        size = self._seats
        groups = (seats[start : start + size] for start in range(0, len(seats), size))
        return [self._put(to_words(self._fill_seats(group))) for group in groups]

    def _fill_seats(self, given: tuple[Seat, ...]) -> Seats:
        seats = Seats.empty(self.grid, self.cache.num_pages, self._seats)
        for i, seat in enumerate(given):
            seats.rows[i], seats.length[i] = seat.row, seat.length
            seats.pages[i, : len(seat.pages)] = seat.pages
            seats.tokens[i, : seat.length] = seat.tokens
            request = seat.request
            if request.sampling is not None:
                prompt = len(request.prompt)
                settings_of(seats.settings, i, request.sampling, request.stop_ids, prompt)
        return seats


class _Here(Executor):
    """Runs what it is given at once, in the caller's thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@contextlib.contextmanager
def _spared_heap() -> Iterator[None]:
    """Lets the garbage collector pass over all that is there already, such as JAX's many objects.

    Going through them takes a quarter of a second, in which nothing is given to the device. What a
    program has frozen itself is thawed with them.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def cache_config(model: DecoderConfig, grid: Grid, num_pages: int) -> CacheConfig:
    """The cache of a decoder behind a planner's sizes."""
    return CacheConfig(
        num_pages=num_pages, page_size=grid.page_size, num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads, head_dim=model.head_dim, max_rows=grid.max_rows,
        pages_per_row=grid.pages_per_row, dtype=model.dtype,
    )  # fmt: skip


def _wanted(planned: Planned, drawn: Drawn) -> tuple[Any, Any, Any]:
    """The parts of what was drawn that somebody asked for; None for the others."""
    scored = any(entry.scored for entry in planned.entries)
    return (
        drawn.token,
        drawn.logprobs if planned.step.logprobs else None,
        drawn.scores if scored else None,
    )


def _output(s: Sampled, logprobs: Logprobs | None, scores: Logprobs | None) -> Output:
    own = scored = None
    if logprobs is not None and s.tokens:
        own = Logprobs(*(x[: len(s.tokens), s.column] for x in logprobs))
    if scores is not None and s.scored is not None:
        scored = Logprobs(*(x[slice(*s.scored)] for x in scores))
    return Output(s.id, s.tokens, s.finish_reason, own, scored)
