"""The pages themselves: their style and frame, and the report's template. What fills them is `report`'s and `search_page`'s."""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf6; --ink: #23211d; --soft: #6b665c; --line: #e5e0d4; --tint: #f3f0e8;
  --model: #0d5f66; --other: #a79d8c; --warm: #a8481f; --good: #2c6a3c;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", "Source Serif 4", "Noto Serif", Georgia,
    "Songti SC", "Noto Serif CJK SC", "Source Han Serif SC", SimSun, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Noto Sans CJK SC",
    "Microsoft YaHei", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "Noto Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15161a; --ink: #e6e2d9; --soft: #a09a8e; --line: #303239; --tint: #1d1f24;
    --model: #74c4c8; --other: #857f73; --warm: #e2916a; --good: #8bc795;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 var(--sans); overflow-wrap: anywhere; }
main, header, footer { max-width: 47.5rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 4.5rem; }
.eyebrow { color: var(--soft); font-size: .8125rem; letter-spacing: .06em; margin: 0 0 1.25rem; }
h1, h2 { font-family: var(--serif); font-weight: 500; text-wrap: balance; letter-spacing: -.008em; }
h1 { font-size: clamp(1.75rem, 5.2vw, 2.75rem); line-height: 1.18; margin: 0 0 1rem; }
h2 { font-size: clamp(1.35rem, 3.6vw, 1.75rem); line-height: 1.25; margin: 0 0 .75rem; }
h3 { font-size: .8125rem; font-weight: 600; color: var(--soft); letter-spacing: .03em; margin: 2rem 0 .5rem; }
.lead { font-family: var(--serif); font-size: 1.1875rem; line-height: 1.5; color: var(--soft); margin: 0 0 1.75rem; max-width: 38rem; }
section { padding: 3.25rem 0 0; }
section > .eyebrow { max-width: none; margin: 0 0 .6rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p { margin: 0 0 1rem; max-width: 40rem; }
small, .small { font-size: .875rem; color: var(--soft); line-height: 1.55; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(6.4rem, 1fr)); gap: 1.1rem .9rem; margin: 0;
  border-top: 1px solid var(--line); padding-top: 1.1rem; }
dl.facts div { display: flex; flex-direction: column-reverse; justify-content: flex-end; }
dl.facts dt { color: var(--soft); font-size: .8125rem; }
dl.facts dd { margin: 0; font: 500 1.375rem/1.3 var(--serif); font-variant-numeric: lining-nums; }
figure { margin: 1.75rem 0; break-inside: avoid; }
.narrow { display: none; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem 2.5rem; }
table { border-collapse: collapse; width: 100%; font-size: .9375rem; font-variant-numeric: tabular-nums; margin: 1rem 0 1.25rem; }
th { text-align: left; font-weight: 600; font-size: .8125rem; color: var(--soft); vertical-align: bottom; }
th, td { padding: .55rem 1rem .55rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
td small { display: block; }
td.figure { white-space: nowrap; }
.scroll th, .scroll .numbers td:first-child { overflow-wrap: normal; }
.scroll { overflow-x: auto; }
.stack td > span { white-space: nowrap; }
.stack th:first-child, .stack td:first-child { min-width: 11rem; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
.ours { color: var(--model); font-weight: 600; }
.better { color: var(--good); } .worse { color: var(--warm); }
.pair h3 { margin-top: .5rem; }
dl.list { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.5rem; margin: .5rem 0 1.25rem; font-size: .9375rem; }
dl.list dt { color: var(--soft); }
dl.list dd { margin: 0; font-variant-numeric: tabular-nums; }
.sample { margin: 1.5rem 0 2rem; border-left: 2px solid var(--model); padding-left: 1.25rem; break-inside: avoid; }
.sample blockquote { margin: 0; font: 1.125rem/1.65 var(--serif); white-space: pre-wrap; }
.sample b { font-weight: 600; color: var(--model); }
.sample figcaption { margin-top: .6rem; }
.sample img, td img { display: block; min-height: 3.5rem; max-height: 6rem; image-rendering: pixelated; border-radius: 3px; }
.sample.made { display: inline-block; width: 12rem; vertical-align: top; }
.sample.made blockquote { font-size: .9375rem; }
.sample img { display: inline-block; margin: 0 .6rem .6rem 0; }
.scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 1.25rem; }
details { border-top: 1px solid var(--line); padding: .7rem 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; color: var(--soft); font-size: .9375rem; }
summary:hover { color: var(--ink); }
pre, code { font: .8438rem/1.6 var(--mono); }
pre { background: var(--tint); padding: .9rem 1.1rem; border-radius: 4px; overflow-x: auto; margin: .75rem 0 1rem; white-space: pre-wrap; }
pre.command { user-select: all; margin: .5rem 0; }
.examples li { font: .8438rem/1.6 var(--mono); white-space: pre-wrap; }
.examples { padding-left: 1.1rem; margin: .3rem 0 .9rem; }
footer { padding-top: 3.5rem; padding-bottom: 4rem; }
@media (max-width: 42rem) {
  header { padding-top: 2.25rem; }
  section { padding-top: 2.25rem; }
  .wide { display: none; }
  .narrow { display: block; }
  .pair { grid-template-columns: 1fr; }
  .lead { font-size: 1.0625rem; }
  dl.facts { grid-template-columns: 1fr 1fr; }
  dl.list { grid-template-columns: 8.5rem 1fr; gap: .2rem 1rem; }
  dl.long { grid-template-columns: 1fr; gap: 0; }
  dl.long dd { margin-bottom: .6rem; }
  .sample { padding-left: 1rem; }
  .sample blockquote { font-size: 1.0625rem; }
  .stack thead { display: none; }
  .stack tr { display: block; padding: .7rem 0; border-bottom: 1px solid var(--line); }
  .stack td { display: grid; grid-template-columns: 7.5rem 1fr; padding: .15rem 0; border: 0; }
  .stack td:first-child { display: block; min-width: 0; font-weight: 600; }
  .stack td:first-child small { font-weight: 400; }
  .stack td::before { content: attr(data-label); color: var(--soft); font-size: .875rem; }
  .stack td:first-child::before { content: none; }
  .stack td > span { display: block; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #ccc; --tint: #f5f5f5; --model: #0d5f66; --other: #999; --warm: #a8481f; --good: #2c6a3c; }
  body { font-size: 10.5pt; }
  header { padding-top: 0; }
  section { padding-top: 1.75rem; }
  h1, h2, h3, summary { break-after: avoid; }
  main, header, footer { max-width: none; padding: 0; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
}
"""

PAGE = """\
<header>
<p class="eyebrow">{{ report.name }}{% if report.task %} · {{ report.task|label }}{% endif %}{% if report.created %} · {{ report.created[:16]|replace("T", " ") }}{% endif %}</p>
<h1>{{ headline|capitalise|unbroken }}</h1>
{% if report.description %}
<p class="lead" lang="{{ report.description|lang }}">{{ report.description }}</p>
{% endif %}
{% if facts %}
<dl class="facts">
{% for name, value in facts %}
<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}
</dl>
{% endif %}
</header>
<main>
{% if metric %}
<section id="result">
<p class="eyebrow">Result</p>
<h2>{{ verdict|unbroken }}</h2>
<p class="small">{{ metric.metric|measure|capitalise }}, measured on: {{ metric.protocol }}.</p>
<figure>{{ interval_figure }}</figure>
<div class="scroll"><table class="stack">
<thead><tr><th>metric</th><th>this model</th>{% for name in baselines %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for m in report.metrics %}
<tr>
<td>{{ m.metric|measure }}<small>{{ m.protocol }}</small></td>
<td data-label="this model"><span class="ours">{{ m.model|interval }}</span></td>
{% for name in baselines %}
<td data-label="{{ name }}"><span>{% if name in m.baselines %}{{ m.baselines[name]|interval }} <small class="{{ m.verdict(name)|label if m.verdict(name) != 'cannot tell' else '' }}">{{ "model is " ~ m.verdict(name) if m.verdict(name) != "cannot tell" else "cannot tell" }}</small>{% else %}–{% endif %}</span></td>
{% endfor %}
</tr>
{% endfor %}
</tbody>
</table></div>
<p class="small">Brackets hold the 95 % bootstrap interval. A model is called better or worse than a baseline only when the interval of their difference on the same text leaves out zero.{% if not metric.model.known %} There was too little text for an interval.{% endif %}{% if not metric.baselines %} No baseline was measured, so this number stands alone.{% endif %}{% if metric.metric == "bits_per_byte" %} Bits per byte is what it costs to encode unseen text with the model: lower is better, and it can be compared between tokenizers, which loss and perplexity cannot.{% endif %}</p>
</section>
{% endif %}
{% if errors %}
<section id="errors">
<p class="eyebrow">Errors</p>
<h2>Where it is right and where it is wrong</h2>
{% for note in report.notes %}<p class="small">{{ note|capitalise }}.</p>{% endfor %}
{% if report.leakage.rows %}
<details><summary>Some of the rows that nearly repeat a training row</summary><ul class="examples">{% for text in report.leakage.examples %}<li lang="{{ text|lang }}">{{ text }}</li>{% endfor %}</ul></details>
{% endif %}
{% if reliability %}<figure>{{ reliability }}</figure>{% endif %}
{% for title, figure in drawings %}<h3>{{ title }}</h3><figure>{{ figure }}</figure>{% endfor %}
{% for table in errors %}
{% if table.folded %}<details><summary>{{ table.title|capitalise }} ({{ table.rows|length }})</summary>{% else %}<h3>{{ table.title|capitalise }}</h3>{% endif %}
<div class="scroll"><table{% if table.numbers %} class="numbers"{% endif %}>
{% if table.columns %}<thead><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>{% endif %}
<tbody>{% for row in table.rows %}<tr>{% for cell in row %}{% if cell is picture %}<td><img src="{{ cell }}" alt="the picture"></td>{% elif cell is figure %}<td class="figure">{{ cell }}</td>{% else %}<td lang="{{ cell|lang }}">{{ cell }}</td>{% endif %}{% endfor %}</tr>{% endfor %}</tbody>
</table></div>
{% if table.folded %}</details>{% endif %}
{% endfor %}
</section>
{% endif %}
{% if learning %}
<section id="learning">
<p class="eyebrow">Learning</p>
<h2>{{ learning.heading|unbroken }}</h2>
<p>{{ learning.text }}</p>
<figure>{{ learning.figure }}</figure>
{% if learning.small %}
<figure class="pair">{% for figure in learning.small %}<div>{{ figure }}</div>{% endfor %}</figure>
{% endif %}
</section>
{% endif %}
{% if incidents %}
<section id="incidents">
<p class="eyebrow">Stability</p>
<h2>{{ incidents.heading|unbroken }}</h2>
{% for sentence in incidents.backs %}<p>{{ sentence }}</p>{% endfor %}
<p class="small">A step is skipped when its loss or gradient is not finite or far above what is usual: the weights stay as they were. The losses are those of the single sequences, with the weights of that step.</p>
{% for one in incidents.shown %}
<details><summary>Step {{ "{:,}".format(one.step) }}: {{ one.why }}</summary>
{% if one.worst %}
<h3>The worst of {{ one.shape }} tokens</h3>
<table><thead><tr><th>sequence</th><th>loss</th><th>text</th></tr></thead>
<tbody>{% for loss, text, place in one.worst %}<tr><td>{{ place }}</td><td>{{ loss }}</td><td lang="{{ text|lang }}">{{ text }}</td></tr>{% endfor %}</tbody></table>
{% endif %}
{% if one.layers %}
<h3>Gradient norm by layer</h3>
<dl class="list">{% for name, norm in one.layers %}<dt>{{ name }}</dt><dd>{{ norm }}</dd>{% endfor %}</dl>
{% endif %}
</details>
{% endfor %}
{% if incidents.more %}<p class="small">{{ "{:,}".format(incidents.more) }} more {{ "is" if incidents.more == 1 else "are" }} in incidents.jsonl.</p>{% endif %}
</section>
{% endif %}
{% macro show(sample) %}
<figure class="sample{% if sample.made is picture %} made{% endif %}">
{% if sample.image is picture %}<img src="{{ sample.image }}" alt="the picture">{% endif %}
{% if sample.made is picture %}<img src="{{ sample.made }}" alt="the picture that was made">{% endif %}
<blockquote lang="{{ (sample.prompt ~ sample.text)|lang }}"><b>{{ sample.prompt }}</b>{{ continuation(sample) }}</blockquote>
<figcaption class="small">{% if sample.step is not none %}step {{ "{:,}".format(sample.step) }}{% if settings(sample) %} · {% endif %}{% endif %}{{ settings(sample) }}</figcaption>
</figure>
{% endmacro %}
{% if last_samples %}
<section id="samples">
<p class="eyebrow">Samples</p>
<h2>{{ "What it writes" if writes else "What it answers" }}</h2>
<p class="small">{{ "The prompt is in colour; what follows is the model's." if writes else "The row is in colour; what follows is the model's answer." }}</p>
{% for sample in last_samples %}{{ show(sample) }}{% endfor %}
{% if early_samples %}
<details><summary>While it learnt ({{ early_samples|length }})</summary>
{% for sample in early_samples %}{{ show(sample) }}{% endfor %}
</details>
{% endif %}
</section>
{% endif %}
{% if report.privacy %}
<section id="privacy">
<p class="eyebrow">Privacy</p>
<h2>What the weights may tell of a training row</h2>
<p>{{ report.privacy[0] }}</p>
<ul class="small">{% for sentence in report.privacy[1:] %}<li>{{ sentence }}</li>{% endfor %}</ul>
</section>
{% endif %}
{% if data %}
<section id="data">
<p class="eyebrow">Data</p>
<h2>{{ data.heading|capitalise|unbroken }}</h2>
{% if data.files %}<p class="small">From {{ data.files[:6]|join(", ") }}{% if data.files|length > 6 %} and {{ data.files|length - 6 }} more{% endif %}.</p>{% endif %}
<figure>{{ data.figure }}</figure>
{% if data.splits and data.columns %}
<table class="numbers">
<thead><tr><th>split</th>{% for column in data.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>{% for name, cells in data.splits %}<tr><td>{{ name }}</td>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table>
{% endif %}
{% for note in data.notes %}<p>{{ note }}</p>{% endfor %}
{% if data.changed or data.idle %}
<p class="small">{% if data.changed %}Changed without being dropped: {{ data.changed }}. {% endif %}{% if data.idle %}Found nothing to do: {{ data.idle }}.{% endif %}</p>
{% endif %}
{% if data.examples %}
<details><summary>Examples of what was changed or dropped</summary>
{% for step, examples in data.examples %}
<h3>{{ step }}</h3>
<ul class="examples">{% for example in examples %}<li lang="{{ example|lang }}">{{ example }}</li>{% endfor %}</ul>
{% endfor %}
</details>
{% endif %}
</section>
{% endif %}
{% if report.model or report.tokenizer %}
<section id="model">
<p class="eyebrow">Model</p>
<h2>{{ model|unbroken }}</h2>
<div class="pair">
{% if report.model %}<div><h3>Transformer</h3><dl class="list">{% for key, value in report.model.items() if value is not none %}<dt>{{ key|label }}</dt><dd>{{ value|plain }}</dd>{% endfor %}</dl></div>{% endif %}
{% if report.tokenizer %}<div><h3>Tokenizer</h3><dl class="list">{% for key, value in report.tokenizer.items() if value is not none %}<dt>{{ key|label }}</dt><dd>{{ value|plain }}</dd>{% endfor %}</dl></div>{% endif %}
</div>
</section>
{% endif %}
{% if cost %}
<section id="cost">
<p class="eyebrow">Cost</p>
<h2>{{ cost.heading|unbroken }}</h2>
{% if cost.figure %}<figure>{{ cost.figure }}</figure>{% endif %}
{% if report.machine %}<dl class="list">{% for key, value in report.machine.items() if value is not none %}<dt>{{ key|label }}</dt><dd>{{ value|plain }}</dd>{% endfor %}</dl>{% endif %}
{% if report.forecast %}<p>{{ report.forecast|capitalise }}</p>{% endif %}
{% if report.energy %}<p class="small">The energy is an estimate: {{ report.energy.assumption }}</p>{% endif %}
</section>
{% endif %}
{% if profile %}
<section id="profile">
<p class="eyebrow">Where the time goes</p>
<h2>{{ profile.heading|unbroken }}</h2>
<figure>{{ profile.figure }}</figure>
<details><summary>The operations that took longest</summary>
<div class="scroll"><table class="numbers">
<thead><tr><th>operation</th><th>kind</th><th>calls a step</th><th>a step</th></tr></thead>
<tbody>{% for row in profile.operations %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table></div></details>
<p class="small">Over {{ profile.steps }} steps, which the watching slows down; profile/trace.json.gz in the run folder shows them one by one (ui.perfetto.dev or chrome://tracing). Products of batches of matrices are counted as attention's.</p>
</section>
{% endif %}
{% if report.recipe or report.hashes or report.next_commands %}
<section id="again">
<p class="eyebrow">Again and further</p>
<h2>Everything needed to repeat it</h2>
{% if report.next_commands %}
<h3>Next</h3>
{% for command in report.next_commands %}<pre class="command">{{ command }}</pre>{% endfor %}
{% endif %}
{% if report.hashes %}
<h3>Hashes</h3>
<dl class="list long">{% for key, value in report.hashes.items() %}<dt>{{ key|label }}</dt><dd><code>{{ value }}</code></dd>{% endfor %}</dl>
{% endif %}
{% if report.recipe %}
<details><summary>The recipe as resolved</summary><pre>{{ report.recipe }}</pre></details>
{% endif %}
</section>
{% endif %}
</main>
<footer class="small">Made by Formary{% if report.formary_version %} {{ report.formary_version }}{% endif %}. This page loads nothing and sends nothing.</footer>"""


def framed(title: str, body: str, *, style: str = STYLE, script: str = "", pictures: bool = False) -> str:
    """A whole page of a title and a body, both HTML already; its policy lets in this style sheet and script, nothing else,
    but for pictures that are in the page itself."""
    policy = f"default-src 'none'; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    if pictures:
        policy += "; img-src data:"
    if script:
        policy += f"; script-src '{_digest(script)}'"
        body += f"\n<script>{script}</script>"
    return f"""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _digest(text: str) -> str:
    """As a policy names a style sheet or a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
