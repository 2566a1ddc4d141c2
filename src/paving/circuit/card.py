"""The model card of an edited checkpoint: what was edited, how strongly, what was measured, how to check it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from paving.circuit.delta import Delta

CARD_FILE = "README.md"
CARD = """\
---
library_name: transformers
{% if hub_id %}base_model: {{ d.base.name }}
{% endif %}tags: [selective-refusal-editing, c-delta-theta]
---
# {{ d.base.name }}, edited to refuse: {{ d.categories | join(", ") }}

The weights of `{{ d.base.name }}` with {{ "{:,}".format(edited) }} of {{ "{:,}".format(total) }} values ({{ share }})
changed once, offline, so that the model refuses requests of the named categories (C-ΔΘ, arXiv 2602.04521). It is an
ordinary checkpoint: it needs no code beside transformers, and no tensor has another name, shape or dtype than in the base.

- Base: `{{ d.base.name }}`, fingerprint `{{ d.base.fingerprint }}`.
- Circuit: {{ channels }} channels of the FFN output projections of {{ d.layers | length }} layers \
({{ d.layers[0].layer }} to {{ d.layers[-1].layer }}), read as {{ d.reading }} of {{ d.n }} a layer.
{% if d.composition %}- Where circuits share a channel: `{{ d.composition.overlap }}`. Each category's alpha is folded in.
{% endif %}- Edit: base + alpha * delta, alpha {{ "%g" | format(alpha) }}.
- Delta: SHA-256 `{{ sha256 }}` (delta.safetensors).

| category | alpha | harmful refusal | benign over-refusal |
| --- | --- | --- | --- |
{% for c in d.components %}| {{ cell(c.category) }} | {{ "%g" | format(c.alpha) }} | \
{{ rate(c.metrics, "harmful_refusal") }} | {{ rate(c.metrics, "benign_over_refusal") }} |
{% endfor %}
Each row: that category's edit alone, at the alpha of its row. Rates are k/n, percent and a 95 % interval.

## Measured with all of it, at alpha {{ "%g" | format(alpha) }}
{% if metrics %}
| figure | value |
| --- | --- |
{% for name in metrics %}| {{ cell(name | replace("_", " ")) }} | {{ rate(metrics, name) }} |
{% endfor %}{% endif %}
{% if "benign_over_refusal" not in metrics %}Benign over-refusal was not measured with this checkpoint: n/a (n=0). \
{% if alpha != d.alpha %}Figures at another alpha say nothing of this one.{% elif d.composition %}Measure it, and harmful \
refusal, before sharing, with the run of each category: `paving circuit evaluate RUN --delta DELTA`.{% else %}Measure it, \
and harmful refusal, before sharing: `paving circuit evaluate RUN`.{% endif %}

{% endif %}## Use and limits

- For owners of a model who want it to refuse the named categories by itself, on any server.
- Not a guarantee: some requests of the categories are still answered, and some benign ones are refused; the figures above
  say how many on the prompts that were measured. Other filters stay necessary.
- What it does to requests of other categories has to be measured, not assumed.
- To check that nothing else was changed, with the base and the delta at hand: `paving circuit verify BASE EDITED DELTA`.
  To take the edit off again: `paving circuit remove`.
- **Terms.** The base model's licence and use restrictions hold for this checkpoint too; see the card of `{{ d.base.name }}`.
"""


def write_card(folder: Path, delta: Delta, alpha: float, *, sha256: str, total: int) -> Path:
    """README.md of a checkpoint edited at `alpha`. total: values that the checkpoint has in all its tensors."""
    about = delta.description
    edited = sum(own.numel() for own in delta.base.values())
    path = folder / CARD_FILE
    text = (
        Environment(undefined=StrictUndefined, autoescape=False)
        .from_string(CARD)
        .render(
            d=about,
            alpha=alpha,
            # Figures hold for the alpha they were measured at, and for no other.
            metrics=about.metrics if alpha == about.alpha else {},
            rate=_rate,
            cell=_cell,
            sha256=sha256,
            edited=edited,
            total=total,
            share=f"{100 * edited / total:.2f} %",
            channels=f"{delta.mask.size:,}",
            hub_id=re.fullmatch(r"[\w.-]+/[\w.-]+", about.base.name) is not None,
        )
    )
    path.write_text(text, encoding="utf-8")
    return path


def _cell(text: str) -> str:
    """Names come from the owner's files; a bar or a line break would end the cell."""
    return " ".join(text.replace("|", "\\|").split())


def _rate(metrics: Mapping, name: str) -> str:
    value = metrics.get(name)
    if isinstance(value, Mapping) and value.get("n") and value.get("k") is not None:
        percent = f"{value['k']}/{value['n']} {100 * value['k'] / value['n']:.1f}"
        low, high = value.get("low"), value.get("high")
        return percent if low is None or high is None else f"{percent} [{100 * low:.1f}, {100 * high:.1f}]"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    return value if isinstance(value, str) else "n/a (n=0)"
