"""The rows of an evaluation, decoded by vLLM: as transformers decodes them, row by row."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these in an environment of its own")

from served_answers import EARLY, TEXTS, controller_of

from paving.backbone import EMBEDDED, load_backbone
from paving.controller import save_controller
from paving.generation import Decoding, Transformers
from paving.intervention import Identity
from paving.prompts import Bucket, Prompt
from paving.run_engine import engine_of
from paving.run_rows import row_specs
from paving.serving.plugin import ServingError

DECODING = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(EMBEDDED, dtype="float32")


def test_every_row_of_a_run_is_as_transformers_decodes_it(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    controller = controller_of(backbone, EARLY)
    controller.weights.veto.fitted.fill_(1.0)
    folder = save_controller(controller, tmp_path / "controller")
    prompts = [Prompt(f"p{i}", text, list(Bucket)[i % 3], group=f"p{i}") for i, text in enumerate(TEXTS)]
    rows = [Identity(), *(s.intervention for s in row_specs(controller, ["soft", "open"], tmp_path))]
    assert [r.name for r in rows] == ["base", "learned", "learned+veto", "soft", "open", "oracle"]
    # Prompts come in chunks, of which none but the last has an output that could say what was decided.
    options = {"max_model_len": 256, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    done = []
    with engine_of("vllm", folder, controller, backbone, options) as engine:
        assert engine.name.startswith("vllm 0.32")
        for row in rows:
            here = Transformers().generate(backbone, prompts, row, DECODING)
            there = engine.generate(backbone, prompts, row, DECODING, tick=done.append)
            assert [c.response for c in there] == [c.response for c in here], row.name
            assert [(c.id, c.bucket, c.truncated, c.n_tokens, c.veto) for c in there] == [
                (c.id, c.bucket, c.truncated, c.n_tokens, c.veto) for c in here
            ]
            assert [c.gate for c in there] == pytest.approx([c.gate for c in here], abs=1e-4)
            if row.name == "oracle":
                assert [c.gate for c in there] == [float(p.bucket is Bucket.EDIT) for p in prompts]
        with pytest.raises(ValueError, match="its own scale and mixture"):
            engine.generate(backbone, prompts, controller.with_scale(3.0), DECODING)
    assert sum(done) == len(rows) * len(prompts)
    other = save_controller(controller, tmp_path / "other")
    with (
        pytest.raises(ServingError, match="in this process already"),
        engine_of("vllm", other, controller, backbone, options),
    ):
        pass
