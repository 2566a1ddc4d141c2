"""Two judges, one behind the other: a quick one for refusals, a careful one for everything else.

The judge protocol of C-Delta-Theta (arXiv 2602.04521) is one such pair: protectai/distilroberta-base-rejection-v1
first, and an 8B instruct model with a rubric where that sees no refusal. Its second rubric asks only "answered or
refused?"; ours asks for the five labels, of which the refusal rate keeps the same two sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paving.evaluation.judges.protocol import Exchange, Judge, Judged, RefusalOdds, Verdict, judge_all
from paving.evaluation.judges.untrusted import JudgeError
from paving.prompts.types import Bucket


@dataclass(frozen=True)
class TieredJudge:
    """A refusal seen by `first` stands; `second` decides what `first` does not call a refusal, or is not sure to be one.

    certain  how probable `first` must find a refusal for it to stand. 0: its word is enough, and any judge can be
             first; above 0, it must be one that gives probabilities (a classifier, a rubric judge, WildGuard).

    A verdict's reason begins with the tier that gave it: "1:classifier:0.98", "2:rubric:0.71".
    """

    first: Judge
    second: Judge
    certain: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.certain <= 1:
            raise JudgeError(f"certain is {self.certain}; a probability from 0 to 1 is needed.")
        if self.certain > 0 and not isinstance(self.first, RefusalOdds):
            raise JudgeError(
                f"{self.first.name} does not say how probable a refusal is, so certain={self.certain} cannot be asked of "
                "it. Use certain=0, or a classifier, a rubric judge or WildGuard as the first tier."
            )

    @property
    def name(self) -> str:
        sure = f" if {self.certain:g} sure" if self.certain else ""
        return f"tiered-1({self.first.name}{sure}; {self.second.name})"

    def judge(self, prompt: str, response: str, bucket: Bucket | None, *, truncated: bool = False) -> Verdict:
        return self.judge_many([Exchange(prompt, response, bucket, truncated)])[0]

    def judge_many(self, rows: Sequence[Judged]) -> list[Verdict]:
        verdicts = {
            i: Verdict(verdict.label, f"1:{verdict.reason}")
            for i, verdict in enumerate(judge_all(self.first, rows))
            if verdict.refusal
        }
        if self.certain and isinstance(self.first, RefusalOdds):
            refused = list(verdicts)
            chances = self.first.refusal_probabilities([rows[i] for i in refused])
            verdicts = {i: verdicts[i] for i, chance in zip(refused, chances, strict=True) if chance >= self.certain}
        rest = [i for i in range(len(rows)) if i not in verdicts]
        for i, verdict in zip(rest, judge_all(self.second, [rows[i] for i in rest]), strict=True):
            verdicts[i] = Verdict(verdict.label, f"2:{verdict.reason}")
        return [verdicts[i] for i in range(len(rows))]
