"""Pieces of an HTML page that stands alone: one file, no network, no script; it opens by double click and prints.

Numbers stand in `data` elements: the text is rounded for reading, the attribute `value` has all digits. Texts that come
from files and command lines are escaped by whoever makes a cell of them; `document` and `figure` escape their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from tta_edge.comparison import Difference


def document(title: str, sections: Sequence[str]) -> str:
    """A whole page.

    Args:
        title: text.
        sections: HTML, in order.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        # The browser itself holds the file to its promise: nothing is loaded, nothing runs.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def section(heading: str, *parts: str, name: str = "") -> str:
    """A part of the page under a heading.

    Args:
        heading: text.
        parts: HTML.
        name: of the section, once on a page; by default the heading in plain letters.
    """
    name = name or re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")
    return (
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n'
        + "\n".join(parts)
        + "\n</section>"
    )


def table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], footer: Sequence[str] | None = None
) -> str:
    """A table from cells that are HTML already; the first column names the rows."""
    head = "".join(f'<th scope="col">{each}</th>' for each in heads)
    body = "".join(_row(row) for row in rows)
    foot = f"<tfoot>{_row(footer)}</tfoot>" if footer is not None else ""
    return (
        f'<div class="scroll"><table>\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody>{foot}\n</table></div>"
    )


def _row(cells: Sequence[str]) -> str:
    return (
        f'<tr><th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>\n"
    )


def figure(plot: str, caption: str) -> str:
    """A plot with what it shows."""
    return f'<figure><div class="scroll">{plot}</div><figcaption>{escape(caption)}</figcaption></figure>'


def number(value: float | None, text: str) -> str:
    """A number with all its digits behind the rounded text."""
    return text if value is None else f'<data value="{value!r}">{text}</data>'


def difference(value: Difference | None) -> str:
    """A difference in points with all its digits behind it, or a dash."""
    return "–" if value is None else number(value.value, points(value))


def points(difference: Difference) -> str:
    """In points, with its standard error where there is one."""
    text = f"{100 * difference.value:+.1f}".replace("-", "−")
    if difference.standard_error is not None:
        text += f" ± {100 * difference.standard_error:.1f}"
    return text


def percent(value: float | None) -> str:
    """A fraction in percent, or a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def fraction(value: float | None) -> str:
    """A number with two digits, or a dash."""
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def count(number: int, word: str) -> str:
    """A number of things: 1 step, 2 steps."""
    return f"{number} {word}" + ("" if number == 1 else "s")


BEST = '<span class="mark" aria-hidden="true">★</span>'
WORSE = '<span class="mark" aria-hidden="true">▲</span>'

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fffffe; --ink: #1b1f24; --soft: #57606a; --line: #d6dae0; --tint: #f4f6f8;
  --good: #00694b; --bad: #a33c00; --frozen: #6b7380;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #009e73;
  --series-3: #cc79a7; --series-4: #56b4e9; --series-5: #e69f00;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e8eaed; --soft: #a3abb5; --line: #363c43; --tint: #1e2226;
    --good: #46d3a3; --bad: #ff9a5c; --frozen: #9aa3af;
    --series-0: #58b2ee; --series-1: #f08442; --series-2: #2fc396;
    --series-3: #e09cc3; --series-4: #9bd6f7; --series-5: #f2b63a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 3rem; max-width: 64rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
header dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .5rem 1.2rem; margin: 0;
}
header dl .wide { grid-column: 1 / -1; }
header dl .wide dd { font: .875rem/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; overflow-wrap: anywhere; }
header p, .note, figcaption, caption { color: var(--soft); font-size: .875rem; }
header p { margin: 1rem 0 .25rem; }
pre {
  margin: 0; padding: .7rem .9rem; background: var(--tint); border: 1px solid var(--line); border-radius: .3rem;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem;
}
.verdict { margin: 0 0 1rem; padding-left: 1.2rem; }
.verdict li { margin: .25rem 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; min-width: 50%; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .3rem .8rem; text-align: right; vertical-align: baseline; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; }
thead th { font-weight: 600; border-bottom: 2px solid var(--soft); vertical-align: bottom; }
tfoot th, tfoot td { border-top: 2px solid var(--soft); border-bottom: 0; font-weight: 600; }
td, tbody th, tfoot th { white-space: nowrap; }
td small { display: block; font-size: .75rem; font-weight: 400; color: var(--soft); }
th small { font-weight: 400; color: var(--soft); }
.best { font-weight: 700; }
.best .mark { color: var(--good); }
.worse, .worse .mark { color: var(--bad); }
.mark { font-size: .8em; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
figure { margin: 0; }
.plot { display: block; width: 100%; min-width: 40rem; height: auto; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
footer dl { display: grid; grid-template-columns: max-content 1fr; gap: .4rem 1.2rem; margin: 0; font-size: .875rem; }
footer dt { font-size: inherit; }
@media (max-width: 40rem) { footer dl { grid-template-columns: 1fr; } footer dd { margin-bottom: .4rem; } }
@media print {
  html { font-size: 9.5pt; }
  body { max-width: none; padding: 0; }
  .plot { min-width: 0; }
  figure, tr, pre, .verdict li, footer dd { break-inside: avoid; }
  h2, caption, thead, .note, footer dt { break-after: avoid; }
}
"""
