"""An edited checkpoint is an ordinary one: plain vLLM, with nothing of ours in it, answers as the in-memory edit does."""

from __future__ import annotations

import copy
import os

import pytest

vllm = pytest.importorskip(
    "vllm", reason="vLLM is not installed here; `make test-vllm` runs these in an environment of its own"
)

from paving.backbone import EMBEDDED, Backbone, as_backbone, load_backbone, render_ids  # noqa: E402
from paving.circuit.checkpoint import export_checkpoint  # noqa: E402
from paving.generation import Decoding, generate  # noqa: E402
from paving.intervention import Identity  # noqa: E402
from paving.prompts import Bucket, Prompt  # noqa: E402
from tiny_deltas import tiny_delta  # noqa: E402

TEXTS = (
    "Name three rivers in Europe.",
    "How do I keep bread fresh?",
    "Write one line about the sea.",
    "What is a prime number?",
)
TOKENS = 24


@pytest.fixture(scope="module")
def engine_options():
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    return {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8}


def in_float32(backbone: Backbone) -> list[str]:
    """Greedy answers of the weights as they stand, computed in float32: in bfloat16 two engines round differently."""
    wide = as_backbone(copy.deepcopy(backbone.model).float(), backbone.tokenizer, backbone.name)
    prompts = [Prompt(f"p{i}", text, Bucket.BENIGN_KEEP, group=f"p{i}") for i, text in enumerate(TEXTS)]
    return [c.response for c in generate(wide, prompts, Identity(), Decoding(max_new_tokens=TOKENS))]


def test_plain_vllm_answers_token_for_token_as_the_in_memory_edit(tmp_path, engine_options):
    backbone = load_backbone(EMBEDDED)
    delta = tiny_delta(backbone, fraction=0.05, alpha=0.2)
    with delta.edit().written(backbone):
        edited = in_float32(backbone)
    assert edited != in_float32(backbone)  # the edit does something
    folder = export_checkpoint(backbone, delta, None, tmp_path / "edited")
    ids = [{"prompt_token_ids": render_ids(backbone, text)} for text in TEXTS]
    del backbone
    engine = vllm.LLM(model=str(folder), **engine_options)
    outputs = engine.generate(ids, vllm.SamplingParams(temperature=0.0, max_tokens=TOKENS), use_tqdm=False)
    assert [o.outputs[0].text for o in outputs] == edited
