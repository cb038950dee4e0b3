"""A conversation that goes on from its pages: every turn computes only what is new."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvjax.errors import InputError
from kvjax.infer.answers import Chunk, Completion
from kvjax.infer.prefix import Prefix, check_idle, load_prefix, save_prefix
from kvjax.infer.sampling import SamplingParams

if TYPE_CHECKING:
    from kvjax.infer.llm import LLM

__all__ = ["Chat"]

Message = Mapping[str, Any]


class Chat:
    """A conversation with a model; `LLM.chat` begins one.

    Between turns it holds the pages of what was said, so that nobody else's requests can evict
    them. A turn's tokens are those of all messages in the model's template, as in a call of
    `LLM.generate`, and so are its answers: the pages only save the work. As a context manager it
    closes itself.
    """

    def __init__(
        self, llm: "LLM", messages: Sequence[Message] = (), prefix: Prefix | None = None
    ) -> None:
        self._llm = llm
        self._messages = [dict(message) for message in messages]
        self._prefix: Prefix | None = prefix or Prefix(llm.engine)

    @staticmethod
    def load(llm: "LLM", path: str | Path) -> "Chat":
        """Goes on with a conversation that `save` wrote; see `LLM.load_chat`."""
        prefix, note = load_prefix(llm.engine, path, "chat")
        return Chat(llm, note["messages"], prefix)

    @property
    def messages(self) -> tuple[dict[str, Any], ...]:
        """What was said: {"role": ..., "content": ...} each."""
        return tuple(dict(message) for message in self._messages)

    @property
    def tokens_held(self) -> int:
        """How many tokens the next turn finds computed, as long as it begins with them."""
        return len(self._open().tokens)

    def send(self, text: str, params: SamplingParams | None = None) -> Completion:
        """Says something and returns the answer; both are then part of the conversation.

        Raises:
            InputError: the conversation has become too long, or memory is held by others; it is
                as it was.
        """
        *_, last = self.stream(text, params)
        assert last.completion is not None, "a stream ends with a completion"
        return last.completion

    def stream(self, text: str, params: SamplingParams | None = None) -> Iterator[Chunk]:
        """Like `send`, but yields the answer piece by piece.

        If the iterator is closed before its end, the conversation is as it was.
        """
        prefix = self._open()
        if params is not None and params.n != 1:
            raise InputError(f"a conversation goes on with one answer: n={params.n} must be 1")
        said = [*self._messages, {"role": "user", "content": text}]
        prompt = self._llm.check(said, params)
        return self._turn(prefix, said, prompt, self._llm.stream([prompt], params))

    def _turn(
        self, prefix: Prefix, said: list[dict[str, Any]], prompt: tuple[int, ...],
        chunks: Iterator[Chunk],
    ) -> Iterator[Chunk]:  # fmt: skip
        check_idle(prefix.engine)
        prefix.cut(prompt)  # a template may drop what was said: no need to hold what it dropped
        for chunk in chunks:
            if (answer := chunk.completion) is not None:
                self._messages = [*said, {"role": "assistant", "content": answer.text}]
                if self._prefix is not None:  # it may have been closed while it spoke
                    prefix.follow((*prompt, *answer.token_ids))
            yield chunk

    def save(self, path: str | Path) -> None:
        """Writes the messages and the pages, for `LLM.load_chat`.

        Raises:
            InputError: the file cannot be written.
        """
        save_prefix(self._open(), path, {"kind": "chat", "messages": list(self.messages)})

    def close(self) -> None:
        """Gives up the pages. The messages stay readable."""
        if self._prefix is not None:
            self._prefix.close()
        self._prefix = None

    def _open(self) -> Prefix:
        if self._prefix is None:
            raise InputError("the conversation was closed: begin another with its messages")
        return self._prefix

    def __enter__(self) -> "Chat":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()
