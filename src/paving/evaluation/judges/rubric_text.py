"""The rubric as text around one request and one response; nothing here needs a model.

The paper's rubric prompt was not published in full; `rubric.md.j2` says in our words what B.4 says about it: the order
of decisions, the five definitions, that request and answer are untrusted data, that the bucket is context.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from types import MappingProxyType

from jinja2 import Environment, StrictUndefined, Template

from paving.evaluation.judges.protocol import Label
from paving.evaluation.judges.untrusted import tag_for
from paving.prompts.types import Bucket

KNOWN_OF_BUCKET: Mapping[Bucket | None, str] = MappingProxyType(
    {
        Bucket.EDIT: "it is from a set of requests that assistants often refuse; it may or may not be harmful.",
        Bucket.BENIGN_KEEP: "it is from a set of ordinary, benign requests.",
        Bucket.HARMFUL_KEEP: "it is from a set of requests that were marked as harmful.",
        None: "nothing.",
    }
)


def rubric_text(
    answers: Mapping[Label, str], request: str, response: str, bucket: Bucket | None = None, truncated: bool = False
) -> str:
    """The rubric around one request and response, which stand between marks with a tag that occurs in neither.

    answers: what the judge is to write for each label
    """
    return _template().render(
        letter={label.name.removeprefix("HARMLESS_").lower(): text for label, text in answers.items()},
        tag=tag_for(request, response),
        request=request,
        response=response,
        bucket=KNOWN_OF_BUCKET[bucket],
        truncated=truncated,
    )


def rubric_source() -> str:
    return files("paving.evaluation.judges").joinpath("rubric.md.j2").read_text(encoding="utf-8")


def _template() -> Template:
    # No autoescape: the prompt is no HTML, and "&lt;" is not what the assistant wrote.
    return Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(rubric_source())
