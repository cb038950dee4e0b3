"""A searched tree to look at: as JSON, and as an SVG picture with what was pruned and why."""

from html import escape
from typing import Any

from kvjax.infer.search.tree import Node

__all__ = ["tree_json", "tree_svg"]

_ROW, _COLUMN, _MARGIN = 15, 130, 24
_COLOURS = {"": "#2a7f3f", "finished": "#1f5fae"}
_LOST = "#b9b9b9"


def tree_json(node: Node) -> dict[str, Any]:
    """A node with all below it, as plain values."""
    return {
        "text": node.text,
        "tokens": len(node.tokens),
        "score": round(node.score, 6),
        "count": node.count,
        "width": node.width,
        "fate": node.fate or "continued",
        "children": [tree_json(child) for child in node.children],
    }


def tree_svg(root: Node, chosen: Node | None = None) -> str:
    """The picture of a tree: a level a column, green what went on, blue what ended, grey the rest.

    The path of the chosen leaf is drawn thick. What a node says, its score and its fate show when
    the mouse rests on it.
    """
    places = _places(root)
    best = {id(node) for node in chosen.lineage()} if chosen is not None else set()
    lines, dots = [], []
    for node in root.walk():
        x, y = places[id(node)]
        if node.parent is not None:
            px, py = places[id(node.parent)]
            thick = 3 if id(node) in best else 1
            lines.append(
                f'<path d="M{px} {py}C{px + _COLUMN // 2} {py} {x - _COLUMN // 2} {y} {x} {y}" '
                f'fill="none" stroke="{_colour(node)}" stroke-width="{thick}"/>'
            )
        dots.append(_dot(node, x, y))
    width = 2 * _MARGIN + _COLUMN * (1 + max(node.depth for node in root.walk()))
    height = 2 * _MARGIN + max(y for _, y in places.values())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'font-family="monospace" font-size="9">\n<rect width="100%" height="100%" fill="white"/>\n'
        + "\n".join([*lines, *dots])
        + "\n</svg>\n"
    )


def _colour(node: Node) -> str:
    return _COLOURS.get(node.fate, _LOST)


def _dot(node: Node, x: int, y: int) -> str:
    times = f" x{node.count}" if node.count > 1 else ""
    told = f"{node.text}\nscore {node.score:.3f}{times}\n{node.fate or 'continued'}"
    label = node.text if len(node.text) < 20 else node.text[:19] + "…"
    size = 2 + min(6, node.width // 2)
    told, label = _printable(told), _printable(label)
    return (
        f'<g><title>{escape(told)}</title><circle cx="{x}" cy="{y}" r="{size}" '
        f'fill="{_colour(node)}"/><text x="{x + 9}" y="{y + 3}" fill="#444">'
        f"{escape(label.strip())}</text></g>"
    )


def _printable(text: str) -> str:
    """A text that XML can hold: it has no control characters, however escaped."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _places(root: Node) -> dict[int, tuple[int, int]]:
    """Where each node is: leaves below each other, a node at the middle of its children."""
    places: dict[int, tuple[int, int]] = {}
    rows = 0
    for node in reversed(list(root.walk())):  # children before parents
        x = _MARGIN + _COLUMN * node.depth
        if node.children:
            ys = [places[id(child)][1] for child in node.children]
            places[id(node)] = (x, (min(ys) + max(ys)) // 2)
        else:
            places[id(node)] = (x, _MARGIN + _ROW * rows)
            rows += 1
    return places
