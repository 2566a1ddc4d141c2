"""A judge from a line of text: what `--judge` takes, and what a run's configuration can hold.

    rules
    rules:edit=harmful
    hf:rubric=MODEL
    hf:classifier=MODEL[,refusal=LABEL|LABEL,other=LABEL|LABEL]
    hf:wildguard=MODEL[,undecided=rules]
    hf:llama-guard=MODEL[,undecided=rules]
    hf:tiered=CLASSIFIER,then=MODEL[,refusal=LABEL|LABEL,other=LABEL|LABEL]
    api:PROVIDER/MODEL[,base_url=URL,key=VARIABLE,rpm=N,tpm=N,concurrency=N,retries=N,timeout=SECONDS,...]

MODEL is a Hugging Face id, a local folder, or the embedded model; behind `api:` it is what the provider calls it, and the
provider one that Inspect AI knows. `edit=harmful` tells the rules that the edit bucket holds harmful requests, to be
reframed: a fluent set of steps is then no success there. Reading a line loads nothing and imports no torch; `judge_from`
reads it and loads what it names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from paving.evaluation.judges.kinds import KINDS
from paving.evaluation.judges.protocol import Judge
from paving.evaluation.judges.rules import RuleJudge

ALLOWED = (
    "rules, rules:edit=harmful, "
    + ", ".join(f"hf:{kind}=MODEL" for kind in KINDS[:-1])
    + ", hf:tiered=CLASSIFIER,then=MODEL, api:PROVIDER/MODEL"
)
API_TEXTS = ("base_url", "key", "effort", "temperature")
API_NUMBERS = ("rpm", "tpm", "concurrency", "retries", "timeout", "max_tokens", "max_chars")


@dataclass(frozen=True)
class JudgeLine:
    """One such line, read; `str()` writes it back.

    kind     one of `KINDS`, `rules` or `api`
    model    the model that judges (for `tiered` the classifier that comes first); empty for the rules
    options  what follows it, by name, as text
    """

    kind: str
    model: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = _options_of(self.kind)
        if self.kind == "rules":
            if self.model or self.options not in ({}, {"edit": "harmful"}):
                raise ValueError("the rules take no model, and no option but one: write `rules` or `rules:edit=harmful`.")
            return
        shown = "api" if self.kind == "api" else f"hf:{self.kind}"
        if unknown := sorted(set(self.options) - set(allowed)):
            raise ValueError(f"{shown} has no option {', '.join(unknown)}; allowed: {', '.join(allowed) or 'none'}.")
        for name, value in {"the model": self.model, **self.options}.items():
            if not value or value != value.strip() or "," in value:
                raise ValueError(f"{shown}: {name} is {value!r}. Give a name without commas and outer spaces.")
        if self.kind == "api":
            provider, slash, model = self.model.partition("/")
            if not (provider and slash and model):
                raise ValueError(
                    f"api: {self.model!r} names no provider. Write api:PROVIDER/MODEL, such as api:openai/gpt-4o."
                )
            for name in set(self.options) & set(API_NUMBERS):
                if not (self.options[name].isascii() and self.options[name].isdigit()):
                    raise ValueError(f"api: {name} is {self.options[name]!r}; a whole number is needed.")
            if not re.fullmatch(r"[0-9](\.[0-9]{1,6})?", self.options.get("temperature", "0")):
                raise ValueError(
                    f"api: temperature is {self.options['temperature']!r}; a number such as 0 or 0.7 is needed."
                )
        if self.kind == "tiered" and "then" not in self.options:
            raise ValueError(f"hf:tiered needs a second model: hf:tiered={self.model},then=MODEL.")
        if ("refusal" in self.options) != ("other" in self.options):
            raise ValueError(f"hf:{self.kind}: give both refusal= and other=, so that every label of the model is named.")
        if self.options.get("undecided", "rules") != "rules":
            raise ValueError(f"hf:{self.kind}: undecided={self.options['undecided']} is not known; allowed: rules.")

    def __str__(self) -> str:
        if self.kind == "rules":
            return "rules:edit=harmful" if self.options else "rules"
        head = f"api:{self.model}" if self.kind == "api" else f"hf:{self.kind}={self.model}"
        return ",".join([head, *(f"{name}={value}" for name, value in self.options.items())])


def _options_of(kind: str) -> tuple[str, ...]:
    match kind:
        case "rules" | "rubric":
            return ()
        case "classifier":
            return ("refusal", "other")
        case "wildguard" | "llama-guard":
            return ("undecided",)
        case "tiered":
            return ("then", "refusal", "other")
        case "api":
            return (*API_TEXTS, *API_NUMBERS)
        case _:
            raise ValueError(f"the judge {kind!r} is not known; allowed: {ALLOWED}.")


def judge_line(text: str) -> JudgeLine:
    """Read a line such as `rules` or `hf:rubric=Qwen/Qwen3-4B`. raises ValueError that names what is allowed."""
    if text in ("rules", "rules:edit=harmful"):
        return JudgeLine("rules", options={"edit": "harmful"} if text != "rules" else {})
    scheme, colon, rest = text.partition(":")
    if scheme == "api" and colon:
        kind, equals, named = "api", "=", rest
    else:
        kind, equals, named = rest.partition("=")
        if scheme != "hf" or kind not in KINDS or not equals:
            raise ValueError(f"the judge {text!r} is not known; allowed: {ALLOWED}.")
    model, *parts = named.split(",")
    options: dict[str, str] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{part!r} in {text!r} is no option: write name=value. A model's name holds no comma.")
        if name in options:
            raise ValueError(f"{name}= is given twice in {text!r}.")
        options[name] = value
    return JudgeLine(kind, model, options)


def judge_from(
    text: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False, batch_size: int = 1
) -> Judge:
    """The judge that a line names, its models loaded. The keywords are those of `model_judge`; other judges need none.

    raises ValueError for a line that cannot be read, BackboneError or JudgeError for models that cannot judge so.
    """
    line = judge_line(text)
    if line.kind == "rules":
        return RuleJudge(harmful_edits=bool(line.options))
    if line.kind == "api":
        from paving.evaluation.judges.api import ApiJudge

        values: dict[str, str | int | float] = dict(line.options)
        values |= {name: int(line.options[name]) for name in API_NUMBERS if name in line.options}
        if "temperature" in values:
            values["temperature"] = float(values["temperature"])
        return ApiJudge(line.model, **values)
    from paving.evaluation.judges.loading import model_judge

    options = line.options
    return model_judge(
        line.kind,
        line.model,
        then=options.get("then"),
        refusal=tuple(options["refusal"].split("|")) if "refusal" in options else (),
        other=tuple(options["other"].split("|")) if "other" in options else (),
        undecided=RuleJudge() if "undecided" in options else None,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        batch_size=batch_size,
    )
