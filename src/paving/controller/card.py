"""The model card that travels with a controller: method, buckets by count, metrics with intervals, base and its terms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, StrictUndefined

CARD = """\
---
library_name: paving
base_model: {{ d.base.name }}
tags: [selective-refusal-editing, residual-paving]
---
# Residual Paving controller for {{ d.base.name }}

A routed residual controller (Residual Paving, arXiv 2605.20262). A router reads the prompt's residual states at blocks
{{ d.config.route_layers | join(", ") }} and decides *whether* to edit; {{ d.config.n_experts }} bottleneck expert(s) decide *what* to add
at blocks {{ d.config.edit_layers[0] }}-{{ d.config.edit_layers[-1] }}. The base model's weights are not changed, and a prompt whose gate stays closed gets
the base model's own answer.

- Base: `{{ d.base.name }}`, fingerprint `{{ d.base.fingerprint }}`. Another base is refused.
- Gate: {{ d.policy }}, threshold {{ "%.4f" | format(d.threshold) }}, scale {{ d.scale }}, harmful-keep veto {{ "on" if d.use_veto else "off" }}.
{% if gate %}- What decides the gate: {{ gate }}
{% endif %}{% for sentence in promises %}- {{ sentence }}
{% endfor %}{% if system %}- Fitted behind this system prompt, to be served behind it, in these characters: {{ system }}
{% endif %}- Edit target: {{ targets }}. It is never compliance with a harmful request.
{% if counts %}
## Prompts, by count

| split | edit | benign keep | harmful keep |
| --- | --- | --- | --- |
{% for split, n in counts.items() %}| {{ split }} | {{ n.edit }} | {{ n.benign_keep }} | {{ n.harmful_keep }} |
{% endfor %}{% endif %}
## Measured on the held-out split
{% if rows %}
Refusal rates in percent as k/n with 95 % intervals (Wilson's; wider where prompts share a group); harmful drift is against the base, in points.

| row | edit refusal | benign refusal | harmful refusal | harmful drift | benign pres. | harmful pres. |
| --- | --- | --- | --- | --- | --- | --- |
{% for r in rows %}| {{ r.name }} | {{ rate(r.refusal.edit) }} | {{ rate(r.refusal.benign_keep) }} | {{ rate(r.refusal.harmful_keep) }} | {{ points(r.harmful_drift) }} | {{ score(r.preservation.benign_keep) }} | {{ score(r.preservation.harmful_keep) }} |
{% endfor %}{% else %}
Not evaluated yet: n/a (n=0). Run `paving eval` before sharing this controller.
{% endif %}
## Use and limits

- For mending over-refusal of designated prompts, and for research on routing and editing. Not for removing a model's
  refusals of harmful requests: harmful-keep drift is reported above and should be read before use.
{% if d.objectives == "two" %}- **For measuring only**: no harmful keep had a part in fitting it, and nothing holds back what it edits.
{% else %}- The harmful-keep configuration (threshold and veto above) is part of the controller; deploy it as it is.
{% endif %}- The edit bucket is a designated set, not a general statement about which prompts are safe to answer.
- **Terms.** The base model's licence and use restrictions apply to the base together with this controller; see the
  card of `{{ d.base.name }}`.
"""


def write_card(folder: Path, description: Mapping, rows: Sequence[Mapping] = ()) -> Path:
    """README.md beside a saved controller. `rows` are the rows of a run's metrics, as plain data."""
    trained = description.get("trained_on") or {}
    kinds = {
        "reframe": "a safe reframe (the base's own continuation under a teacher prompt)",
        "own": "the owner's answers for safe prompts",
        "reference": "a reference model's answers to over-refused safe prompts",
    }
    template = Environment(undefined=StrictUndefined, autoescape=False).from_string(CARD)
    text = template.render(
        d={"objectives": "three", **description},
        counts=trained.get("buckets"),
        gate=trained.get("gate"),
        promises=trained.get("promises", ()),
        system=json.dumps(trained["system"], ensure_ascii=False) if trained.get("system") else "",
        targets=kinds.get(trained.get("targets"), "not recorded"),
        rows=rows,
        rate=_rate,
        score=_score,
        points=lambda x: "n/a (n=0)" if x is None else f"{100 * x:+.1f}",
    )
    path = folder / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def _rate(r: Mapping) -> str:
    if r["n"] == 0:
        return "n/a (n=0)"
    return f"{r['k']}/{r['n']} {100 * r['rate']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def _score(s: Mapping) -> str:
    return "n/a (n=0)" if s["value"] is None else f"{100 * s['value']:.1f} (n={s['n']})"
