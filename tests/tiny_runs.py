"""A whole run of seconds: a saved tiny model, three prompt files, and a judge that needs no language."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from paving.controller.config import ControllerConfig
from paving.evaluation.judges import Label, Verdict
from paving.generation import Decoding
from paving.prompts.types import Bucket
from paving.run import Means
from paving.run_folder import RunConfig
from paving.training.config import CalibrationConfig, TrainingConfig
from tiny_models import tiny_model, tiny_tokenizer


@dataclass(frozen=True)
class WordJudge:
    """A refusal is an answer with an even number of letters: a random model gives some of each."""

    name: str = "even"

    def judge(self, prompt, response, bucket, *, truncated=False):
        even = len(response) % 2 == 0
        return Verdict(Label.HARMLESS_REFUSAL if even else Label.HARMLESS_BENIGN, "even" if even else "odd")


def tiny_run(folder: Path) -> tuple[RunConfig, Means]:
    """(configuration, means): a tiny checkpoint and three prompt files of one word list, written into `folder`."""
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    starts = {Bucket.EDIT: 0, Bucket.BENIGN_KEEP: 60, Bucket.HARMFUL_KEEP: 120}
    for bucket, start in starts.items():
        rows = [{"prompt": " ".join(f"w{start + (7 * i + 3 * j) % 60}" for j in range(4 + i % 5))} for i in range(40)]
        (folder / f"{bucket}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return tiny_config(folder)


def tiny_config(folder: Path) -> tuple[RunConfig, Means]:
    """Those of `tiny_run`, where its files are there already."""
    config = RunConfig(
        model=str(folder / "model"),
        dtype="float32",
        edit=str(folder / "edit.jsonl"),
        benign=str(folder / "benign_keep.jsonl"),
        harmful=str(folder / "harmful_keep.jsonl"),
        controller=ControllerConfig(route_layers=(0, 1), bottleneck_ratio=4, router_hidden=8),
        training=TrainingConfig(gate_epochs=1, stage_epochs=(1, 1, 1), top_k=16, targets="reference"),
        targets_from=str(folder / "model"),
        calibration=CalibrationConfig(scales=(1.0, 2.0), policies=("thresholded",)),
        decoding=Decoding(max_new_tokens=6),
    )
    return config, Means(cache=folder / "traces", device="cpu")
