"""Judges: (prompt, response) -> one of the five labels of Residual Paving, appendix B.4.

The rules need no model and are imported at once. Judges that are models (`docs/model-judges.md`) stand in `rubric`,
`classifiers`, `guards` and `tiered`, and are built by `judge_from("hf:rubric=MODEL")` or `loading.model_judge`.
"""

from __future__ import annotations

from paving.evaluation.judges.named import JudgeLine, judge_from, judge_line
from paving.evaluation.judges.protocol import Exchange, Judge, Label, ManyJudge, Verdict, judge_all
from paving.evaluation.judges.rules import RuleJudge

__all__ = [
    "Exchange",
    "Judge",
    "JudgeLine",
    "Label",
    "ManyJudge",
    "RuleJudge",
    "Verdict",
    "judge_all",
    "judge_from",
    "judge_line",
    "model_judge",
]


def __getattr__(name: str):
    # torch and transformers take seconds to import; who judges by the rules should not wait for them.
    if name == "model_judge":
        from paving.evaluation.judges.loading import model_judge

        return model_judge
    raise AttributeError(f"module 'paving.evaluation.judges' has no attribute {name!r}")
