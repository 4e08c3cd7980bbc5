"""Commands that make checkpoints, or look whether they can be made."""

from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import describe
from robustsoup.cli.app import app, stdout
from robustsoup.cli.inputs import (
    check_output,
    load,
    model_settings,
    names_of,
    open_all,
    print_json,
    use_threads,
    warn_leakage,
)
from robustsoup.cli.options import (
    AsJson,
    AttackSteps,
    Buffers,
    DataOption,
    DataRoot,
    Device,
    Files,
    Granularity,
    ImageSize,
    Leakage,
    Model,
    Normalize,
    Objective,
    Precision,
    ScheduleOption,
    Seed,
    Threads,
    ThreatOption,
)
from robustsoup.cli.progress import Bar, stderr
from robustsoup.cli.tables import print_soupability
from robustsoup.data import Synthetic
from robustsoup.device import resolve_device
from robustsoup.diagnosis.check import check
from robustsoup.errors import CoefficientError, ModelError, RequestError
from robustsoup.models import build_network
from robustsoup.reports import draw_dial, draw_learned, save_plot, write_coefficient_csv
from robustsoup.runs.context import Context
from robustsoup.runs.folder import ensure_folder
from robustsoup.soups.coefficients import Coefficients, Dial, load_coefficients, uniform
from robustsoup.soups.ingredients import choose_place, total_bytes
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.mixing import check_buffer_policy, default_buffer_policy, mix
from robustsoup.threats import ThreatModel
from robustsoup.training.train import train


@app.command("train")
def train_command(
    data: DataOption,
    threat: ThreatOption,
    output: Annotated[Path, typer.Option("-o", help="The checkpoint to write.")],
    model: Model = None,
    start: Annotated[Path | None, typer.Option("--from", help="Fine-tune this checkpoint.")] = None,
    objective: Objective = "ce",
    attack_steps: AttackSteps = 2,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; else 0.1 fresh, 0.001 with --from.")
    ] = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    weight_decay_bn: Annotated[
        bool, typer.Option(help="Whether BatchNorm's weight and bias decay too.")
    ] = True,
    schedule: ScheduleOption = "cosine",
    label_smoothing: Annotated[
        float, typer.Option(help="The share of each label that all classes get.")
    ] = 0.0,
    clip_grad: Annotated[
        float | None, typer.Option(help="The largest norm of the gradient.")
    ] = None,
    bn_momentum: Annotated[
        float | None, typer.Option(help="Of BatchNorm's statistics; else the network's own.")
    ] = None,
    ema: Annotated[
        float,
        typer.Option(
            help="The decay of an average of the weights, which is then kept, as in 0.995."
        ),
    ] = 0.0,
    synthetic: Annotated[
        Path | None, typer.Option(help="An .npz with generated images (image, label) to mix in.")
    ] = None,
    synthetic_fraction: Annotated[
        float | None, typer.Option(help="Their share of each batch; else 0.7.")
    ] = None,
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="Keep the epoch with the least robust loss on val.")
    ] = False,
    normalize: Normalize = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "auto",
    data_root: DataRoot = None,
    image_size: ImageSize = None,
) -> None:
    """Pre-train a network adversarially, or fine-tune one (--from). Continues where it was killed.

    Example: `robustsoup train --model resnet9:width=8 --data digits --threat "Linf 48/255" --lr 0.1 -o base.safetensors`,
    then `robustsoup train --from base.safetensors --data digits --threat "Linf 16/255" --lr 0.02 -o eps16.safetensors`
    """
    use_threads(threads)
    check_output(output, {".safetensors"})
    loaded = load(data, data_root, seed, image_size)
    if start is None and model is None:
        raise ModelError(
            "train: give --model for fresh weights, or --from for a checkpoint to fine-tune"
        )
    context = Context(
        loaded,
        model_settings(model, normalize, loaded, [start] if start else []),
        resolve_device(device),
    )
    network = (
        describe(Checkpoint.load(start), context.network) if start else context.fresh_network(seed)
    )
    if start:
        warn_leakage([network], loaded, allow=True)
    made = None
    if synthetic_fraction is not None and not synthetic:
        raise RequestError("--synthetic-fraction: of what? give --synthetic FILE.npz")
    if synthetic:
        with Bar(f"reading {synthetic.name}") as bar:
            made = Synthetic.open(synthetic, on_progress=bar)
    rate = lr if lr is not None else (1e-3 if start else 0.1)
    state = output.with_name(f".{output.name}.state.pt")
    with Bar(f"training {output.name}") as bar:
        trained = train(
            network,
            loaded.train,
            threat=threat,
            objective=objective,
            attack_steps=attack_steps,
            epochs=epochs,
            batch_size=batch_size,
            lr=rate,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
            weight_decay_bn=weight_decay_bn,
            schedule=schedule,
            label_smoothing=label_smoothing,
            clip_grad=clip_grad,
            bn_momentum=bn_momentum,
            ema=ema,
            synthetic=made,
            synthetic_fraction=0.7 if synthetic_fraction is None else synthetic_fraction,
            val=loaded.val if early_stop else None,
            early_stop=early_stop,
            seed=seed,
            device=device,
            precision=precision,
            state_path=state,
            on_progress=bar,
        )
    trained.save(output)
    state.unlink(missing_ok=True)
    stdout.print(
        f"{output}: loss {trained.provenance['history'][-1]['loss']:.3f} after {epochs} epochs",
        markup=False,
    )


@app.command("check")
def check_command(
    checkpoints: Files,
    data: Annotated[
        str | None, typer.Option(help="Measure the loss between them on its val: as for learn.")
    ] = None,
    threat: ThreatOption = "clean",
    base: Annotated[
        Path | None,
        typer.Option(help="What they were fine-tuned from; else what their records name."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of val, the first so many.")] = 256,
    pairs: Annotated[
        int, typer.Option(min=1, help="Walk along so many pairs, the farthest apart.")
    ] = 15,
    model: Model = None,
    normalize: Normalize = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    as_json: AsJson = False,
) -> None:
    """Say before any work whether checkpoints can be mixed, and why not: exit code 3 if they cannot.

    Example: `robustsoup check eps16.safetensors eps96.safetensors --data digits --threat "Linf 56/255"`
    """
    use_threads(threads)
    if data is None and (model or normalize or threat != "clean"):
        raise RequestError(
            "check: --model, --normalize and --threat say how networks are run; give --data to run them on"
        )
    split, network = None, None
    if data:
        source = load(data, data_root, seed, image_size)
        context = Context(
            source, model_settings(model, normalize, source, checkpoints), resolve_device(device)
        )
        split, network = source.val, build_network(context.network)
    with Bar("checking") as bar:
        found = check(
            checkpoints,
            data=split,
            threat=threat,
            base=base,
            samples=samples,
            network=network,
            device=device,
            pairs=pairs,
            on_progress=bar,
        )
    if as_json:
        print_json(found.to_json())
    else:
        print_soupability(stdout, found, list(names_of(checkpoints)), pairs)
    raise typer.Exit(0 if found.soupable else 3)


@app.command("mix")
def mix_command(
    checkpoints: Files,
    output: Annotated[
        Path, typer.Option("-o", help="The soup; .safetensors, or .pth as the first file.")
    ],
    coefficients: Annotated[
        list[str],
        typer.Option(
            help="One number a file, as in 1/3 1/3 1/3, or a coefficients file; else uniform."
        ),
    ] = [],
    at: Annotated[
        float | None,
        typer.Option(help="With a dial: which of its soups, from 0 (robust) to 1 (clean)."),
    ] = None,
    buffers: Buffers = None,
    data: Annotated[str | None, typer.Option(help="For the recalibrating --buffers.")] = None,
    base: Annotated[
        Path | None, typer.Option(help="Whose statistics --buffers base takes; else an ancestor's.")
    ] = None,
    threat: Annotated[str, typer.Option(help="For recalibrate-adversarial.")] = "clean",
    model: Model = None,
    normalize: Normalize = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    data_root: DataRoot = None,
    image_size: ImageSize = None,
) -> None:
    """Average checkpoints with given coefficients into one ordinary checkpoint.

    Example: `robustsoup mix eps16.safetensors eps96.safetensors --coefficients 0.5 0.5 -o soup.safetensors`
    """
    use_threads(threads)
    check_output(output, {".safetensors", ".pt", ".pth", ".bin"})
    if base and buffers != "base":
        raise RequestError("--base: whose statistics --buffers base takes; give that too")
    alpha = _coefficients(coefficients, len(checkpoints), at)
    loaded = open_all(checkpoints)
    policy = buffers or default_buffer_policy(alpha)
    network, split = None, None
    if data:
        source = load(data, data_root, seed, image_size)
        split = source.train
        context = Context(
            source, model_settings(model, normalize, source, checkpoints), resolve_device(device)
        )
        loaded = [describe(item, context.network) for item in loaded]
        network = loaded[0].network()
    soup = mix(
        loaded,
        alpha,
        buffers=policy,
        base=base,
        calibrate_on=split,
        threat=ThreatModel.parse(threat),
        network=network,
        device=resolve_device(device),
        seed=seed,
    )
    soup.save(output)
    stdout.print(f"{output}: {len(loaded)} ingredients mixed, statistics: {policy}", markup=False)


def _coefficients(values: list[str], n: int, at: float | None) -> Coefficients:
    if len(values) == 1 and Path(values[0]).suffix == ".safetensors":
        return load_coefficients(values[0], at)
    if at is not None:
        raise CoefficientError(
            "--at: only a dial can be turned; give its file, as in --coefficients DIR/dial.safetensors"
        )
    if not values:
        return uniform(n)
    try:
        return Coefficients.of([float(Fraction(value)) for value in values])
    except (ValueError, ZeroDivisionError, OverflowError):
        raise CoefficientError(
            f"--coefficients: got {' '.join(values)}, expected numbers such as 1/3 or 0.2, or a file"
        ) from None


@app.command("learn")
def learn_command(
    checkpoints: Files,
    data: DataOption,
    threat: ThreatOption,
    output: Annotated[
        Path,
        typer.Option(
            "-o", help="A folder for soup, coefficients (file, table, picture), or the dial."
        ),
    ],
    objective: Objective = "ce",
    attack_steps: AttackSteps = 2,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch_size: Annotated[int, typer.Option(min=2)] = 128,
    lr: float = 10.0,
    momentum: float = 0.9,
    schedule: ScheduleOption = "cosine",
    detach: Annotated[
        float, typer.Option(help="The probability that a layer is left out of a step.")
    ] = 0.8,
    init: Annotated[str, typer.Option(help="xavier or zeros.")] = "xavier",
    granularity: Granularity = "parameter",
    early_stop: Annotated[
        bool, typer.Option("--early-stop", help="Keep the epoch with the least loss on val.")
    ] = False,
    dial: Annotated[
        bool, typer.Option("--dial", help="Learn the whole trade-off at once; for mix --at T.")
    ] = False,
    dial_by: Annotated[
        str | None,
        typer.Option(help="What the dial turns: objective (the clean weight; the default) or eps."),
    ] = None,
    place: Annotated[
        str, typer.Option(help="Where ingredients are kept: auto, device, memory or files.")
    ] = "auto",
    budget: Annotated[
        float | None,
        typer.Option(help="GiB that they may take for auto; else a quarter of what is free."),
    ] = None,
    buffers: Buffers = None,
    learning_buffers: Annotated[
        str, typer.Option(help="As --buffers, for the network that learning attacks.")
    ] = "tracked",
    base: Annotated[
        Path | None,
        typer.Option(help="Whose statistics --learning-buffers base takes; else an ancestor's."),
    ] = None,
    model: Model = None,
    normalize: Normalize = None,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = None,
    precision: Precision = "auto",
    data_root: DataRoot = None,
    image_size: ImageSize = None,
    allow_leakage: Leakage = False,
) -> None:
    """Learn coefficients for each layer adversarially, and write them and the soup. Continues where it was killed.

    Example: `robustsoup learn eps16.safetensors eps96.safetensors --data digits --threat "Linf 64/255" --epochs 5 -o learned`;
    the whole trade-off at once: `robustsoup learn eps16.safetensors eps96.safetensors --data digits --threat "Linf 64/255"
    --epochs 5 --dial -o turned`, then `robustsoup mix eps16.safetensors eps96.safetensors --coefficients turned/dial.safetensors
    --at 0.7 -o cleaner.safetensors`
    """
    use_threads(threads)
    if dial and (objective != "ce" or early_stop or buffers):
        wrong = (
            "--objective" if objective != "ce" else "--early-stop" if early_stop else "--buffers"
        )
        raise RequestError(
            f"{wrong}: has no meaning with --dial; leave it out (mix --at takes --buffers)"
        )
    if dial_by and not dial:
        raise RequestError("--dial-by: says what a dial turns; give --dial")
    if base and "base" not in (buffers, learning_buffers):
        raise RequestError(
            "--base: whose statistics --buffers base or --learning-buffers base takes; give one of them"
        )
    loaded_data = load(data, data_root, seed, image_size)
    policy = buffers or "tracked"
    check_buffer_policy(policy, loaded_data.train, ThreatModel.parse(threat))
    context = Context(
        loaded_data,
        model_settings(model, normalize, loaded_data, checkpoints),
        resolve_device(device),
    )
    opened = [describe(item, context.network) for item in open_all(checkpoints)]
    warn_leakage(opened, loaded_data, allow=allow_leakage)
    kept = choose_place(place, budget, opened, context.device)
    if kept == "files":
        size = f"{len(opened)} ingredients, {total_bytes(opened) / 2**30:.2f} GiB"
        stderr.print(
            f"robustsoup: {size}: read from their files at each step (--budget, --place)",
            markup=False,
            soft_wrap=True,
        )
    ensure_folder(output)
    state = output / ".state.pt"
    asked = {
        "threat": threat,
        "attack_steps": attack_steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "momentum": momentum,
        "schedule": schedule,
        "detach": detach,
        "init": init,
        "granularity": granularity,
        "seed": seed,
        "buffers": learning_buffers,
        "base": base,
        "place": kept,
        "allow_leakage": allow_leakage,
        "device": device,
        "precision": precision,
        "state_path": state,
    }
    names = list(names_of(checkpoints))
    with Bar("learning") as bar:
        if dial:
            found = learn_dial(
                opened, loaded_data.train, by=dial_by or "objective", on_progress=bar, **asked
            )
        else:
            val = loaded_data.val if early_stop else None
            found = learn(
                opened,
                loaded_data.train,
                objective=objective,
                val=val,
                early_stop=early_stop,
                on_progress=bar,
                **asked,
            )
    if dial:
        told = _keep_dial(found, names, output)
    else:
        _write_soup(opened, found, policy, base, ThreatModel.parse(threat), context, seed, output)
        write_coefficient_csv(found, names, output / "coefficients.csv")
        save_plot(draw_learned(found, names, "coefficients by layer"), output)
        told = [f"{output}: mean coefficients {_means(found, names)}"]
    for warning in found.record.get("warnings", ()):
        stderr.print(f"robustsoup: warning: {warning}", markup=False, soft_wrap=True)
    state.unlink(missing_ok=True)
    for line in told:
        stdout.print(line, markup=False, soft_wrap=True)


def _keep_dial(dial: Dial, names: list[str], output: Path) -> list[str]:
    """Write the dial and its picture; what to say of it."""
    _remove_others(output, {"dial.safetensors"})
    dial.save(output / "dial.safetensors")
    turned = [(f"t = {t:g}", dial.at(t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
    save_plot(draw_dial(turned, names, "dial: coefficients by layer"), output)
    ends = "; ".join(f"t = {t:g}: {_means(dial.at(t), names)}" for t in (0, 1))
    return [
        f"{output}: mean coefficients at the robust and the clean end: {ends}",
        f"next: robustsoup mix ... --coefficients {output / 'dial.safetensors'} --at 0.7 -o soup.safetensors",
    ]


def _remove_others(output: Path, written: set[str]) -> None:
    """Remove what an earlier `learn` left in the folder and this one does not write anew."""
    soups = {f"soup{ending}" for ending in (".safetensors", ".pt", ".pth", ".bin")}
    for name in {
        *soups,
        "coefficients.safetensors",
        "coefficients.csv",
        "dial.safetensors",
    } - written:
        (output / name).unlink(missing_ok=True)


def _write_soup(
    opened: list[Checkpoint],
    alpha: Coefficients,
    buffers: str,
    base: Path | None,
    threat: ThreatModel,
    context: Context,
    seed: int,
    output: Path,
) -> None:
    """The coefficients and their soup, also in the first ingredient's own format."""
    own = f"soup{opened[0].path.suffix}" if opened[0].wrapping is not None else "soup.safetensors"
    _remove_others(
        output, {"soup.safetensors", own, "coefficients.safetensors", "coefficients.csv"}
    )
    alpha.save(output / "coefficients.safetensors")
    soup = mix(
        opened,
        alpha,
        buffers=buffers,
        base=base if buffers == "base" else None,
        calibrate_on=context.data.train,
        threat=threat,
        device=context.device,
        seed=seed,
    )
    for name in sorted({"soup.safetensors", own}):
        soup.save(output / name)


def _means(alpha: Coefficients, names: list[str]) -> str:
    return " ".join(
        f"{name} {share:.2f}"
        for name, share in zip(names, alpha.alpha.mean(0).tolist(), strict=True)
    )
