"""The whole story on the embedded defaults: a cautious organism, the starter prompts, a controller, a report."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from paving.backbone import EMBEDDED, cache_dir, load_backbone
from paving.controller.config import ControllerConfig
from paving.evaluation.results import Metrics
from paving.prompts.starter_set import organism_prompts
from paving.run import Means, evaluate, train
from paving.run_folder import RunConfig
from paving.training.config import CalibrationConfig, TrainingConfig
from paving.training.organism import OrganismConfig, build_organism


def run_demo(folder: Path, *, seed: int, device: str, stage, watch, say) -> Metrics:
    """Organism (built once, then cached), training, three-way evaluation; returns the run's metrics."""
    means = Means.default(device=device, stage=stage, watch=watch, say=say)
    model = demo_organism(seed, device, say)
    train(demo_config(model, seed), folder, means)
    return evaluate(folder, means)


def demo_config(model: Path, seed: int) -> RunConfig:
    """Safe prompts that look unsafe, answered as the stock model answers them; fewer calibration points than a full run.

    Edit prompts and harmful keeps share words and style here, and early blocks do not tell them apart, so the router reads
    the middle of the model: an unedited pass over the prompt decides, and the edit still begins at block 5.
    """
    return RunConfig(
        model=str(model),
        targets_from=EMBEDDED,
        split_seed=seed,
        controller=ControllerConfig(route_layers=(8, 12, 16), edit_layers=tuple(range(5, 30)), pooling="last+mean"),
        training=TrainingConfig(seed=seed),
        calibration=CalibrationConfig(scales=(1.0, 2.0), policies=("thresholded",), max_edit_prompts=24),
    )


def demo_organism(seed: int, device: str, say) -> Path:
    """The cautious model of the demo, in the cache, under a name that follows from what it is made of."""
    config = OrganismConfig(seed=seed, learning_rate=4e-5, max_answer_tokens=48)
    refuse, answer = organism_prompts()
    # A part of each file, at twice the usual rate: enough caution for a demo, in a third of the time. More answers than
    # refusals, or the model learns to refuse everything.
    refuse, answer = refuse[::2], tuple(p for i, p in enumerate(answer) if i % 4 != 3)
    content = json.dumps([config.model_dump(), [p.text for p in refuse], [p.text for p in answer]])
    folder = cache_dir() / "organisms" / hashlib.sha256(content.encode()).hexdigest()[:16]
    if folder.exists():
        say(f"cautious model: taken from {folder}")
        return folder
    say("the stock 135M model hardly refuses, so the demo first makes a cautious one")
    return build_organism(load_backbone(EMBEDDED, device=device), refuse, answer, folder, config, say)
