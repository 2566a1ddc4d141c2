"""A vLLM engine in a process of its own, for the tests: JSON of what to ask on stdin, JSON of the answers in a file.

{"model": FOLDER, "options": {...}, "max_tokens": N, "out": FILE, "rounds": [{"prompts": [[ids]], "policies": [name]}]}
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def main() -> None:
    asked = json.load(sys.stdin)
    import vllm

    engine = vllm.LLM(model=asked["model"], **asked["options"])
    seen: dict[str, float] = {}

    def gates(worker: object) -> None:
        served = getattr(worker.model_runner, "_paving", None)
        if served is not None:
            old = served.finish

            def finish(requests):
                seen.update({r: served.requests[r].state.gate for r in requests if r in served.requests})
                old(requests)

            served.finish = finish

    engine.llm_engine.model_executor.collective_rpc(gates)
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
        json.dump({"rounds": rounds, "gates": seen}, file)


if __name__ == "__main__":
    main()
