"""lm-evaluation-harness on a base with an intervention: who is asked, and where each prompt ends.

A gate is decided at the last prompt token, and only what follows is edited. The harness hands a plain model one row of
tokens and does not say where its prompt ends, so `HarnessModel` says it:

- a question is generated from: the rendered chat is the prompt, as for any completion;
- a given answer is scored (MMLU): the question's rendered chat is the prompt, and the answer is forced on it as if it
  had been generated. The gate reads the question alone and is the same for each of its answers;
- a text is scored as a whole (perplexity): there is no prompt, so such tasks are refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import numbers
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from lm_eval import evaluate
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from paving.backbone import Backbone, PromptBatch, pad_left
from paving.backbone.chat import TEMPLATE_ARGUMENTS
from paving.evaluation.utility import Answers, Question, Settings
from paving.intervention import Intervention
from paving.traces.forward import pad_right, teacher_forced_logits

Stage = Callable[[str, int], Callable[[int], None]]
Request = tuple[tuple[str, str], list[int], list[int]]  # (texts, prompt ids, answer ids), as the harness makes it
HARNESS = version("lm_eval")
SCORED_WHOLE = "loglikelihood_rolling"


class HarnessModel(HFLM):
    """The harness's Hugging Face model with an intervention around every batch.

    gates  prompt text -> gate, of everything asked since the model was made
    cut    prompt texts that did not fit the context and lost their beginning
    """

    def __init__(
        self, backbone: Backbone, intervention: Intervention, *, chat: bool, batch_size: int, stage: Stage | None = None
    ):
        with _quiet_harness():
            super().__init__(
                pretrained=backbone.model,
                tokenizer=backbone.tokenizer,
                backend="causal",
                max_length=backbone.context_length,
                batch_size=batch_size,
                # A rendered chat has its special tokens already; a second begin-of-text would be a prompt nobody trained on.
                add_bos_token=False if chat else None,
                chat_template_args=TEMPLATE_ARGUMENTS,
            )
        self.backbone, self.intervention, self.chat = backbone, intervention, chat
        self.stage = stage or (lambda _what, _total: lambda _n: None)
        self.gates: dict[str, float] = {}
        self.cut: set[str] = set()

    # --- answers that are given -------------------------------------------------------------------------------------

    def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Prompt and answer ids. A rendered chat stays whole.

        The harness moves white space at a prompt's end into the answer. Templates end in a line break, and without it
        the gate would read another token than the one it was trained on.
        """
        if not self.chat:
            return super()._encode_pair(context, continuation)
        prompt, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(prompt)] == prompt:
            return prompt, whole[len(prompt) :]
        # Merged across the boundary: generated tokens come after the prompt's own and cannot do that.
        return prompt, self.tok_encode(continuation, add_special_tokens=False)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding gives the answer) of each request, in its order.

        Answers that differ in their last token only (all of MMLU's) are read off one pass, because the last token is
        predicted and never fed. The prompt is part of what must agree: the stock model groups by the fed tokens alone,
        and two prompts whose gates differ could share a pass.
        """
        passes: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
        for i, ((text, _), prompt, answer) in enumerate(requests):
            passes.setdefault((self._fitting(text, prompt, answer), tuple(answer[:-1])), []).append(i)
        ordered = sorted(passes.items(), key=lambda item: (len(item[0][0]) + len(item[0][1]), item[0]))
        found: dict[int, tuple[float, bool]] = {}
        tick = self.stage("answers scored", len(requests))
        for start in range(0, len(ordered), self.batch_size):
            chunk = ordered[start : start + self.batch_size]
            ids, mask = pad_left(self.backbone, [prompt for (prompt, _), _ in chunk])
            forced = [requests[members[0]][2] for _, members in chunk]
            continuation, _ = pad_right(forced, self.backbone.pad_id, ids.device)
            texts = tuple(requests[members[0]][0][0] for _, members in chunk)
            with self._edited(ids, mask, texts) as batch:
                logits = teacher_forced_logits(self.backbone, batch, continuation)
            for row, (_, members) in zip(logits.float().log_softmax(-1), chunk, strict=True):
                found |= {i: _score(row, requests[i][2]) for i in members}
                # Two texts may have the same tokens, when both were cut: each has the gate of the pass they share.
                self.gates |= {requests[i][0][0]: self.gates[requests[members[0]][0][0]] for i in members}
                tick(len(members))
        return [found[i] for i in range(len(requests))]

    def _fitting(self, text: str, prompt: Sequence[int], answer: Sequence[int]) -> tuple[int, ...]:
        room = self.max_length - len(answer) + 1  # the answer's last token is predicted, not fed
        if room < 1 or not answer:
            raise ValueError(
                f"an answer of {len(answer)} tokens to {text[-60:]!r} cannot be scored: allowed are 1 to "
                f"{self.max_length}. Correct the task's choices."
            )
        if len(prompt) > room:
            self.cut.add(text)
        return tuple(prompt[-room:])

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        raise ValueError("a text scored as a whole has no prompt for a gate to read; choose a task that asks something.")

    # --- answers that are generated ---------------------------------------------------------------------------------

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        self._tick = self.stage("answers generated", len(requests))
        return super().generate_until(requests, disable_tqdm=True)

    def tok_batch_encode(self, strings, padding_side="left", left_truncate_len=None, truncation=False):
        """As the harness does it, noting which prompts these are and which of them are cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        self._texts = tuple(strings)
        if left_truncate_len is None:
            return ids, mask
        lengths = mask.sum(1).tolist()
        self.cut |= {text for text, length in zip(strings, lengths, strict=True) if length > left_truncate_len}
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options) -> Tensor:
        with self._edited(context, options["attention_mask"], self._texts):
            answers = super()._model_generate(context, max_length, stop, **options)
        self._tick(len(context))
        return answers

    # --- both -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _edited(self, ids: Tensor, mask: Tensor, texts: tuple[str, ...]) -> Iterator[PromptBatch]:
        """The intervention around one batch of prompts; their gates are kept."""
        batch = PromptBatch(ids, mask, texts, (None,) * len(texts))
        with self.intervention.apply(self.backbone, batch) as applied:
            yield batch
            self.gates |= {text: row.gate for text, row in zip(texts, applied.rows(), strict=True)}


def _score(log_probabilities: Tensor, answer: Sequence[int]) -> tuple[float, bool]:
    """(T, vocab) log-probabilities along an answer of at most T tokens."""
    steps = log_probabilities[: len(answer)]
    tokens = torch.tensor(answer, device=steps.device)
    return float(steps.gather(1, tokens[:, None]).sum()), bool((steps.argmax(-1) == tokens).all())


def load_tasks(name: str, include: Sequence[Path] = (), fewshot: int | None = None) -> tuple[str, dict[str, Task]]:
    """(the task's own name, subtask -> loaded task) of a task, group or tag, or of a YAML file.

    include: folders with further task files. Data files that a local task file names stand relative to it.
    fewshot: examples that will be put before each question

    raises ValueError for a task that is not known, cannot be loaded, or has no prompts
    """
    file = Path(name).expanduser()
    local = file.suffix in (".yaml", ".yml")
    if local and not file.is_file():
        raise ValueError(f"there is no task file {name}.")
    if local and re.search(r"^group:", file.read_text(encoding="utf-8"), re.MULTILINE):
        raise ValueError(f"{name} is a group of tasks: give its name, and its folder with --include-path {file.parent}.")
    # Reading the thousands of task files that the harness brings takes half a minute, and one's own tasks need none of
    # them, unless they are a group, whose members may be anywhere.
    include = [p.expanduser().resolve() for p in include]
    manager = TaskManager(include_path=include, include_defaults=False)
    known = manager.task_index.get(name)
    if not local and (known is None or known.kind.name == "GROUP"):
        manager = TaskManager(include_path=include, include_defaults=True)
        known = manager.task_index.get(name)
    if not local and known is None:
        raise ValueError(
            f"lm-evaluation-harness {HARNESS} knows no task {name!r}. `lm_eval ls tasks` lists its own; "
            "a task file is given by its path, or by name with --include-path."
        )
    home = file.resolve() if local else known.yaml_path
    own = local or (home is not None and any(home.is_relative_to(p) for p in include))
    try:
        with chdir(home.parent) if own else nullcontext():
            loaded = manager.load([str(home) if local else name])
    except (ConnectionError, OSError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot load the task {name}: {reason} Its data may need the network; a local task file needs none."
        ) from error
    tasks, groups = loaded["tasks"], loaded["groups"]
    whole = sorted(t for t, task in tasks.items() if task.OUTPUT_TYPE == SCORED_WHOLE)
    if whole:
        raise ValueError(
            f"{', '.join(whole[:3])} scores texts as a whole (perplexity): without a prompt no gate can be decided. "
            "Choose a task with questions."
        )
    fixed = sorted(t for t, task in tasks.items() if task.get_config("num_fewshot") == 0)
    if fewshot and fixed:
        raise ValueError(
            f"{', '.join(fixed[:3])} is made to be asked without examples, so --fewshot {fewshot} cannot be met. "
            "Ask it in a command of its own, without --fewshot."
        )
    inner = {child for children in loaded["group_map"].values() for child in children}
    top = next((g for g in groups if g not in inner), None) or next(iter(tasks))
    return (top if local else name), tasks


def source_of(task: Task, limit: int | None) -> str:
    """A digest of the questions asked and of how the task's file asks and scores them."""
    config = {k: v for k, v in task.dump_config().items() if k not in ("metadata", "num_fewshot")}
    docs = [dict(doc) for _, doc in zip(range(limit or len(task.eval_docs)), task.eval_docs, strict=False)]
    # Functions are written by name, because what Python prints of one holds its address.
    text = json.dumps([config, docs], sort_keys=True, default=lambda v: getattr(v, "__name__", type(v).__name__))
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def ask(name: str, task: Task, model: HarnessModel, settings: Settings, *, row: str, asked: str) -> Answers:
    """Put one subtask to a model; `row` and `asked` say which model that was."""
    model.gates, model.cut = {}, set()
    if settings.fewshot is not None:
        task.set_config(key="num_fewshot", value=settings.fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=settings.seed)
    torch.manual_seed(settings.seed)
    with _quiet_harness():
        # Not simple_evaluate, which takes stock of the machine with a dozen subprocesses every time.
        results = evaluate(
            lm=model,
            task_dict={"tasks": {task.task_name: task}, "groups": {}, "group_map": {}},
            limit=settings.limit,
            apply_chat_template=settings.chat,
            system_instruction=settings.system,
            fewshot_as_multiturn=settings.chat,
            bootstrap_iters=0,
        )
    samples = results["samples"][task.task_name]
    several = len({s["filter"] for s in samples}) > 1
    values: dict[int, dict[str, float]] = {}
    first: dict[int, dict] = {}
    unpaired: dict[str, None] = {}
    better: dict[str, bool | None] = {}
    for sample in samples:
        scores = values.setdefault(sample["doc_id"], {})
        first.setdefault(sample["doc_id"], sample)
        for metric in sample["metrics"]:
            shown = f"{metric}, {sample['filter']}" if several else metric
            better[shown] = results["higher_is_better"].get(task.task_name, {}).get(metric)
            value = sample[metric]
            if isinstance(value, numbers.Real | np.bool_) and math.isfinite(value):
                scores[shown] = float(value)
            else:
                unpaired[shown] = None
    return Answers(
        task=name,
        row=row,
        asked=asked,
        source=source_of(task, settings.limit),
        settings=settings,
        questions=[_question(i, first[i], values[i], model.gates) for i in sorted(values)],
        cut=len(model.cut),
        higher_is_better=better,
        unpaired=list(unpaired),
    )


def _question(number: int, sample: dict, values: dict[str, float], gates: dict[str, float]) -> Question:
    prompts = dict.fromkeys(arguments[0] for arguments in sample["arguments"])
    texts = json.dumps([list(map(str, arguments)) for arguments in sample["arguments"]])
    return Question(
        id=str(number),
        prompt=hashlib.sha256(texts.encode(errors="replace")).hexdigest()[:16],
        values=values,
        # An empty prompt is the harness's way to ask how likely an answer is by itself; nothing was asked with it.
        gates=[gates[text] for text in prompts if text],
    )


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """The harness warns that a model was handed over ready and that prompts were cut; both are known here, and counted."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
