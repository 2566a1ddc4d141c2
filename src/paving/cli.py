"""The command line: one command a stage. Parse, call one function, print where the result lies."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from paving import cli_circuit, cli_compare, cli_contrast, cli_judge, cli_reproduce, cli_router, cli_serve, cli_utility
from paving.terminal import AsJson, err, json_object, layers, one_line_errors, out

# Before torch is imported: a waiting OpenMP thread spins briefly, then sleeps. Endless spinning (the default) makes
# small matrix products up to ten times slower where cores are virtual or shared. A user's own setting stays.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

app = typer.Typer(
    help="Selective refusal editing: stop refusing exactly the designated prompts, and show what happened to the rest.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
organism_app = typer.Typer(help="Model organisms: make a small model refuse cautiously.", no_args_is_help=True)
app.add_typer(organism_app, name="organism")
app.add_typer(cli_circuit.app, name="circuit")
app.add_typer(cli_router.app, name="router")
app.add_typer(cli_contrast.app, name="contrast")

Cache = Annotated[Path | None, typer.Option(help="Where base traces are kept. Default: the user cache.")]
CacheGib = Annotated[float, typer.Option(min=0, help="Most the trace cache may hold; beyond it, prompt KV is rebuilt.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda:1, mps, ...; offload:20GiB where the base does not fit.")]
ABLATED = (
    "no-contrastive, no-trajectory, no-stage-3, short-horizon, late-edits, late-router, early-router, single-expert, "
    "fixed-expert, low-rank or two-objectives (tables 2, 9, 14, 19)."
)
DtypeGiven = Annotated[str | None, typer.Option(help="auto (the checkpoint's own, the default), float32, bfloat16, float16")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16, float16")]
TrustRemote = Annotated[bool, typer.Option(help="Let a model repository run its own code. Off unless you ask.")]
Force = Annotated[bool, typer.Option(help="Overwrite what is there.")]


@app.command()
@one_line_errors
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Run folder of the demo.")] = Path("demo-run"),
    seed: Annotated[int, typer.Option(help="Seed of organism, split and training.")] = 0,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """The whole story on the embedded model: cautious organism, training, three-way evaluation, report."""
    from paving.demo import run_demo

    with progress(quiet=as_json) as (stage, watch, say):
        metrics = run_demo(folder, seed=seed, device=device, stage=stage, watch=watch, say=say)
    show(metrics, folder, as_json)


@organism_app.command("build")
@one_line_errors
def organism_build(
    folder: Annotated[Path, typer.Option("--out", help="Folder of the new checkpoint; it must not exist.")],
    base: Annotated[str | None, typer.Option(help="Model to start from. Default: embedded:SmolLM2-135M-Instruct.")] = None,
    refuse: Annotated[str, typer.Option(help="Prompts to refuse (file or dataset), or `starter`.")] = "starter",
    answer: Annotated[str, typer.Option(help="Prompts answered in the base's own words, or `starter`.")] = "starter",
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts of each.")] = None,
    epochs: Annotated[int, typer.Option(min=1)] = 2,
    learning_rate: Annotated[float, typer.Option(min=0)] = 2e-5,
    seed: int = 0,
    device: Device = "auto",
) -> None:
    """Fine-tune a base into a cautious model: refusals on one prompt file, its own answers on another."""
    from paving.backbone import EMBEDDED, load_backbone
    from paving.prompts import Bucket, organism_prompts, read_prompts
    from paving.training.organism import OrganismConfig, build_organism

    starter_refuse, starter_answer = organism_prompts()
    refused = starter_refuse if refuse == "starter" else read_prompts(refuse, Bucket.HARMFUL_KEEP, limit=limit)
    answered = starter_answer if answer == "starter" else read_prompts(answer, Bucket.BENIGN_KEEP, limit=limit)
    config = OrganismConfig(epochs=epochs, learning_rate=learning_rate, seed=seed)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; give another --out folder. Nothing was overwritten.")
    build_organism(
        load_backbone(base or EMBEDDED, device=device), refused[:limit], answered[:limit], folder, config, err.print
    )
    out.print(f"cautious checkpoint: {folder}")


@app.command()
@one_line_errors(divided=True)
def train(
    folder: Annotated[Path, typer.Option("--out", help="Run folder.")],
    model: Annotated[str | None, typer.Option(help="Model id, checkpoint folder, or the embedded default.")] = None,
    edit: Annotated[
        str | None, typer.Option(help="Edit prompts: .jsonl, .csv, a dataset name, or `starter`, the default.")
    ] = None,
    benign: Annotated[str | None, typer.Option(help="Benign keeps, likewise.")] = None,
    harmful: Annotated[str | None, typer.Option(help="Harmful keeps, likewise.")] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt to ask every prompt behind, as you will serve it.")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="reframe (safe reframe, the default) or own (each row's `target`).")
    ] = None,
    targets_from: Annotated[str | None, typer.Option(help="Model whose answers are the targets (safe prompts).")] = None,
    horizon: Annotated[int | None, typer.Option(help="Target tokens that are learned. Default: 12.", min=2)] = None,
    route_layers: Annotated[str | None, typer.Option(help="e.g. 1-4 or 8,12,16. Default: the model's preset.")] = None,
    edit_layers: Annotated[str | None, typer.Option(help="e.g. 5-29. Default: every layer after the router's.")] = None,
    pooling: Annotated[
        str | None, typer.Option(help="last (default), mean or last+mean: what the router reads of the prompt.")
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="K bottleneck experts. Default: 3.")] = None,
    judge: Annotated[
        str | None, typer.Option(help="Who says what a refusal is. Default: rules (docs/model-judges.md).")
    ] = None,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="JSON RunConfig; options that are given go first.")
    ] = None,
    promise: Annotated[
        str | None, typer.Option(help="Highest share of harmful keeps that may open, as 0.05; more in docs/promise.md.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split and training.")] = None,
    allow_leakage: Annotated[bool | None, typer.Option(help="Go on although prompts leak between splits.")] = None,
    dtype: DtypeGiven = None,
    device: Device = "auto",
    cache: Cache = None,
    cache_gib: CacheGib = 8.0,
    trust_remote_code: TrustRemote = False,
) -> None:
    """Fit a routed residual controller: four stages, calibrated on its own split. Killed and run again, it goes on.

    Under `torchrun --nproc_per_node N -m paving train ...` the work is divided over processes (docs/scaling.md).
    """
    from paving import run as runs
    from paving.processes import together
    from paving.run import Means

    config = run_config(
        config_file,
        model=model, edit=edit, benign=benign, harmful=harmful, system=system, targets=targets, targets_from=targets_from,
        route_layers=route_layers, edit_layers=edit_layers, pooling=pooling, experts=experts, seed=seed,
        allow_leakage=allow_leakage, dtype=dtype, judge=judge, promise=promise, horizon=horizon,
    )  # fmt: skip
    with together(folder, cache or Means.default().cache) as mine:
        with progress() as (stage, watch, say):
            means = means_of(cache, cache_gib, device, trust_remote_code, stage, watch, say)
            controller = runs.train(config, mine, means)
        out.print(f"controller: {folder / 'controller'} (gate {controller.policy.name}, scale {controller.scale:g})")
        out.print(f"next: paving eval {folder}")


@app.command("eval")
@one_line_errors(divided=True)
def evaluate(
    folder: Annotated[Path, typer.Argument(help="Run folder.")],
    policy: Annotated[
        list[str] | None, typer.Option(help="Further rows by gate: soft, soft+veto, conformal:0.05, open, ...")
    ] = None,
    mixture: Annotated[list[str] | None, typer.Option(help="Further rows by mixture: uniform, expert:0, ...")] = None,
    judge: Annotated[str | None, typer.Option(help="Judge the answers by another judge, into RUN/judges/.")] = None,
    engine: Annotated[
        str, typer.Option(help="transformers, or vllm: decoded there, into RUN/engines/vllm/.")
    ] = "transformers",
    engine_options: Annotated[str, typer.Option(help="JSON of vLLM's own, as '{\"max_model_len\": 4096}'.")] = "{}",
    device: Device = "auto",
    cache: Cache = None,
    cache_gib: CacheGib = 8.0,
    trust_remote_code: TrustRemote = False,
    as_json: AsJson = False,
) -> None:
    """Base, learned, learned+veto and oracle on the held-out split: completions, verdicts, metrics.json, report.html."""
    from paving import run as runs
    from paving.processes import together
    from paving.run_engine import answers_folder

    with together(folder, cache or runs.Means.default().cache) as mine:
        with progress(quiet=as_json) as (stage, watch, say):
            means = means_of(cache, cache_gib, device, trust_remote_code, stage, watch, say)
            metrics = runs.evaluate(
                mine, means, policies=policy or (), mixtures=mixture or (), second_judge=judge, engine=engine,
                engine_options=json_object(engine_options, "--engine-options"),
            )  # fmt: skip
        answers = answers_folder(folder, engine)
        show(metrics, answers if judge is None else runs.judge_folder(answers, metrics.judge), as_json)


@app.command()
@one_line_errors
def ablate(
    folder: Annotated[Path, typer.Argument(help="Evaluated run folder: the full recipe.")],
    name: Annotated[str, typer.Argument(help=ABLATED)],
    out_folder: Annotated[Path, typer.Option("--out", help="Run folder of the variant.")],
    device: Device = "auto",
    cache: Cache = None,
    cache_gib: CacheGib = 8.0,
    trust_remote_code: TrustRemote = False,
    as_json: AsJson = False,
) -> None:
    """Train and evaluate a run again with one block of its recipe changed; prompts, scale and all else are its own."""
    from paving.ablations import run_ablation

    with progress(quiet=as_json) as (stage, watch, say):
        means = means_of(cache, cache_gib, device, trust_remote_code, stage, watch, say)
        metrics = run_ablation(folder, name, out_folder, means)
    show(metrics, out_folder, as_json)


@app.command()
@one_line_errors
def report(folder: Annotated[Path, typer.Argument(help="Run folder, a controller's or a circuit's.")]) -> None:
    """Write report.html again from the saved completions, verdicts and metrics. Loads no model."""
    from paving import run as runs
    from paving.circuit_run.evaluate import report as circuit_report

    written = circuit_report(folder) if (folder / "circuit.json").exists() else runs.report(folder)
    out.print(f"report: {written}")


@app.command()
@one_line_errors
def diagnose(
    folder: Annotated[Path, typer.Argument(help="Evaluated run folder.")],
    only: Annotated[str | None, typer.Option(help="Parts, e.g. corruption,trajectory. Default: all but the grid.")] = None,
    again: Annotated[bool, typer.Option(help="Measure also what stands in diagnostics.json already.")] = False,
    expert_prompts: Annotated[int, typer.Option(min=1, help="Most held-out prompts of each bucket per expert policy.")] = 64,
    grid_policies: Annotated[str, typer.Option(help="Gate policies of the grid.")] = "thresholded,hard,oracle",
    grid_mixtures: Annotated[str, typer.Option(help="router, uniform, expert:N, without:N.")] = "router,uniform",
    grid_scales: Annotated[str, typer.Option(help="Factors of the deployed scale.")] = "0.5,1,2",
    grid_prompts: Annotated[int, typer.Option(min=1, help="Most held-out prompts of each bucket in the grid.")] = 24,
    bert_score: Annotated[str | None, typer.Option(help="Encoder for BERTScore (extra: bertscore).")] = None,
    device: Device = "auto",
    cache: Cache = None,
    cache_gib: CacheGib = 8.0,
    trust_remote_code: TrustRemote = False,
    as_json: AsJson = False,
) -> None:
    """Why the numbers are what they are: late, route, probes, trajectory, norms, corruption, usefulness, experts, grid."""
    from paving import diagnose as diagnosis
    from paving.report import diagnosis_lines

    grid = diagnosis.Grid(names(grid_policies), names(grid_mixtures), numbers(grid_scales), grid_prompts)
    options = diagnosis.Options(None if only is None else names(only), again, bert_score, expert_prompts, grid)
    with progress(quiet=as_json) as (stage, watch, say):
        means = means_of(cache, cache_gib, device, trust_remote_code, stage, watch, say)
        found = diagnosis.diagnose(folder, means, options=options)
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    for line in diagnosis_lines(found):
        out.print(line, highlight=False, markup=False)
    out.print(f"report: {folder / 'report.html'}")


@app.command()
@one_line_errors
def chat(
    folder: Annotated[Path, typer.Argument(help="Run folder or controller folder.")],
    model: Annotated[str | None, typer.Option(help="The base, if it moved since training.")] = None,
    policy: Annotated[str | None, typer.Option(help="Gate policy: soft, hard, thresholded, conformal:0.05, closed.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 200,
    system: Annotated[
        str | None, typer.Option(help="System prompt. Default: what the controller was fitted behind.")
    ] = None,
    device: Device = "auto",
) -> None:
    """Talk to the paved model; every turn shows the gate, the mixture and the veto."""
    from paving.chat import chat_loop
    from paving.controller import PavedModel

    if policy == "oracle":
        raise ValueError("a chat has no labels for the oracle gate; use soft, hard, thresholded or closed.")
    paved = PavedModel.from_pretrained(folder, model=model, device=device)
    if policy is not None:
        paved.set_policy(policy)
    chat_loop(paved, out, max_new_tokens=max_new_tokens, lines=sys.stdin, system=system)


@app.command()
@one_line_errors
def models(as_json: AsJson = False) -> None:
    """Presets: which layers are read and edited, per backbone."""
    from dataclasses import asdict

    from paving.presets import PRESETS

    if as_json:
        print(json.dumps([asdict(p) for p in PRESETS], indent=1))
        return
    table = Table("model", "route", "edit", "scale", "source")
    table.columns[0].overflow = "fold"
    for p in PRESETS:
        first, last = p.edit_layers
        scale = "calibrated" if p.scale is None else f"{p.scale:g}"
        table.add_row(p.model, f"{p.route_layers[0]}-{p.route_layers[-1]}", f"{first}-{last}", scale, p.source)
    out.print(table)
    out.print("Any other decoder-only Hugging Face model works too: route 1-4, edit every layer after.")


judging = (cli_judge.judge, cli_judge.agree, cli_judge.sample)
for command in (cli_compare.compare, *judging, cli_reproduce.reproduce, cli_utility.utility):
    app.command()(command)
app.command(context_settings={"allow_extra_args": True})(cli_serve.serve)


# --- from options to configuration ------------------------------------------------------------------------------


def run_config(file: Path | None, **options):
    """The run's configuration: the file's, with given options laid over it."""
    from paving.backbone import EMBEDDED
    from paving.controller.config import windows
    from paving.presets import preset_for
    from paving.run_folder import RunConfig, RunError
    from paving.training.promise import read_promise

    if file is not None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read the configuration {file}: {error}") from error
    else:
        content = {}
    config = RunConfig.model_validate(content).model_dump(mode="json")
    config["model"] = options["model"] or config["model"] or EMBEDDED
    for key in ("edit", "benign", "harmful", "system"):
        config[key] = options[key] or config[key]
    config["targets_from"] = options["targets_from"] or config["targets_from"]
    config["training"]["targets"] = options["targets"] or config["training"]["targets"]
    config["training"]["horizon"] = options["horizon"] or config["training"]["horizon"]
    preset = preset_for(config["model"])
    controller = config["controller"]
    if preset is not None and "controller" not in content:
        controller["route_layers"] = preset.route_layers
        controller["edit_layers"] = tuple(range(preset.edit_layers[0], preset.edit_layers[1] + 1))
    if options["route_layers"]:
        # The preset's edit layers belong to the preset's route layers; the rule is "every layer after the router's".
        controller["route_layers"], controller["edit_layers"] = layers(options["route_layers"]), None
    if options["edit_layers"]:
        controller["edit_layers"] = layers(options["edit_layers"])
    controller["pooling"] = options["pooling"] or controller["pooling"]
    if options["experts"] is not None:
        controller["n_experts"] = options["experts"]
        controller["centres"], controller["widths"] = windows(options["experts"])
    if options["seed"] is not None:
        config["split_seed"] = config["training"]["seed"] = options["seed"]
    if options["promise"] is not None:
        calibration = config["calibration"]
        calibration["promise"] = {**(calibration["promise"] or {}), **read_promise(options["promise"])}
        calibration["policies"] = [p for p in calibration["policies"] if p != "soft"]  # it is never quite closed
    if options["allow_leakage"] is not None:
        config["allow_leakage"] = options["allow_leakage"]
    config["judge"] = options["judge"] or config["judge"]
    config["dtype"] = options["dtype"] or config["dtype"]
    return RunConfig.model_validate(config)


def names(text: str) -> tuple[str, ...]:
    """`a,b` -> ("a", "b")."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str) -> tuple[float, ...]:
    """`0.5,1,2`. raises ValueError naming the part that is no number."""
    try:
        return tuple(float(part) for part in names(text))
    except ValueError:
        raise ValueError(f"{text!r} is no list of numbers. Write for example 0.5,1,2.") from None


def means_of(cache, cache_gib, device, trust_remote_code, stage, watch, say):
    from paving.run import Means

    changes = {"cache": cache} if cache is not None else {}
    return Means.default(
        **changes, cache_gib=cache_gib, device=device, trust_remote_code=trust_remote_code,
        stage=stage, watch=watch, say=say,
    )  # fmt: skip


def progress(*, quiet: bool = False):
    from paving.processes import rank_and_world
    from paving.progress import live_progress

    return live_progress(err, quiet=quiet or rank_and_world()[0] > 0)


def show(metrics, folder: Path, as_json: bool) -> None:
    from paving.report import three_way_table

    if as_json:
        print(metrics.model_dump_json(indent=1))
        return
    out.print(three_way_table(metrics))
    out.print(f"report: {folder / 'report.html'}")


if __name__ == "__main__":
    app()
