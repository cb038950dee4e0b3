"""The demo of the model `tiny`: `python -m kvjax.train.tasks.demo demos` writes its two files.

requests.jsonl holds the requests of `kvjax batch`, expected.jsonl what they should answer.
"""

import json
import sys
from pathlib import Path
from typing import Any

from kvjax.train.tasks.example import Setting
from kvjax.train.tasks.mixture import Mixture

__all__ = ["main", "make_requests"]

# Another seed than those of training and of its evaluation: these documents are seen nowhere else.
SEED = 2_000_000
DOCUMENTS = 8
MIXTURE = Mixture(tasks=("multi_key",), setting=Setting(tokens=440, fill=0.8))


def make_requests(
    seed: int,
    documents: int,
    mixture: Mixture,
    *,
    model: str = "tiny",
    max_tokens: int = 8,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Requests in the OpenAI batch form, each with one question, and what they should answer.

    Questions are asked in turn of every document, so that requests which share a document lie
    apart, as they do in a file that nobody sorted.

    Returns:
        The requests, and {"custom_id", "answer"} of each, in the same order.
    """
    chats = [mixture.make(seed, index).messages() for index in range(documents)]
    requests, answers = [], []
    for question in range(min(len(chat) // 2 for chat in chats)):
        for document, (system, *turns) in enumerate(chats):
            asked, answer = turns[2 * question : 2 * question + 2]
            name = f"doc{document}-q{question}"
            body = {"model": model, "messages": [system, asked], "max_tokens": max_tokens}
            requests.append(_request(name, body | {"temperature": 0}))
            answers.append({"custom_id": name, "answer": answer["content"]})
    return requests, answers


def _request(name: str, body: dict) -> dict:
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def main(argv: list[str] | None = None) -> int:
    """Writes the demo into the folder that the only argument names."""
    folder = Path((sys.argv[1:] if argv is None else argv)[0])
    requests, answers = make_requests(SEED, DOCUMENTS, MIXTURE)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("requests.jsonl", requests), ("expected.jsonl", answers)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
