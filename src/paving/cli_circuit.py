"""`paving circuit`: refusal of a category installed offline, in a circuit, as an ordinary checkpoint (C-ΔΘ)."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from paving.terminal import AsJson, err, fail, one_line_errors, say

app = typer.Typer(help="C-ΔΘ: find the circuit that refuses a category, edit only its weights.", no_args_is_help=True)

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...")]
TrustRemote = Annotated[bool, typer.Option(help="Let a model repository run its own code. Off unless you ask.")]
RunFolder = Annotated[Path, typer.Argument(help="Circuit run folder.")]
Base = Annotated[
    str, typer.Argument(help="The base: checkpoint folder, hub id in the local cache, or embedded:SmolLM2-135M-Instruct.")
]
DeltaFolder = Annotated[Path, typer.Argument(help="Delta folder: RUN/delta, or what compose wrote.")]


@app.command("find")
@one_line_errors
def find_circuit(
    folder: Annotated[Path, typer.Option("--out", help="Circuit run folder.")],
    pairs: Annotated[str | None, typer.Option(help="JSON lines: a benign column and one column a category.")] = None,
    category: Annotated[str | None, typer.Option(help="The category's column.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Further pairs, for `circuit evaluate` only.")] = None,
    also_benign: Annotated[
        str | None, typer.Option(help="Further prompts that are not to be refused: a file, a dataset, or `starter`.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model id, checkpoint folder, or the embedded default.")] = None,
    benign: Annotated[str | None, typer.Option(help="The benign column. Default: base.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="published (the paper's; the default), or selective: with a retain term on benign pairs."),
    ] = None,
    reading: Annotated[str | None, typer.Option(help="neurons (columns) or outputs (rows) of the FFN output.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="κ: share of channels in the circuit. Default: 0.15, of --recipe selective 0.06.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Who says what a refusal is. Default: rules (docs/model-judges.md).")
    ] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="JSON CircuitConfig; options go first.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split, openings and training.")] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemote = False,
    as_json: AsJson = False,
) -> None:
    """Score every channel by EAP-IG and keep the top κ of each layer: the circuit."""
    from paving.circuit_run import find

    config = circuit_config(
        config_file, recipe,
        pairs=pairs, category=category, held_out=held_out, model=model, benign=benign, fraction=fraction, seed=seed,
        reading=reading, judge=judge, also_benign=also_benign,
    )  # fmt: skip
    with means_of(device, trust_remote_code, quiet=as_json) as means:
        mask = find(config, folder, means)
    if as_json:
        print((folder / "circuit.json").read_text(encoding="utf-8"))
        return
    say(f"circuit: {mask.size} {mask.reading} in {len(mask.channels)} layers: {folder / 'circuit.json'}")
    say(f"next: paving circuit edit {folder}")


@app.command("edit")
@one_line_errors
def edit_circuit(
    folder: RunFolder,
    alpha: Annotated[float | None, typer.Option(help="Your own α, in place of the one the limit chooses.")] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemote = False,
) -> None:
    """Train Δθ = θ+ − θ− on the circuit alone and choose α under the limit on benign over-refusal."""
    from paving.circuit_run import edit

    with means_of(device, trust_remote_code) as means:
        delta = edit(folder, means, alpha=alpha)
    say(f"delta: {folder / 'delta'} (α {delta.alpha:g})")
    say(f"next: paving circuit evaluate {folder}, or paving circuit apply BASE {folder / 'delta'} --out CHECKPOINT")


@app.command("evaluate")
@one_line_errors
def evaluate_circuit(
    folder: RunFolder,
    held_out: Annotated[str | None, typer.Option(help="Held-out pairs, for a run that was begun without.")] = None,
    against: Annotated[list[str] | None, typer.Option(help="Further rows: inverse, random, as, cast, ws.")] = None,
    ood: Annotated[list[str] | None, typer.Option(help="Prompt files or datasets of other sources.")] = None,
    ood_benign: Annotated[
        list[str] | None, typer.Option(help="The same, of prompts that are not to be refused: what over-refusal is there.")
    ] = None,
    delta: Annotated[
        list[Path] | None,
        typer.Option(
            help="Further delta folders of this base, as what compose wrote: a row each. A composition's figures are "
            "written into its folder, for the card."
        ),
    ] = None,
    device: Device = "auto",
    trust_remote_code: TrustRemote = False,
    as_json: AsJson = False,
) -> None:
    """Refusal of the category, over-refusal, other categories and sources on held-out prompts: metrics.json, report.html."""
    from paving.circuit_run import evaluate
    from paving.report import policy_table
    from paving.report.circuit_page import absences
    from paving.terminal import out

    with means_of(device, trust_remote_code, quiet=as_json) as means:
        metrics = evaluate(
            folder, means,
            held_out=held_out, against=against or (), ood=ood or (), ood_benign=ood_benign or (), deltas=delta or (),
        )  # fmt: skip
    if as_json:
        print(metrics.model_dump_json(indent=1))
        return
    out.print(policy_table(metrics))
    for line in absences(metrics):
        say(line)
    say(f"report: {folder / 'report.html'}")


@app.command("compose")
@one_line_errors
def compose_deltas(
    deltas: Annotated[list[Path], typer.Argument(help="Delta folders of one base.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder of the composed delta; it must not exist.")],
    overlap: Annotated[
        str | None,
        typer.Option(help="Where circuits share a channel: largest, sum or mean. Default: the one delta's own, or largest."),
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="Leave out a category of a composed delta.")] = None,
    scale: Annotated[float, typer.Option(help="Of every category's α: together they cost more than each alone.")] = 1.0,
) -> None:
    """Several categories in one delta, overlap resolved channel by channel; --without takes one out again."""
    from paving.circuit.compose import compose, subtract
    from paving.circuit.delta_files import load_delta, save_delta

    loaded = [load_delta(d) for d in deltas]
    as_it_is = overlap is None and scale == 1.0 and len(loaded) == 1
    own = loaded[0].description.composition
    rule = overlap or (own.overlap if len(loaded) == 1 and own is not None else "largest")
    whole = loaded[0] if as_it_is else compose(loaded, overlap=rule, scale=scale)
    for category in without or ():
        whole = subtract(whole, category)
    save_delta(whole, folder)
    say(f"delta of {', '.join(c.category for c in whole.description.components)}: {folder}")


@app.command("apply")
@one_line_errors
def apply_delta(
    base: Base,
    delta: DeltaFolder,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the edited checkpoint; it must not exist.")],
    alpha: Annotated[float | None, typer.Option(help="Another α than the delta's own.")] = None,
) -> None:
    """An ordinary checkpoint with the circuit edited: loads in plain transformers and any server that takes the base.

    What is written is proved, tensor by tensor, before it takes its name.
    """
    from paving.circuit.checkpoint import export_checkpoint
    from paving.circuit.delta_files import load_delta

    with proving(base) as tick:
        export_checkpoint(base, load_delta(delta), alpha, folder, tick=tick)
    say(f"edited checkpoint: {folder}, proved to differ from the base in the circuit alone")
    at = "" if alpha is None else f" --alpha {alpha:g}"
    say(f"the proof again, with hashes: paving circuit verify {base} {folder} {delta}{at} --json")


@app.command("remove")
@one_line_errors
def remove_delta(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint that the delta was applied to.")],
    delta: DeltaFolder,
    folder: Annotated[Path, typer.Option("--out", help="Folder of the restored base; it must not exist.")],
    alpha: Annotated[float | None, typer.Option(help="The α it was applied with, if not the delta's own.")] = None,
) -> None:
    """The base again from an edited checkpoint and its delta alone: the circuit bit for bit, the rest as it is there.

    Weights off the circuit are compared with the base's fingerprint, which samples them; verify compares every bit.
    """
    from paving.circuit.checkpoint import remove_from
    from paving.circuit.delta_files import load_delta

    remove_from(checkpoint, load_delta(delta), folder, alpha=alpha)
    say(f"base: {folder}")


@app.command("verify")
@one_line_errors
def verify_checkpoint(
    base: Base,
    edited: Annotated[Path, typer.Argument(help="The edited checkpoint.")],
    delta: DeltaFolder,
    alpha: Annotated[float | None, typer.Option(help="The α it was applied with, if not the delta's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove from the files alone, tensor by tensor, that nothing outside the circuit changed; exit code 1 if it did."""
    from paving.circuit.verify import verify

    with proving(base, quiet=as_json) as tick:
        found = verify(base, edited, delta, alpha=alpha, tick=tick)
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        for line in found.findings:
            say(line)
    if not found.ok:
        fail(f"{edited} is not {base} with this delta. ({len(found.findings)} findings)")
    if not as_json:
        edited_tensors = sum(bool(t.changed) for t in found.tensors)
        say(
            f"verified: {found.changed:,} of {found.values:,} values changed, all in the circuit "
            f"({edited_tensors} of {len(found.tensors)} tensors)"
        )


# --- from options to configuration ------------------------------------------------------------------------------


def circuit_config(file: Path | None, recipe: str | None, **options):
    """The file's configuration, the recipe laid over it, then every option that was given."""
    from paving.circuit_run.config import CircuitConfig, with_recipe
    from paving.run_folder import RunError

    content = {}
    if file is not None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read the configuration {file}: {error}") from error
    blocks = ("arithmetic", "attribution", "strength", "decoding")
    if not isinstance(content, dict) or not all(isinstance(content.get(b, {}), dict) for b in blocks):
        raise RunError(f"{file} is no CircuitConfig: needed is a JSON object, and one for each of {', '.join(blocks)}.")
    if recipe is not None:
        content = with_recipe(content, recipe)
    seed, reading = options.pop("seed"), options.pop("reading")
    content |= {k: v for k, v in options.items() if v is not None}
    if seed is not None:
        content["seed"] = seed
        content["arithmetic"] = {**content.get("arithmetic", {}), "seed": seed}
    if reading is not None:
        content["attribution"] = {**content.get("attribution", {}), "reading": reading}
    for needed in ("pairs", "category"):
        if needed not in content:
            raise ValueError(f"--{needed} is missing: which contrastive pairs, and which category of them?")
    return CircuitConfig.model_validate(content)


@contextmanager
def proving(base: str, *, quiet: bool = False):
    """Progress over the bytes of the base's weights; gives what to call with those that are done."""
    from paving.circuit.shards import checkpoint_folder
    from paving.progress import live_progress

    total = sum(path.stat().st_size for path in checkpoint_folder(base).glob("*.safetensors"))
    with live_progress(err, quiet=quiet) as (stage, _watch, _note):
        yield stage("proof (bytes)", total)


@contextmanager
def means_of(device: str, trust_remote_code: bool, *, quiet: bool = False):
    from paving.progress import live_progress
    from paving.run import Means

    with live_progress(err, quiet=quiet) as (stage, watch, note):
        yield Means.default(device=device, trust_remote_code=trust_remote_code, stage=stage, watch=watch, say=note)
