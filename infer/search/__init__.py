"""Tree search: many beginnings of a solution, of which the promising go on, on one cache."""

from kvjax.infer.search.answers import Choice, choose, last_number_or_box, same_answer
from kvjax.infer.search.ledger import Ledger
from kvjax.infer.search.loop import Cost, Level, Searched, SearchParams, search
from kvjax.infer.search.policies import (
    DVTS,
    ETS,
    Allocation,
    Beam,
    BestOfN,
    Frontier,
    Policy,
    Rebase,
)
from kvjax.infer.search.rows import Held, Reward, chat_turns, tags_between
from kvjax.infer.search.token_models import Models, TokenOptions, load_guard
from kvjax.infer.search.token_search import Found, TokenSearch
from kvjax.infer.search.tree import KVSizes, Node, fold_seed, kv_sizes

__all__ = [
    "DVTS",
    "ETS",
    "Allocation",
    "Beam",
    "BestOfN",
    "Choice",
    "Cost",
    "Found",
    "Frontier",
    "Held",
    "KVSizes",
    "Ledger",
    "Level",
    "Models",
    "Node",
    "Policy",
    "Rebase",
    "Reward",
    "SearchParams",
    "Searched",
    "TokenOptions",
    "TokenSearch",
    "chat_turns",
    "choose",
    "fold_seed",
    "kv_sizes",
    "last_number_or_box",
    "load_guard",
    "same_answer",
    "search",
    "tags_between",
]
