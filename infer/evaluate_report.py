"""The report of an evaluation: accuracy over bytes, accuracy by depth, one page of HTML."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kvjax.infer.evaluate_results import show_table

__all__ = ["write_report"]

_DEPTHS = 10
_MARKS = "osv^D<>ph*Xd"


def write_report(
    folder: Path, results: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]
) -> None:
    """Writes curves_*.png, depth_*.png, and report.html with both and the table.

    Args:
        folder: where to.
        results: of `summarize_answers`.
        lines: the answers.
    """
    pictures = {}
    for length, protocol in dict.fromkeys((r["length"], r["protocol"]) for r in results):
        own = [r for r in results if (r["length"], r["protocol"]) == (length, protocol)]
        pictures[f"curves_{length}_{protocol}"] = _png(_curves(own, length, protocol))
    for protocol in dict.fromkeys(r["protocol"] for r in results):
        figure = _depths([x for x in lines if x["protocol"] == protocol], protocol)
        if figure is not None:
            pictures[f"depth_{protocol}"] = _png(figure)
    for name, data in pictures.items():
        (folder / f"{name}.png").write_bytes(data)
    (folder / "report.html").write_text(_page(results, pictures), encoding="utf-8")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)
    return stream.getvalue()


def _curves(results: Sequence[dict[str, Any]], length: int, protocol: str) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for number, policy in enumerate(dict.fromkeys(r["policy"] for r in results)):
        own = sorted((r for r in results if r["policy"] == policy), key=lambda r: r["bytes"])
        share = [r["bytes"] / r["bytes_full"] for r in own]
        mean = np.asarray([100 * r["accuracy"] for r in own])
        low, high = 100 * np.asarray([r["interval"] for r in own]).T
        axes.errorbar(
            share, mean, yerr=[mean - low, high - mean], label=policy[:48], capsize=2,
            marker=_MARKS[number % len(_MARKS)], color=f"C{number % 10}",
            linestyle="-" if number < 10 else "--",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set(xlabel="bytes held, of the whole cache's", ylabel="answers right, %", ylim=(-2, 102))
    axes.set_title(f"{length} tokens, protocol {protocol}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _depths(lines: Sequence[dict], protocol: str) -> Figure | None:
    """Share of right answers by where the first needle stands, and by length."""
    lines = [line for line in lines if line["depth"] is not None]
    if not lines:
        return None
    pairs = list(dict.fromkeys((line["policy"], line["budget"]) for line in lines))
    lengths = sorted({line["length"] for line in lines})
    columns = 6
    height = -(-len(pairs) // columns)
    figure = Figure(figsize=(3 * columns, 1.2 + height * (1 + 0.5 * len(lengths))),
                    layout="constrained")  # fmt: skip
    for number, pair in enumerate(pairs):
        axes = figure.add_subplot(height, columns, number + 1)
        own = [x for x in lines if (x["policy"], x["budget"]) == pair]
        _heat_map(axes, own, lengths)
        axes.set_title(f"{pair[0][:28]} {pair[1]}", fontsize="x-small")
    figure.suptitle(f"answers right by depth of the first needle, protocol {protocol}")
    return figure


def _heat_map(axes: Axes, lines: Sequence[dict], lengths: Sequence[int]) -> None:
    total, count = np.zeros((2, len(lengths), _DEPTHS))
    for line in lines:
        place = lengths.index(line["length"]), min(int(_DEPTHS * line["depth"]), _DEPTHS - 1)
        total[place] += line["score"]
        count[place] += 1
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    axes.imshow(mean, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto", extent=(0, 1, len(lengths), 0))
    axes.set_yticks(np.arange(len(lengths)) + 0.5, [str(x) for x in lengths], fontsize="xx-small")
    axes.set_xticks([0, 0.5, 1], ["0", "depth", "1"], fontsize="xx-small")


def _page(results: Sequence[dict[str, Any]], pictures: dict[str, bytes]) -> str:
    images = "\n".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{base64.b64encode(data).decode()}"></p>'
        for name, data in pictures.items()
    )
    return (
        '<!doctype html><meta charset="utf-8"><title>kvjax eval</title>'
        "<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:2px 6px;text-align:right}"
        "img{max-width:100%}</style>\n<h1>kvjax eval</h1>\n"
        f"{_tables(show_table(results))}\n{images}\n"
    )


def _tables(text: str) -> str:
    """Markdown tables as HTML."""
    out = []
    for block in text.split("\n\n"):
        if not block.startswith("|"):
            out.append(f"<h2>{html.escape(block)}</h2>")
            continue
        rows = [line.strip("| ").split(" | ") for line in block.splitlines()]
        cells = (
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in (rows[0], *rows[2:])
        )
        out.append(f"<table>{''.join(cells)}</table>")
    return "\n".join(out)
