"""Draws charts as PNG files and as one self-contained HTML page.

A chart in the page is inline SVG: its lines keep their colours, its ink (axes, text) is the page's own, light or dark.
The page loads nothing and runs no script; its content security policy says so to the browser.
"""

import dataclasses
import html
import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter, ScalarFormatter

COLORS = ("#2f7ed8", "#d1495b", "#2a9d5c", "#b8860b", "#8e6fc9", "#d1679a", "#2fa3a3", "#8a8a8a")
DASHES = ("solid", "dashed", "dotted", "dashdot")
STYLES = [(color, dash) for dash, color in itertools.product(DASHES, COLORS)]
REFERENCE = "#9a7b4f"
MOST_INSIDE = 6  # curves that a legend among them may name
INK = "#1f2328"  # of axes and text in a PNG file; in the page it gives way to the page's own


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve, and the band between its lowest and highest run where it is a mean of several."""

    label: str
    style: tuple[str, str]  # colour, dashes
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves of one quantity.

    Attributes:
      slug: the name of its PNG file.
      percent: the y values are shares of 1.
      unit: of the x values: "" for steps, else a unit that takes prefixes ("FLOP").
      reference: a horizontal line, label -> value.
    """

    slug: str
    title: str
    note: str
    x_label: str
    y_label: str
    lines: list[Line]
    unit: str = ""
    percent: bool = False
    reference: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str
    note: str
    head: list[str]
    rows: list[list[str]]


@dataclasses.dataclass(frozen=True)
class Report:
    """What a page shows, from top to bottom."""

    title: str
    notes: list[str]
    tables: list[Table]
    charts: list[Chart]


def draw(chart: Chart) -> Figure:
    colored = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    inked: Any = dict.fromkeys(colored, INK)
    with matplotlib.rc_context(inked):
        below = math.ceil(len(chart.lines) / 2) if len(chart.lines) > MOST_INSIDE else 0  # rows of the legend
        figure = Figure(figsize=(7, 4 + 0.2 * below), layout="constrained")
        axes = figure.subplots()
        for line in chart.lines:
            color, dash = line.style
            marker = "o" if len(line.x) <= 40 else None
            axes.plot(
                line.x, line.y, color=color, linestyle=dash, linewidth=2, marker=marker, markersize=4, label=line.label
            )
            if any(low < high for low, high in zip(line.low, line.high, strict=True)):
                axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
        for label, value in chart.reference.items():
            axes.axhline(value, color=REFERENCE, linestyle=(0, (6, 3)), linewidth=1.5, label=label)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.xaxis.set_major_formatter(EngFormatter(unit=chart.unit) if chart.unit else ScalarFormatter())
        if chart.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if below:  # inside it would hide the curves
            figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
        else:
            axes.legend(frameon=False)
    return figure


def svg(chart: Chart, figure: Figure) -> str:
    """The chart as an element of the page, without size: it is as wide as its place."""
    with matplotlib.rc_context({"svg.hashsalt": chart.slug, "svg.fonttype": "none", "font.family": "sans-serif"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    element = text.getvalue()
    element = element[element.index("<svg") :].replace(INK, "currentColor")
    return element.replace("<svg", f'<svg role="img" aria-label="{html.escape(chart.title)}"', 1)


def write(folder: Path, report: Report) -> Path:
    """Writes the page, and each chart as a PNG file, into `folder` -> the page."""
    folder.mkdir(parents=True, exist_ok=True)
    drawings = []
    for chart in report.charts:
        figure = draw(chart)
        figure.savefig(folder / f"{chart.slug}.png", dpi=120)
        drawings.append(markupsafe.Markup(svg(chart, figure)))
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    page = folder / "index.html"
    temporary = page.with_suffix(".tmp")
    temporary.write_text(template.render(report=report, drawings=drawings), encoding="utf-8")
    temporary.replace(page)
    return page


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{{ report.title }}</title>
<style>
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --soft: #59636e; --rule: #d1d9e0; --note: #fff8e1; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --ink: #e6edf3; --soft: #9aa4ae; --rule: #30363d; --note: #2b2411; }
}
body { margin: 0 auto; max-width: 80rem; padding: 1rem 1.5rem 4rem; background: var(--page); color: var(--ink);
       font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 60rem; color: var(--soft); }
ul.notes { padding: .5rem 1rem .5rem 2rem; border-left: .25rem solid #b8860b; background: var(--note); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--rule); text-align: right; vertical-align: top; }
th { font-weight: 600; }
th, td { white-space: nowrap; }
th:first-child { text-align: left; }
td.long { min-width: 14rem; white-space: normal; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 0 2rem; }
.charts svg { width: 100%; height: auto; color: var(--ink); }
</style>
</head>
<body>
<h1>{{ report.title }}</h1>
{% if report.notes %}
<ul class="notes">
{% for note in report.notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
{% endif %}
{% for table in report.tables %}
<h2>{{ table.title }}</h2>
<p>{{ table.note }}</p>
<div class="scroll">
<table>
<thead><tr>{% for cell in table.head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr><th scope="row">{{ row[0] }}</th>
{% for cell in row[1:] %}
<td{{ " class=long" if cell|length > 32 }}>{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table>
</div>
{% endfor %}
<div class="charts">
{% for chart in report.charts %}
<section>
<h2>{{ chart.title }}</h2>
<p>{{ chart.note }}</p>
{{ drawings[loop.index0] }}
</section>
{% endfor %}
</div>
</body>
</html>
"""
