"""A vLLM engine in a process of its own, for the tests: JSON of what to ask on stdin, JSON of the answers in a file.

{"model": FOLDER, "options": {...}, "max_tokens": N, "out": FILE, "preempt_at": [steps],
"rounds": [{"prompts": [[ids]], "policies": [name]}]}
"""

from __future__ import annotations

import itertools
import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def preempt_at(scheduler, steps) -> list[int]:
    """At these steps all that runs is pushed out and begins again. Returns at which it happened, one entry a request."""
    schedule, preempt, preempted, step = scheduler.schedule, scheduler._preempt_request, [], itertools.count()

    def scheduled(*args, **kwargs):
        now = next(step)

        def noted(*args, **kwargs):
            preempted.append(now)
            return preempt(*args, **kwargs)

        scheduler._preempt_request = noted
        if now in steps:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args, **kwargs)

    scheduler.schedule = scheduled
    return preempted


def held(engine) -> list[str]:
    """The requests that the worker still knows of; those of the last step are forgotten with the next one. Workers in
    processes of their own are not asked."""
    worker = getattr(engine.llm_engine.engine_core.engine_core.model_executor, "driver_worker", None)
    runner = None if worker is None else worker.worker.model_runner
    return sorted(getattr(getattr(runner, "_paving", None), "requests", ()))


def abort_at(engine, steps: dict[str, list[int]]) -> None:
    """steps: step -> which of the round's requests are given up then, by place."""
    core, step = engine.llm_engine, itertools.count()
    run = core.step

    def stepped():
        names = list(core.output_processor.request_states)
        core.abort_request([names[i] for i in steps.get(str(next(step)), ())], internal=True)
        return run()

    core.step = stepped


def main() -> None:
    asked = json.load(sys.stdin)
    import vllm

    engine = vllm.LLM(model=asked["model"], **asked["options"])
    preempted = preempt_at(engine.llm_engine.engine_core.engine_core.scheduler, asked.get("preempt_at", ()))
    abort_at(engine, asked.get("abort_at", {}))
    rounds = []
    for one in asked["rounds"]:
        params = [
            vllm.SamplingParams(
                temperature=0.0, max_tokens=asked["max_tokens"], ignore_eos=True, logprobs=1,
                extra_args=None if policy is None else {"paving_policy": policy},
            )
            for policy in one["policies"]
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in one["prompts"]]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        rounds.append(
            [
                {
                    "tokens": list(o.outputs[0].token_ids),
                    "log_probs": [
                        step[t].logprob for t, step in zip(o.outputs[0].token_ids, o.outputs[0].logprobs, strict=True)
                    ],
                }
                for o in outputs
            ]
        )
    with open(asked["out"], "w", encoding="utf-8") as file:
        json.dump({"rounds": rounds, "preempted": preempted, "held": held(engine)}, file)


if __name__ == "__main__":
    main()
