"""Commands that judge checkpoints and compare judgements."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import describe
from robustsoup.checkpoints.provenance import find_leakage
from robustsoup.cli.app import app, stdout
from robustsoup.cli.inputs import (
    load,
    model_settings,
    names_of,
    print_json,
    use_threads,
)
from robustsoup.cli.options import (
    AsJson,
    Attack,
    DataOption,
    DataRoot,
    Device,
    Eot,
    Files,
    ImageSize,
    Loss,
    Model,
    Normalize,
    Restarts,
    Samples,
    SearchPrecision,
    Seed,
    Steps,
    Threads,
    Threats,
)
from robustsoup.cli.progress import Bar, stderr
from robustsoup.cli.tables import accuracy_table, protocol
from robustsoup.data import Data
from robustsoup.device import resolve_device
from robustsoup.errors import RequestError
from robustsoup.evaluation.comparison import compare
from robustsoup.evaluation.evaluate import check_above_chance, evaluate
from robustsoup.evaluation.verdicts import Evaluation
from robustsoup.runs.context import Context
from robustsoup.runs.store import Store


@app.command("evaluate")
def evaluate_command(
    checkpoints: Files,
    data: DataOption,
    threat: Threats = [],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    attack: Attack = "apgd",
    loss: Loss = "ce",
    steps: Steps = 100,
    restarts: Restarts = 1,
    eot: Eot = 1,
    samples: Samples = None,
    output: Annotated[
        Path | None, typer.Option("-o", help="A folder for one record (JSON, npz) a checkpoint.")
    ] = None,
    keep_points: Annotated[
        bool, typer.Option("--keep-points", help="Also write the adversarial images (.points.npz).")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="The most images in a pass; else by device.")
    ] = None,
    model: Model = None,
    normalize: Normalize = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    precision: SearchPrecision = "float32",
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """Judge checkpoints, clean and under attack, with 95 % Wilson intervals. Continues where it was killed.

    Example: `robustsoup evaluate eps16.safetensors eps96.safetensors --data digits --threat "Linf 56/255" --steps 20`
    """
    use_threads(threads)
    if keep_points and not output:
        raise RequestError("--keep-points: where to? give -o FOLDER")
    loaded = load(data, data_root, seed, image_size)
    context = Context(
        loaded, model_settings(model, normalize, loaded, checkpoints), resolve_device(device)
    )
    described = {
        name: describe(Checkpoint.load(path), context.network)
        for name, path in names_of(checkpoints).items()
    }
    for checkpoint in described.values():
        check_above_chance(checkpoint, loaded.split(split), checkpoint.name, device=device)
    asked = {
        "threats": threat,
        "attack": attack,
        "loss": loss,
        "steps": steps,
        "restarts": restarts,
        "eot": eot,
        "samples": samples,
        "seed": seed,
        "batch_size": batch_size,
        "device": device,
        "precision": precision,
        "keep_points": keep_points,
    }
    done: dict[str, Evaluation] = {}
    for name, checkpoint in described.items():
        with Bar(f"evaluating {name}") as bar:
            result = evaluate(
                checkpoint,
                loaded.split(split),
                state_path=_unfinished(asked, checkpoint, loaded, split),
                on_progress=bar,
                **asked,
            )
        leakage = find_leakage([checkpoint], loaded.split(split))
        result.record["leakage"] = leakage.as_record()
        if leakage.status != "known":
            text = f"robustsoup: split {leakage.status}: {leakage.why}"
            stderr.print(text, markup=False, soft_wrap=True)
        for warning in result.warnings:
            stderr.print(f"robustsoup: warning: {name}: {warning}", markup=False, soft_wrap=True)
        if output:
            result.save(output / f"{name}.{split}.json")
        done[name] = result
    if as_json:
        return print_json({name: result.to_json() for name, result in done.items()})
    stdout.print(
        accuracy_table({name: result.to_json()["accuracy"] for name, result in done.items()})
    )
    first = next(iter(done.values())).record
    stdout.print(
        f"{first['samples']} samples of {split}, 95 % Wilson intervals{protocol(first)}",
        soft_wrap=True,
    )
    for name, result in done.items():
        if len(result.record["broken_by"]) > 2:
            for key in result.threats:
                left = ", ".join(
                    f"{attempt} {accuracy.value:.1%}"
                    for attempt, accuracy in result.after_each(key).items()
                )
                stdout.print(
                    f"{name}, {key}, left after each: {left}", markup=False, soft_wrap=True
                )


def _unfinished(asked: dict[str, Any], checkpoint: Checkpoint, data: Data, split: str) -> Path:
    """Where an evaluation that is cut off leaves its state: a place of its own for each, beside the store."""
    key = hashlib.sha256(
        json.dumps([asked, checkpoint.digest, data.split(split).digest]).encode()
    ).hexdigest()[:32]
    return Store().root / "unfinished" / f"{key}.pt"


@app.command("compare")
def compare_command(
    first: Annotated[
        Path,
        typer.Argument(
            metavar="A.json", help="A record that evaluate -o wrote.", show_default=False
        ),
    ],
    second: Annotated[
        Path,
        typer.Argument(metavar="B.json", help="Another, of the same split.", show_default=False),
    ],
    as_json: AsJson = False,
) -> None:
    """Compare two evaluations sample by sample: B less A, with 95 % intervals and McNemar's exact p-values.

    Example: `robustsoup evaluate eps16.safetensors eps96.safetensors --data digits --threat "Linf 56/255" --steps 20 -o judged`,
    then `robustsoup compare judged/eps16.test.json judged/eps96.test.json`
    """
    found = compare(Evaluation.load(first), Evaluation.load(second))
    if as_json:
        return print_json(found.to_json())
    table = Table("", *names_of([first, second]), "second less first", box=None)
    for key, row in found.rows.items():
        table.add_row(key, f"{row.a.value:.1%}", f"{row.b.value:.1%}", str(row))
    stdout.print(table)
    stdout.print(f"{found.n} samples, paired; 95 % score intervals (Tango), exact p (McNemar)")
    for note in found.notes:
        stdout.print(f"note: {note}", markup=False, soft_wrap=True)
