"""A judge from a line of text: what `--judge` takes, and what a run's configuration can hold.

    rules
    hf:rubric=MODEL
    hf:classifier=MODEL[,refusal=LABEL|LABEL,other=LABEL|LABEL]
    hf:wildguard=MODEL[,undecided=rules]
    hf:llama-guard=MODEL[,undecided=rules]
    hf:tiered=CLASSIFIER,then=MODEL[,refusal=LABEL|LABEL,other=LABEL|LABEL]

MODEL is a Hugging Face id, a local folder, or the embedded model. Reading a line loads nothing and imports no torch;
`judge_from` reads it and loads what it names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from paving.evaluation.judges.protocol import Judge
from paving.evaluation.judges.rules import RuleJudge

KINDS = ("rubric", "classifier", "wildguard", "llama-guard", "tiered")
ALLOWED = "rules, " + ", ".join(f"hf:{kind}=MODEL" for kind in KINDS[:-1]) + ", hf:tiered=CLASSIFIER,then=MODEL"


@dataclass(frozen=True)
class JudgeLine:
    """One such line, read; `str()` writes it back.

    kind     one of `KINDS`, or `rules`
    model    the model that judges (for `tiered` the classifier that comes first); empty for the rules
    options  what follows it, by name, as text
    """

    kind: str
    model: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        allowed = _options_of(self.kind)
        if self.kind == "rules":
            if self.model or self.options:
                raise ValueError("the rules take no model and no options: write just `rules`.")
            return
        if unknown := sorted(set(self.options) - set(allowed)):
            raise ValueError(f"hf:{self.kind} has no option {', '.join(unknown)}; allowed: {', '.join(allowed) or 'none'}.")
        for name, value in {"the model": self.model, **self.options}.items():
            if not value or value != value.strip() or "," in value:
                raise ValueError(f"hf:{self.kind}: {name} is {value!r}. Give a name without commas and outer spaces.")
        if self.kind == "tiered" and "then" not in self.options:
            raise ValueError(f"hf:tiered needs a second model: hf:tiered={self.model},then=MODEL.")
        if ("refusal" in self.options) != ("other" in self.options):
            raise ValueError(f"hf:{self.kind}: give both refusal= and other=, so that every label of the model is named.")
        if self.options.get("undecided", "rules") != "rules":
            raise ValueError(f"hf:{self.kind}: undecided={self.options['undecided']} is not known; allowed: rules.")

    def __str__(self) -> str:
        if self.kind == "rules":
            return "rules"
        return ",".join([f"hf:{self.kind}={self.model}", *(f"{name}={value}" for name, value in self.options.items())])


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
        case _:
            raise ValueError(f"the judge {kind!r} is not known; allowed: {ALLOWED}.")


def judge_line(text: str) -> JudgeLine:
    """Read a line such as `rules` or `hf:rubric=Qwen/Qwen3-4B`. raises ValueError that names what is allowed."""
    if text == "rules":
        return JudgeLine("rules")
    scheme, _, rest = text.partition(":")
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
    """The judge that a line names, its models loaded. The keywords are those of `model_judge`; the rules need none.

    raises ValueError for a line that cannot be read, BackboneError or JudgeError for models that cannot judge so.
    """
    line = judge_line(text)
    if line.kind == "rules":
        return RuleJudge()
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
