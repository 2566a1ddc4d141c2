"""The chosen scales on the held-out split, by the three-way protocol, and the run's own rows beside them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paving.compare.bench import Bench
from paving.compare.fitting import Fitting
from paving.compare.methods import OWN_ROUTING, VARIANTS
from paving.compare.own import OwnChosen, own_rules
from paving.evaluation.comparison import BASE, OWN, Choice, ComparedRow, TargetSimilarity, edit_success, is_success
from paving.evaluation.judges import Label
from paving.evaluation.resampling import grouped_pair
from paving.evaluation.results import Row
from paving.evaluation.rows import table_rows
from paving.evaluation.similarity import benign_similarity, target_similarity
from paving.evaluation.three_way import Protocol, RowSpec, three_way
from paving.evaluation.verdicts import read_verdicts
from paving.generation import Completion, load_completions
from paving.prompts.types import Bucket
from paving.run_folder import RunError
from paving.steering.routing import Labelled

OWN_ROWS = ("base", "learned", "learned+veto", "oracle")
ORDER = (*VARIANTS, OWN_ROUTING)  # the global row first: others take the answers of their open gates from it


@dataclass(frozen=True)
class Answered:
    """A row's answers by prompt id, and their labels."""

    completions: Mapping[str, Completion]
    labels: Mapping[str, Label]

    @classmethod
    def of(cls, completions: Sequence[Completion], labels: Sequence[Label]) -> Answered:
        return cls({c.id: c for c in completions}, {c.id: x for c, x in zip(completions, labels, strict=True)})

    def ids(self, bucket: Bucket) -> list[str]:
        return [i for i, c in self.completions.items() if c.bucket == bucket]

    def successes(self) -> dict[str, bool]:
        return {i: is_success(self.labels[i]) for i in self.ids(Bucket.EDIT)}


@dataclass(frozen=True)
class Chosen:
    """One held-out row to be measured: a fitted method at a scale under a variant, and the rules that took it."""

    fitting: Fitting
    variant: str
    scale: float
    rules: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.fitting.method.name

    def spec(self) -> RowSpec:
        editor = f"{self.fitting.key}/{self.scale:g}"
        kind = "diagnostic" if self.variant == Labelled().name else "comparator"
        key = f"{editor}/{self.fitting.bench.routing_key(self.variant)}"
        return RowSpec(self.fitting.at(self.scale, self.variant), kind, self.variant, self.scale, key, editor)


def to_measure(bench: Bench, fittings: Sequence[Fitting], chosen: Sequence[Choice]) -> list[Chosen | OwnChosen]:
    """Each method, scale and variant once, with all the rules that took it; the run's own row stands there already."""
    rules: dict[tuple[str, float, str], list[str]] = {}
    for c in chosen:
        if c.scale is not None and c.method != OWN:
            rules.setdefault((c.method, c.scale, c.variant), []).append(f"{c.rule}/{c.objective}")
    by_name = {f.method.name: f for f in fittings}
    order = list(by_name)
    keys = sorted(rules, key=lambda k: (order.index(k[0]), k[1], ORDER.index(k[2])))
    there = {(variant, bench.controller.scale) for variant in OWN_ROWS}
    own = {key: found for key, found in own_rules(chosen).items() if key not in there}
    return [
        *(OwnChosen(bench, v, s, found) for (v, s), found in own.items()),
        *(Chosen(by_name[m], v, s, tuple(rules[m, s, v])) for m, s, v in keys),
    ]


def held_out_rows(
    bench: Bench,
    chosen: Sequence[Chosen | OwnChosen],
    notes: Mapping[str, str],
    bert_model: str | None,
    own_taken: Mapping[tuple[str, float], tuple[str, ...]],
) -> list[ComparedRow]:
    """The run's own rows, as evaluated, and every chosen row.

    notes      method's name -> what a reader must know of it
    own_taken  (variant, scale) of the run's own controller -> the rules that took it
    """
    base, own = own_rows(bench, bert_model, own_taken)
    take_base_answers(bench)
    protocol = Protocol(bench.config.decoding, bench.judge, k=bench.config.training.top_k, by_row=True)
    specs = [c.spec() for c in chosen]
    measured = three_way(bench.backbone, bench.held_out, specs, protocol, bench.store, bench.out, bench.means.stage)
    rows, groups = table_rows(measured, bench.held_out), groups_of(bench)
    found = []
    for c, m, row in zip(chosen, measured[1:], rows[1:], strict=True):
        answered = Answered.of(m.completions, m.labels)
        told = [notes[c.name]] if notes.get(c.name) else []
        made = compared(row, answered, base, groups, bert_model, c.name, c.variant, c.rules, told)
        found.append(made.model_copy(update={"target": to_the_point(bench, answered)}))
    methods, order = list(dict.fromkeys(r.method for r in found)), [*ORDER, *OWN_ROWS]
    found.sort(key=lambda r: (methods.index(r.method), order.index(r.variant), r.scale))  # as tables are read
    return [*own, *found]


def own_rows(
    bench: Bench, bert_model: str | None, taken: Mapping[tuple[str, float], tuple[str, ...]]
) -> tuple[Answered, list[ComparedRow]]:
    """(the base's answers, the run's own rows), from its evaluation's files."""
    by_name = {row.name: row for row in bench.metrics.rows if row.name in OWN_ROWS}
    answered = {}
    for name in by_name:
        answers, verdicts = (bench.folder / kind / f"{name}.jsonl" for kind in ("completions", "verdicts"))
        if not (answers.exists() and verdicts.exists()):
            raise RunError(f"{answers} or its verdicts are missing. Evaluate again: paving eval {bench.folder}")
        answered[name] = Answered.of(load_completions(answers), [v.label for v in read_verdicts(verdicts)])
    base = answered["base"]
    rows = []
    for name, row in by_name.items():
        method, rules = BASE if name == "base" else OWN, taken.get((name, row.scale), ())
        made = compared(row, answered[name], base, groups_of(bench), bert_model, method, name, rules, [])
        rows.append(made.model_copy(update={"target": to_the_point(bench, answered[name])}))
    return base, rows


def to_the_point(bench: Bench, answered: Answered) -> TargetSimilarity:
    """Answers to edit prompts beside the targets, as far as these go."""
    tokenizer, targets = bench.backbone.tokenizer, bench.held_out_targets
    cut = {
        i: tokenizer(answered.completions[i].response, add_special_tokens=False)["input_ids"][: len(targets[i])]
        for i in answered.ids(Bucket.EDIT)
        if i in targets
    }
    answers = tokenizer.batch_decode(list(cut.values()), skip_special_tokens=True)
    return target_similarity(answers, tokenizer.batch_decode([targets[i] for i in cut], skip_special_tokens=True))


def groups_of(bench: Bench) -> dict[str, str]:
    return {p.id: p.group for p in bench.held_out}


def take_base_answers(bench: Bench) -> None:
    """The run's own answers of the base, and their verdicts; the keys beside them decide whether they are taken."""
    key = Path("completions") / "base.key"
    there, own = bench.out / key, bench.folder / key
    if there.exists() and own.exists() and there.read_text(encoding="utf-8") == own.read_text(encoding="utf-8"):
        return
    there.unlink(missing_ok=True)  # before the answers change: a kill must not leave it beside others than its own
    for file in (Path("completions") / "base.jsonl", key, Path("verdicts") / "base.jsonl"):
        if (bench.folder / file).exists():
            (bench.out / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(bench.folder / file, bench.out / file)


def compared(
    row: Row,
    answered: Answered,
    base: Answered,
    groups: Mapping[str, str],
    bert_model: str | None,
    method: str,
    variant: str,
    rules: Sequence[str],
    notes: Sequence[str],
) -> ComparedRow:
    benign = base.ids(Bucket.BENIGN_KEEP)
    return ComparedRow(
        method=method,
        variant=variant,
        scale=row.scale,
        chosen_by=list(rules),
        notes=list(notes),
        edit_success=edit_success(row.labels[Bucket.EDIT]),
        success_against_base=None if answered is base else grouped_pair(answered.successes(), base.successes(), groups),
        benign=benign_similarity(
            [answered.completions[i].response for i in benign],
            [base.completions[i].response for i in benign],
            [answered.labels[i] for i in benign],
            [base.labels[i] for i in benign],
            bert_model=bert_model,
        ),
        row=row,
    )
