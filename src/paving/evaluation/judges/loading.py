"""Load the models of judges. Nothing falls back: a model that cannot be this kind of judge is an error."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from paving.backbone import Backbone, BackboneError, as_backbone, load_backbone
from paving.evaluation.judges.classifiers import Classifier, ClassifierJudge, ClassNames, preset_names
from paving.evaluation.judges.guards import WILDGUARD_FORMAT, LlamaGuardJudge, WildGuardJudge
from paving.evaluation.judges.kinds import KINDS
from paving.evaluation.judges.protocol import Judge
from paving.evaluation.judges.rubric import RubricJudge
from paving.evaluation.judges.tiered import TieredJudge


def model_judge(
    kind: str,
    model: str,
    *,
    then: str | None = None,
    refusal: tuple[str, ...] = (),
    other: tuple[str, ...] = (),
    undecided: Judge | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    batch_size: int = 1,
) -> Judge:
    """A judge of the named kind on the named model.

    kind        one of `KINDS`: rubric, classifier, wildguard, llama-guard, tiered
    then        tiered only: the instruct model that judges by the rubric what the classifier `model` does not refuse
    refusal     classifier and tiered: the classifier's labels that mean a refusal, and `other` those that do not;
                both may be left out for a classifier that is known (`classifiers.PRESETS`)
    undecided   guards: who judges a response that the guard does not answer in its form; None makes that an error
    batch_size  rows a pass. With 1, a verdict does not depend on the rows beside it, to the last bit; more is faster on
                an accelerator, and the same up to the rounding of the model's dtype.

    device, dtype and trust_remote_code are those of `load_backbone`.
    """
    loading = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    match kind:
        case "rubric":
            return RubricJudge(load_backbone(model, **loading), batch_size=batch_size)
        case "classifier":
            return ClassifierJudge(
                load_classifier(model, **loading), _class_names(model, refusal, other), batch_size=batch_size
            )
        case "wildguard":
            return WildGuardJudge(load_wildguard(model, **loading), undecided=undecided, batch_size=batch_size)
        case "llama-guard":
            return LlamaGuardJudge(load_backbone(model, **loading), undecided=undecided, batch_size=batch_size)
        case "tiered":
            if then is None:
                raise ValueError("a tiered judge needs the model of its second tier: then=MODEL.")
            first = model_judge("classifier", model, refusal=refusal, other=other, batch_size=batch_size, **loading)
            return TieredJudge(first, model_judge("rubric", then, batch_size=batch_size, **loading))
        case _:
            raise ValueError(f"the kind of judge {kind!r} is not known; allowed: {', '.join(KINDS)}.")


def _class_names(model: str, refusal: tuple[str, ...], other: tuple[str, ...]) -> ClassNames:
    return ClassNames(refusal, other) if refusal or other else preset_names(model)


def load_classifier(model: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Classifier:
    """A sequence classifier, frozen, on its device. raises BackboneError if it cannot be loaded."""
    path = _path(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        loaded, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=_dtype(dtype), trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(_cannot_load(model, error)) from error
    if info["missing_keys"]:
        # transformers fills them with random numbers and only logs it: a base model would judge by the throw of a die.
        raise BackboneError(
            f"{model} is no trained classifier: its checkpoint has no {', '.join(sorted(info['missing_keys'])[:3])}. "
            "Give a sequence classifier, such as protectai/distilroberta-base-rejection-v1."
        )
    return Classifier(model, loaded.to(_device(device)).eval().requires_grad_(False), tokenizer)


def load_wildguard(model: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Backbone:
    """WildGuard as a backbone. It may come without a chat template, which others need: its format stands in for one."""
    path = _path(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(_cannot_load(model, error)) from error
    if tokenizer.chat_template:
        return load_backbone(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        lm = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(dtype), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise BackboneError(_cannot_load(model, error)) from error
    turns = {"bos": "{{ bos_token }}", "request": "{{ messages[0].content }}", "response": "{{ messages[1].content }}"}
    tokenizer.chat_template = WILDGUARD_FORMAT.format(**turns)
    return as_backbone(lm.to(_device(device)), tokenizer, model)


def _path(model: str) -> str:
    folder = Path(model).expanduser()
    return str(folder) if folder.is_dir() else model


def _dtype(dtype: str) -> torch.dtype | str:
    allowed = ("auto", "float32", "bfloat16", "float16")
    if dtype not in allowed:
        raise BackboneError(f"dtype {dtype!r} is not known; allowed: {', '.join(allowed)}.")
    return "auto" if dtype == "auto" else getattr(torch, dtype)


def _device(device: str) -> str:
    if device != "auto":
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(accelerator) if accelerator is not None else "cpu"


def _cannot_load(model: str, error: Exception) -> str:
    return (
        f"cannot load {model}: {str(error).splitlines()[0]} "
        "Give a checkpoint folder, or a Hugging Face model id that this machine can reach."
    )
