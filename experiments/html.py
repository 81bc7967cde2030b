"""Pages that ask nothing of the network: their style, tables and pictures."""

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import polars as pl

STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#59636e;--line:#d1d9e0;--back:#fff;--card:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9198a1;--line:#3d444d;--back:#0d1117;--card:#151b23}
figure svg{filter:invert(1) hue-rotate(180deg)}}
*{box-sizing:border-box}body{margin:0 auto;padding:1rem;max-width:70rem;color:var(--text);background:var(--back);
font:1rem/1.5 system-ui,sans-serif}h1{font-size:1.5rem;margin:.2em 0}h2{font-size:1.15rem;margin:2em 0 .4em;border-bottom:1px solid var(--line)}
p.soft,figcaption,td.soft{color:var(--soft);font-size:.875rem}nav{font-size:.875rem}nav a{margin-right:.8em}a{color:inherit}
.cards{display:flex;flex-wrap:wrap;gap:.6rem}.cards div{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .8rem}
.cards b{display:block;font-size:1.25rem}.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}
thead th{vertical-align:bottom;color:var(--soft);font-weight:600}figure{margin:.5rem 0}figure svg{max-width:100%;height:auto}
pre{background:var(--card);padding:.6rem;overflow-x:auto;font-size:.8rem}
@media print{body{max-width:none}details{display:none}h2{break-after:avoid}figure,tr{break-inside:avoid}nav{display:none}}
"""


def text(value: Any) -> str:
    return "" if value is None else html.escape(str(value))


def table(frame: pl.DataFrame) -> str:
    """A table as HTML; where there is no value the cell is a dash."""
    head = "".join(f"<th>{text(column)}</th>" for column in frame.columns)
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td>{'-' if cell is None else text(f'{cell:,}' if isinstance(cell, int) else cell)}</td>" for cell in row
        )
        + "</tr>"
        for row in frame.iter_rows()
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def soft(sentence: str) -> str:
    """A remark."""
    return f'<p class="soft">{text(sentence)}</p>'


@contextmanager
def figure(size: tuple[float, float], into: list[str], caption: str) -> Iterator[Any]:
    """A matplotlib figure to draw on, which is appended as an SVG afterwards."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        drawn = Figure(figsize=size, layout="constrained")
        drawn.patch.set_alpha(0)
        FigureCanvasSVG(drawn)
        yield drawn
        content = io.StringIO()
        drawn.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = content.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{text(caption)}" ', 1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    into.append(f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>")


def page(title: str, subject: str, cards: dict[str, str], sections: list[tuple[str, str]]) -> str:
    """A whole page.

    Args:
        title: its heading.
        subject: a sentence below it.
        cards: what is to be seen first: name -> value.
        sections: headings and what is below them, as HTML.
    """
    parts = "".join(
        f'<section id="s{k}"><h2>{text(head)}</h2>{body}</section>' for k, (head, body) in enumerate(sections)
    )
    links = "".join(f'<a href="#s{k}">{text(head)}</a>' for k, (head, _) in enumerate(sections))
    shown = "".join(f"<div><span>{text(name)}</span><b>{text(value)}</b></div>" for name, value in cards.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><header><h1>{text(title)}</h1>{soft(subject)}"
        f'<div class="cards">{shown}</div><nav><p>{links}</p></nav></header>{parts}</body></html>\n'
    )
