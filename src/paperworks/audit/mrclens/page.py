"""The page that stands alone: what a report's HTML looks like."""

import base64
import io

from jinja2 import Environment
from matplotlib.figure import Figure


def png(figure: Figure) -> str:
    """A figure as base64, to stand inside a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return base64.b64encode(buffer.getvalue()).decode()


PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
    """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>MRCLens: {{ name }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: left; font-variant-numeric: tabular-nums }
tr.biased td:last-child { color: #b00020; font-weight: 600 }
img { max-width: 100% }
</style></head><body>
<h1>MRCLens: {{ name }}</h1>
{% for sentence in sentences %}<p>{{ sentence }}</p>
{% endfor %}
<h2>Cues</h2>
<table><tr>{% for title in header %}<th>{{ title }}</th>{% endfor %}</tr>
{% for finding, row in table %}
<tr{% if finding.biased %} class="biased"{% endif %} title="{{ finding.about }}">
{%- for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
{% for name, png in figures.items() %}<p><img alt="{{ name }}" src="data:image/png;base64,{{ png }}"></p>
{% endfor %}
{% if gaps %}<h2>A model that follows a cue</h2>
<table><tr><th>cue</th><th>gets right</th><th>above chance</th><th>where a cue helps</th><th>elsewhere</th></tr>
{% for name, gap in gaps.items() %}
<tr><td>{{ name }}</td><td>{{ "%.3f"|format(gap.accuracy) }}</td><td>{{ "%+.3f"|format(gap.gain) }}</td>
<td>{{ "%.3f"|format(gap.biased) }}</td><td>{{ "–" if gap.anti is none else "%.3f"|format(gap.anti) }}</td></tr>
{% endfor %}</table>{% endif %}
{% if rows %}<h2>Questions that a biased cue solves</h2>
<p>{{ rows|length }} of {{ total }}.</p>
<table><tr><th>id</th><th>question</th><th>answer</th><th>cues</th></tr>
{% for row in rows %}
<tr><td>{{ row.id }}</td><td>{{ row.question }}</td><td>{{ row.answer }}</td><td>{{ row.cues|join(", ") }}</td></tr>
{% endfor %}</table>{% endif %}
</body></html>
"""
)
