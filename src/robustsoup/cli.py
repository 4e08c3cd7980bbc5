"""The command line: one verb for each Python function. Exit codes: 0 done, 1 the work failed, 2 the request was wrong,
3 the work is done and the answer is no (nothing meets --require, or `check` finds files that cannot be mixed), 130
interrupted (run the same command again to go on)."""

import hashlib
import json
import re
import sys
from fractions import Fraction
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from robustsoup.answers import accuracy_table, as_bytes, print_results, print_soupability, protocol
from robustsoup.checkpoints import Checkpoint
from robustsoup.comparison import compare
from robustsoup.console import Bar, RunReporter, duration, stderr
from robustsoup.data import Data, Synthetic, fetch_cifar10, load_data
from robustsoup.errors import CoefficientError, ModelError, RequestError, RobustsoupError
from robustsoup.evaluation import Evaluation, evaluate, refuse_chance
from robustsoup.leakage import UNKNOWN, VIOLATED, check_leakage, split_status
from robustsoup.models import load_model
from robustsoup.precision import resolve_device
from robustsoup.published import PUBLISHED, fetch_published
from robustsoup.recipes import Recipe, load_recipe, parse_recipe, with_files
from robustsoup.reports import draw_dial, draw_learned, save, write_coefficient_csv, write_report
from robustsoup.runs.cost import bytes_of, seconds_of
from robustsoup.runs.execute import Context
from robustsoup.runs.folder import ensure_folder
from robustsoup.runs.run import Prepared, prepare, run_prepared
from robustsoup.runs.store import Store
from robustsoup.soups.coefficients import Coefficients, load_coefficients, uniform
from robustsoup.soups.ingredients import choose_place, total_bytes
from robustsoup.soups.learning import learn, learn_dial
from robustsoup.soups.mixing import check_policy, default_buffers, mix
from robustsoup.soups.soupability import check
from robustsoup.threats import ThreatModel
from robustsoup.training import train

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn several adversarially fine-tuned checkpoints of one network into one, at the trade-off you need.",
)  # fmt: skip
stdout = Console(highlight=False)
INTERRUPTED = 130

Files = Annotated[list[Path], typer.Argument(help="Checkpoints: .safetensors, .pt, .pth or .bin.", show_default=False)]
DataOption = Annotated[str, typer.Option("--data", help="digits, cifar10 or folder:PATH.")]
ThreatOption = Annotated[str, typer.Option("--threat", help='As in "Linf 8/255", "L2 0.5", "L1 12" or clean.')]
Threats = Annotated[list[str], typer.Option("--threat", help='As in "Linf 8/255"; repeatable.')]
Model = Annotated[
    str | None, typer.Option(help="resnet50, resnet9:width=16 or package.module:factory; where files do not say.")
]
Normalize = Annotated[
    tuple[str, str] | None,
    typer.Option(help='MEAN STD, by channel, for networks that expect it outside: "0.49,0.48,0.45" "0.25,0.24,0.26".'),
]
Objective = Annotated[
    str,
    typer.Option(
        help='ce, "mixed 0.4" (0.4 is the weight of the clean loss), trades, "trades 5" (the weight of the KL term) or '
        "package.module:function."
    ),
]
ScheduleOption = Annotated[
    str, typer.Option("--schedule", help='cosine, constant, one-cycle, "one-cycle 0.1" or cyclic.')
]
AttackSteps = Annotated[int, typer.Option(help="APGD steps of each training attack.")]
Steps = Annotated[int, typer.Option(help="APGD or PGD steps of the evaluation.")]
Attack = Annotated[str, typer.Option(help="apgd, pgd or autoattack (the standard four; needs robustsoup[autoattack]).")]
Loss = Annotated[str, typer.Option(help='What the attack climbs: ce, dlr or "targeted dlr".')]
Restarts = Annotated[int, typer.Option(help="Cold starts of the attack.")]
Eot = Annotated[int, typer.Option(help="Passes that a gradient is averaged over, for networks that answer at random.")]
SearchPrecision = Annotated[
    str, typer.Option(help="The attack's: auto, float32 or bfloat16. Every verdict is judged in float32.")
]
Samples = Annotated[int | None, typer.Option(help="Judge only the first so many samples.")]
Buffers = Annotated[
    str | None,
    typer.Option(help="BatchNorm statistics: base, average, recalibrate, recalibrate-adversarial or tracked."),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**63 - 1, help="The seed of the split, the order of samples and all noise.")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; results are bit-equal at equal numbers.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
DataRoot = Annotated[
    str | None, typer.Option(help="Where data is; else $ROBUSTSOUP_DATA, else the user's cache folder.")
]
ImageSize = Annotated[int | None, typer.Option(help="Pixels a side, for folder:PATH.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON on standard output.")]
Granularity = Annotated[str, typer.Option(help="What has one softmax: parameter, module, block, model or re:PATTERN.")]
Leakage = Annotated[bool, typer.Option("--allow-leakage", help="Judge on samples that an ingredient was trained on.")]
Sets = Annotated[list[str], typer.Option("--set", help="Override a setting, as in soups.learned.epochs=2; repeatable.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    arguments = spread(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    sys.path.insert(0, str(Path.cwd()))  # so that --model my_script:Net finds a file that lies here
    try:
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="robustsoup", standalone_mode=False)
    except RobustsoupError as error:
        if debug:
            raise
        code = _fail(str(error), 2 if isinstance(error, RequestError) else 1)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except Exception as error:
        if debug or not hasattr(error, "exit_code"):
            raise
        code = _fail(f"{_usage(error, arguments)}; see robustsoup --help", 2)
    if code == INTERRUPTED:
        _fail("interrupted; run the same command again to go on", code)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Exception, arguments: list[str]) -> str:
    """What is wrong with the words of the command line, with the value that a wrong option was given."""
    text = error.format_message().rstrip(".") if hasattr(error, "format_message") else str(error)
    for option in getattr(getattr(error, "param", None), "opts", ()):
        if option in arguments[:-1]:
            text += f", got {arguments[arguments.index(option) + 1]}"
    return text


def _fail(message: str, code: int) -> int:
    stderr.print(f"robustsoup: {message}", markup=False, soft_wrap=True)
    return code


def spread(arguments: list[str]) -> list[str]:
    """Let --coefficients take several values: each further number gets the option's name before it."""
    out: list[str] = []
    taking = False
    for argument in arguments:
        if taking and out[-1] != "--coefficients" and re.fullmatch(r"[\d./eE+-]*\d\.?", argument):
            out.append("--coefficients")
        elif out[-1:] != ["--coefficients"]:
            taking = argument == "--coefficients"
        out.append(argument)
    return out


@app.command()
def demo(output: Annotated[Path, typer.Option("-o", help="The run folder.")] = Path("runs/quickstart"),
         device: Device = "auto", threads: Threads = None) -> None:  # fmt: skip
    """Run the quickstart recipe on embedded data (scikit-learn's digits), then write its report.

    Example: `robustsoup demo`
    """
    _threads(threads)
    recipe = load_recipe(str(files("robustsoup") / "quickstart.toml"))
    _finish(recipe, output, device, None, as_json=False)


@app.command()
def run(recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")], sets: Sets = [],
        output: Annotated[Path | None, typer.Option("-o", help="The run folder; else runs/NAME.")] = None,
        device: Device = "auto", threads: Threads = None, data_root: DataRoot = None,
        as_json: AsJson = False) -> None:  # fmt: skip
    """Run a recipe, or go on with it: only what the store lacks is done. Then write the report.

    Example, after `robustsoup demo`: `robustsoup run runs/quickstart/recipe.toml --set evaluate.steps=10 -o runs/ten`
    """
    _threads(threads)
    loaded = load_recipe(recipe, sets)
    raise typer.Exit(_finish(loaded, output or Path("runs") / loaded.name, device, data_root, as_json=as_json))


@app.command()
def plan(recipe: Annotated[Path, typer.Argument(help="A recipe (TOML).")], sets: Sets = [], device: Device = "auto",
         threads: Threads = None, data_root: DataRoot = None, as_json: AsJson = False) -> None:  # fmt: skip
    """Show a recipe's steps, which are in the store already, and what the others will cost. Runs none of them.

    The cost comes from timing a few batches on this device.

    Example, after `robustsoup demo`: `robustsoup plan runs/quickstart/recipe.toml --set finetune.epochs=20`
    """
    _threads(threads)
    prepared = _prepare(load_recipe(recipe, sets), device, data_root)
    steps, store = prepared.plan.steps, prepared.store
    cost = seconds_of(steps, prepared.context)
    rows = [
        {"kind": s.kind, "name": s.name, "key": s.key, "done": store.has(s.key), "seconds": round(cost[s.key], 2)}
        for s in steps
    ]
    missing = sum(row["seconds"] for row in rows if not row["done"])
    todo = [step for step in steps if not store.has(step.key)]
    price = {
        "seconds": missing, "bytes": bytes_of(todo, prepared.context), "passes": sum(step.passes for step in todo),
        "epochs": sum(step.settings["epochs"] for step in todo if "epochs" in step.settings),
    }  # fmt: skip
    if as_json:
        return _print_json({"recipe": prepared.plan.recipe.name, "steps": rows, **price})
    table = Table("step", "name", "store", "about", box=None)
    for row in rows:
        table.add_row(
            row["kind"], row["name"], "done" if row["done"] else "-", "" if row["done"] else duration(row["seconds"])
        )
    stdout.print(table)
    stdout.print(
        f"{len(rows)} steps, {len(todo)} to do: {price['epochs']} epochs, {price['passes']:.1e} forward passes, "
        f"about {duration(missing)} on this {prepared.context.device.type} and {as_bytes(price['bytes'])} of disk",
        soft_wrap=True,
    )


@app.command("train")
def train_command(
    data: DataOption, threat: ThreatOption, output: Annotated[Path, typer.Option("-o", help="The checkpoint to write.")],
    model: Model = None, start: Annotated[Path | None, typer.Option("--from", help="Fine-tune this checkpoint.")] = None,
    objective: Objective = "ce", attack_steps: AttackSteps = 2,
    epochs: Annotated[int, typer.Option(min=1)] = 10, batch_size: Annotated[int, typer.Option(min=2)] = 128,
    lr: Annotated[float | None, typer.Option(help="Learning rate; else 0.1 fresh, 0.001 with --from.")] = None,
    momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0,
    weight_decay_bn: Annotated[bool, typer.Option(help="Whether BatchNorm's weight and bias decay too.")] = True,
    schedule: ScheduleOption = "cosine",
    label_smoothing: Annotated[float, typer.Option(help="The share of each label that all classes get.")] = 0.0,
    clip_grad: Annotated[float | None, typer.Option(help="The largest norm of the gradient.")] = None,
    bn_momentum: Annotated[float | None, typer.Option(help="Of BatchNorm's statistics; else the network's own.")] = None,
    ema: Annotated[float, typer.Option(help="The decay of an average of the weights, which is then kept, as in 0.995.")] = 0.0,
    synthetic: Annotated[Path | None, typer.Option(help="An .npz with generated images (image, label) to mix in.")] = None,
    synthetic_fraction: Annotated[float, typer.Option(help="Their share of each batch.")] = 0.7,
    early_stop: Annotated[bool, typer.Option("--early-stop", help="Keep the epoch with the least robust loss on val.")] = False,
    normalize: Normalize = None, seed: Seed = 0, device: Device = "auto", threads: Threads = None,
    precision: Precision = "auto", data_root: DataRoot = None, image_size: ImageSize = None,
) -> None:  # fmt: skip
    """Pre-train a network adversarially, or fine-tune one (--from). Continues where it was killed.

    Example: `robustsoup train --model resnet9:width=8 --data digits --threat "Linf 48/255" --lr 0.1 -o base.safetensors`,
    then `robustsoup train --from base.safetensors --data digits --threat "Linf 16/255" --lr 0.02 -o eps16.safetensors`
    """
    _threads(threads)
    _check_output(output, {".safetensors"})
    loaded = _load(data, data_root, seed, image_size)
    if start is None and model is None:
        raise ModelError("train: give --model for fresh weights, or --from for a checkpoint to fine-tune")
    context = Context(loaded, _model(model, normalize, loaded, [start] if start else []), resolve_device(device))
    network = context.describe(Checkpoint.load(start)) if start else context.fresh_network(seed)
    if start:
        _warn_leakage([network], loaded, allow=True)
    made = None
    if synthetic:
        with Bar(f"reading {synthetic.name}") as bar:
            made = Synthetic.open(synthetic, on_progress=bar)
    rate = lr if lr is not None else (1e-3 if start else 0.1)
    state = output.with_name(f".{output.name}.state.pt")
    with Bar(f"training {output.name}") as bar:
        trained = train(
            network, loaded.train, threat=threat, objective=objective, attack_steps=attack_steps, epochs=epochs,
            batch_size=batch_size, lr=rate, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
            weight_decay_bn=weight_decay_bn, schedule=schedule, label_smoothing=label_smoothing, clip_grad=clip_grad,
            bn_momentum=bn_momentum, ema=ema, synthetic=made, synthetic_fraction=synthetic_fraction,
            val=loaded.val if early_stop else None, early_stop=early_stop, seed=seed, device=device, precision=precision,
            state_path=state, on_progress=bar,
        )  # fmt: skip
    trained.save(output)
    state.unlink(missing_ok=True)
    stdout.print(f"{output}: loss {trained.provenance['history'][-1]['loss']:.3f} after {epochs} epochs", markup=False)


@app.command("check")
def check_command(
    checkpoints: Files,
    data: Annotated[str | None, typer.Option(help="Measure the loss between them on its val: as for learn.")] = None,
    threat: ThreatOption = "clean",
    base: Annotated[Path | None, typer.Option(help="What they were fine-tuned from; else what their records name.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of val, the first so many.")] = 256,
    pairs: Annotated[int, typer.Option(min=1, help="Walk along so many pairs, the farthest apart.")] = 15,
    model: Model = None, normalize: Normalize = None, seed: Seed = 0, device: Device = "auto", threads: Threads = None,
    data_root: DataRoot = None, image_size: ImageSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Say before any work whether checkpoints can be mixed, and why not: exit code 3 if they cannot.

    Example: `robustsoup check eps16.safetensors eps96.safetensors --data digits --threat "Linf 56/255"`
    """
    _threads(threads)
    if data is None and (model or normalize or threat != "clean"):
        raise RequestError(
            "check: --model, --normalize and --threat say how networks are run; give --data to run them on"
        )
    split, network = None, None
    if data:
        source = _load(data, data_root, seed, image_size)
        context = Context(source, _model(model, normalize, source, checkpoints), resolve_device(device))
        split, network = source.val, load_model(**context.model)
    with Bar("checking") as bar:
        found = check(
            checkpoints, data=split, threat=threat, base=base, samples=samples, network=network, device=device, pairs=pairs,
            on_progress=bar,
        )  # fmt: skip
    if as_json:
        _print_json(found.to_json())
    else:
        print_soupability(stdout, found, list(_names(checkpoints)), pairs)
    raise typer.Exit(0 if found.soupable else 3)


@app.command("mix")
def mix_command(
    checkpoints: Files, output: Annotated[Path, typer.Option("-o", help="The soup; .safetensors, or .pth as the first file.")],
    coefficients: Annotated[
        list[str], typer.Option(help="One number a file, as in 1/3 1/3 1/3, or a coefficients file; else uniform.")
    ] = [],
    at: Annotated[float | None, typer.Option(help="With a dial: which of its soups, from 0 (robust) to 1 (clean).")] = None,
    buffers: Buffers = None, data: Annotated[str | None, typer.Option(help="For the recalibrating --buffers.")] = None,
    base: Annotated[Path | None, typer.Option(help="Whose statistics --buffers base takes; else an ancestor's.")] = None,
    threat: Annotated[str, typer.Option(help="For recalibrate-adversarial.")] = "clean", model: Model = None,
    normalize: Normalize = None, seed: Seed = 0, device: Device = "auto", threads: Threads = None,
    data_root: DataRoot = None, image_size: ImageSize = None,
) -> None:  # fmt: skip
    """Average checkpoints with given coefficients into one ordinary checkpoint.

    Example: `robustsoup mix eps16.safetensors eps96.safetensors --coefficients 0.5 0.5 -o soup.safetensors`
    """
    _threads(threads)
    _check_output(output, {".safetensors", ".pt", ".pth", ".bin"})
    if base and buffers != "base":
        raise RequestError("--base: whose statistics --buffers base takes; give that too")
    alpha = _coefficients(coefficients, len(checkpoints), at)
    loaded = _open(checkpoints)
    policy = buffers or default_buffers(alpha)
    network, split = None, None
    if data:
        source = _load(data, data_root, seed, image_size)
        split = source.train
        context = Context(source, _model(model, normalize, source, checkpoints), resolve_device(device))
        loaded = [context.describe(item) for item in loaded]
        network = loaded[0].network()
    soup = mix(
        loaded, alpha, buffers=policy, base=base, calibrate_on=split, threat=ThreatModel.parse(threat), network=network,
        device=resolve_device(device), seed=seed,
    )  # fmt: skip
    soup.save(output)
    stdout.print(f"{output}: {len(loaded)} ingredients mixed, statistics: {policy}", markup=False)


@app.command()
def search(
    checkpoints: Files, data: DataOption, threat: Threats,
    output: Annotated[Path, typer.Option("-o", help="The run folder: soup, table, figures, report.")],
    method: Annotated[str, typer.Option(help="grid, line, uniform or greedy.")] = "grid",
    step: Annotated[float, typer.Option(help="The grid's step.")] = 0.2,
    score: Annotated[
        str | None, typer.Option(help='What greedy must not lose, as in "0.3 clean + 0.7 Linf 8/255"; else --maximise.')
    ] = None,
    require: Annotated[list[str], typer.Option(help='As in "clean>=0.85"; repeatable.')] = [],
    maximise: Annotated[str | None, typer.Option(help="What to maximise; else the first --threat.")] = None,
    point: Annotated[bool, typer.Option("--point", help="Judge --require by the estimate, not by its 95 % lower end.")] = False,
    attack: Attack = "apgd", loss: Loss = "ce", steps: Steps = 100, restarts: Restarts = 1, samples: Samples = None,
    screen: Annotated[bool, typer.Option("--screen", help="Try all briefly, confirm in full what no other beats.")] = False,
    buffers: Buffers = None, model: Model = None, normalize: Normalize = None,
    seed: Seed = 0, device: Device = "auto", threads: Threads = None, precision: SearchPrecision = "float32",
    data_root: DataRoot = None, image_size: ImageSize = None, allow_leakage: Leakage = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Try soups on `val`, pick the most robust one that meets --require, judge it on `test`, write it. Resumes.

    Example: `robustsoup search eps16.safetensors eps64.safetensors eps96.safetensors --data digits --threat "Linf 56/255"
    --require "clean>=0.9" --steps 20 -o best`
    """
    _threads(threads)
    names = _names(checkpoints)
    section = method if method not in names else f"{method}-soup"
    own = {"step": step} if method in ("grid", "line") else {}
    if method == "greedy" and screen:
        raise RequestError("--screen: a greedy soup is judged in full at each turn; leave it out")
    if score is not None:
        own["score"] = score
    content = {
        "name": "search", "data": _absolute_folder(data), "seed": seed, "image_size": image_size, "model": model,
        "normalize": normalize and [_numbers(part) for part in normalize], "allow_leakage": allow_leakage,
        "ingredients": {name: str(Path(path).absolute()) for name, path in names.items()},
        "soups": {section: {"method": method, "buffers": buffers} | own},
        "evaluate": {"threats": threat, "attack": attack, "loss": loss, "steps": steps, "restarts": restarts, "screen": screen,
                     "select_samples": samples, "report_samples": samples, "report": "chosen", "precision": precision},
        "select": {"maximise": maximise, "require": require, "point": point},
        "report": {"figures": ["ternary", "tradeoff"]},
    }  # fmt: skip
    recipe = parse_recipe(content, "search", Path.cwd())
    raise typer.Exit(_finish(recipe, output, device, data_root, as_json=as_json))


@app.command("learn")
def learn_command(
    checkpoints: Files, data: DataOption, threat: ThreatOption,
    output: Annotated[Path, typer.Option("-o", help="A folder for soup, coefficients (file, table, picture), or the dial.")],
    objective: Objective = "ce", attack_steps: AttackSteps = 2, epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch_size: Annotated[int, typer.Option(min=2)] = 128, lr: float = 10.0, momentum: float = 0.9,
    schedule: ScheduleOption = "cosine",
    detach: Annotated[float, typer.Option(help="The probability that a layer is left out of a step.")] = 0.8,
    init: Annotated[str, typer.Option(help="xavier or zeros.")] = "xavier",
    granularity: Granularity = "parameter",
    early_stop: Annotated[bool, typer.Option("--early-stop", help="Keep the epoch with the least loss on val.")] = False,
    dial: Annotated[bool, typer.Option("--dial", help="Learn the whole trade-off at once; for mix --at T.")] = False,
    dial_by: Annotated[
        str | None, typer.Option(help="What the dial turns: objective (the clean weight; the default) or eps.")
    ] = None,
    place: Annotated[str, typer.Option(help="Where ingredients are kept: auto, device, memory or files.")] = "auto",
    budget: Annotated[float | None, typer.Option(help="GiB that they may take for auto; else a quarter of what is free.")] = None,
    buffers: Buffers = None,
    learning_buffers: Annotated[str, typer.Option(help="As --buffers, for the network that learning attacks.")] = "tracked",
    base: Annotated[Path | None, typer.Option(help="Whose statistics --learning-buffers base takes; else an ancestor's.")] = None,
    model: Model = None, normalize: Normalize = None, seed: Seed = 0, device: Device = "auto", threads: Threads = None,
    precision: Precision = "auto", data_root: DataRoot = None, image_size: ImageSize = None, allow_leakage: Leakage = False,
) -> None:  # fmt: skip
    """Learn coefficients for each layer adversarially, and write them and the soup. Continues where it was killed.

    Example: `robustsoup learn eps16.safetensors eps96.safetensors --data digits --threat "Linf 64/255" --epochs 5 -o learned`;
    the whole trade-off at once: `robustsoup learn eps16.safetensors eps96.safetensors --data digits --threat "Linf 64/255"
    --epochs 5 --dial -o turned`, then `robustsoup mix eps16.safetensors eps96.safetensors --coefficients turned/dial.safetensors
    --at 0.7 -o cleaner.safetensors`
    """
    _threads(threads)
    if dial and (objective != "ce" or early_stop or buffers):
        wrong = "--objective" if objective != "ce" else "--early-stop" if early_stop else "--buffers"
        raise RequestError(f"{wrong}: has no meaning with --dial; leave it out (mix --at takes --buffers)")
    if dial_by and not dial:
        raise RequestError("--dial-by: says what a dial turns; give --dial")
    if base and "base" not in (buffers, learning_buffers):
        raise RequestError("--base: whose statistics --buffers base or --learning-buffers base takes; give one of them")
    loaded_data = _load(data, data_root, seed, image_size)
    policy = buffers or "tracked"
    check_policy(policy, loaded_data.train, ThreatModel.parse(threat))
    context = Context(loaded_data, _model(model, normalize, loaded_data, checkpoints), resolve_device(device))
    opened = [context.describe(item) for item in _open(checkpoints)]
    _warn_leakage(opened, loaded_data, allow=allow_leakage)
    kept = choose_place(place, budget, opened, context.device)
    if kept == "files":
        size = f"{len(opened)} ingredients, {total_bytes(opened) / 2**30:.2f} GiB"
        stderr.print(
            f"robustsoup: {size}: read from their files at each step (--budget, --place)", markup=False, soft_wrap=True
        )
    ensure_folder(output)
    state = output / ".state.pt"
    asked = {
        "threat": threat, "attack_steps": attack_steps, "epochs": epochs, "batch_size": batch_size, "lr": lr,
        "momentum": momentum, "schedule": schedule, "detach": detach, "init": init, "granularity": granularity, "seed": seed,
        "buffers": learning_buffers, "base": base, "place": kept, "allow_leakage": allow_leakage, "device": device,
        "precision": precision, "state_path": state,
    }  # fmt: skip
    names = list(_names(checkpoints))
    with Bar("learning") as bar:
        if dial:
            line = learn_dial(opened, loaded_data.train, by=dial_by or "objective", on_progress=bar, **asked)
        else:
            val = loaded_data.val if early_stop else None
            alpha = learn(
                opened, loaded_data.train, objective=objective, val=val, early_stop=early_stop, on_progress=bar, **asked
            )
    if dial:
        _remove_others(output, {"dial.safetensors"})
        line.save(output / "dial.safetensors")
        turned = [(f"t = {t:g}", line.at(t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
        save(draw_dial(turned, names, "dial: coefficients by layer"), output)
    else:
        _write_soup(opened, alpha, policy, base, ThreatModel.parse(threat), context, seed, output)
        write_coefficient_csv(alpha, names, output / "coefficients.csv")
        save(draw_learned(alpha, names, "coefficients by layer"), output)
    for warning in (line if dial else alpha).record.get("warnings", ()):
        stderr.print(f"robustsoup: warning: {warning}", markup=False, soft_wrap=True)
    state.unlink(missing_ok=True)
    if dial:
        ends = "; ".join(f"t = {t:g}: {_means(line.at(t), names)}" for t in (0, 1))
        stdout.print(
            f"{output}: mean coefficients at the robust and the clean end: {ends}", markup=False, soft_wrap=True
        )
        stdout.print(f"next: robustsoup mix ... --coefficients {output / 'dial.safetensors'} --at 0.7 -o soup.safetensors",
                     markup=False, soft_wrap=True)  # fmt: skip
    else:
        stdout.print(f"{output}: mean coefficients {_means(alpha, names)}", markup=False, soft_wrap=True)


def _remove_others(output: Path, written: set[str]) -> None:
    """Remove what an earlier `learn` left in the folder and this one does not write anew."""
    soups = {f"soup{ending}" for ending in (".safetensors", ".pt", ".pth", ".bin")}
    for name in {*soups, "coefficients.safetensors", "coefficients.csv", "dial.safetensors"} - written:
        (output / name).unlink(missing_ok=True)


def _write_soup(opened: list[Checkpoint], alpha: Coefficients, buffers: str, base: Path | None, threat: ThreatModel,
                context: Context, seed: int, output: Path) -> None:  # fmt: skip
    """The coefficients and their soup, also in the first ingredient's own format."""
    own = f"soup{opened[0].path.suffix}" if opened[0].wrapping is not None else "soup.safetensors"
    _remove_others(output, {"soup.safetensors", own, "coefficients.safetensors", "coefficients.csv"})
    alpha.save(output / "coefficients.safetensors")
    soup = mix(opened, alpha, buffers=buffers, base=base if buffers == "base" else None, calibrate_on=context.data.train,
               threat=threat, device=context.device, seed=seed)  # fmt: skip
    for name in sorted({"soup.safetensors", own}):
        soup.save(output / name)


def _means(alpha: Coefficients, names: list[str]) -> str:
    return " ".join(f"{name} {share:.2f}" for name, share in zip(names, alpha.alpha.mean(0).tolist(), strict=True))


@app.command("evaluate")
def evaluate_command(
    checkpoints: Files, data: DataOption, threat: Threats = [],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    attack: Attack = "apgd", loss: Loss = "ce", steps: Steps = 100, restarts: Restarts = 1, eot: Eot = 1,
    samples: Samples = None,
    output: Annotated[Path | None, typer.Option("-o", help="A folder for one record (JSON, npz) a checkpoint.")] = None,
    keep_points: Annotated[bool, typer.Option("--keep-points", help="Also write the adversarial images (.points.npz).")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="The most images in a pass; else by device.")] = None,
    model: Model = None, normalize: Normalize = None, seed: Seed = 0, device: Device = "auto", threads: Threads = None,
    precision: SearchPrecision = "float32", data_root: DataRoot = None, image_size: ImageSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Judge checkpoints, clean and under attack, with 95 % Wilson intervals. Continues where it was killed.

    Example: `robustsoup evaluate eps16.safetensors eps96.safetensors --data digits --threat "Linf 56/255" --steps 20`
    """
    _threads(threads)
    if keep_points and not output:
        raise RequestError("--keep-points: where to? give -o FOLDER")
    loaded = _load(data, data_root, seed, image_size)
    context = Context(loaded, _model(model, normalize, loaded, checkpoints), resolve_device(device))
    described = {name: context.describe(Checkpoint.load(path)) for name, path in _names(checkpoints).items()}
    for checkpoint in described.values():
        refuse_chance(checkpoint, loaded.split(split), checkpoint.name, device=device)
    asked = {
        "threats": threat, "attack": attack, "loss": loss, "steps": steps, "restarts": restarts, "eot": eot, "samples": samples,
        "seed": seed, "batch_size": batch_size, "device": device, "precision": precision, "keep_points": keep_points,
    }  # fmt: skip
    done: dict[str, Evaluation] = {}
    for name, checkpoint in described.items():
        with Bar(f"evaluating {name}") as bar:
            result = evaluate(checkpoint, loaded.split(split), state_path=_unfinished(asked, checkpoint, loaded, split),
                              on_progress=bar, **asked)  # fmt: skip
        status, why = split_status([checkpoint], loaded.split(split))
        result.record["leakage"] = {"status": status, "why": why}
        if status != "known":
            stderr.print(f"robustsoup: split {status}: {why}", markup=False, soft_wrap=True)
        for warning in result.warnings:
            stderr.print(f"robustsoup: warning: {name}: {warning}", markup=False, soft_wrap=True)
        if output:
            result.save(output / f"{name}.{split}.json")
        done[name] = result
    if as_json:
        return _print_json({name: result.to_json() for name, result in done.items()})
    stdout.print(accuracy_table({name: result.to_json()["accuracy"] for name, result in done.items()}))
    first = next(iter(done.values())).record
    stdout.print(f"{first['samples']} samples of {split}, 95 % Wilson intervals{protocol(first)}", soft_wrap=True)
    for name, result in done.items():
        if len(result.record["broken_by"]) > 2:
            for key in result.threats:
                left = ", ".join(
                    f"{attempt} {accuracy.value:.1%}" for attempt, accuracy in result.after_each(key).items()
                )
                stdout.print(f"{name}, {key}, left after each: {left}", markup=False, soft_wrap=True)


def _unfinished(asked: dict[str, Any], checkpoint: Checkpoint, data: Data, split: str) -> Path:
    """Where an evaluation that is cut off leaves its state: a place of its own for each, beside the store."""
    key = hashlib.sha256(json.dumps([asked, checkpoint.digest, data.split(split).digest]).encode()).hexdigest()[:32]
    return Store().root / "unfinished" / f"{key}.pt"


@app.command("compare")
def compare_command(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A record that evaluate -o wrote.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another, of the same split.", show_default=False)],
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compare two evaluations sample by sample: B less A, with 95 % intervals and McNemar's exact p-values.

    Example: `robustsoup evaluate eps16.safetensors eps96.safetensors --data digits --threat "Linf 56/255" --steps 20 -o judged`,
    then `robustsoup compare judged/eps16.test.json judged/eps96.test.json`
    """
    found = compare(Evaluation.load(first), Evaluation.load(second))
    if as_json:
        return _print_json(found.to_json())
    table = Table("", *_names([first, second]), "second less first", box=None)
    for key, row in found.rows.items():
        table.add_row(key, f"{row.a.value:.1%}", f"{row.b.value:.1%}", str(row))
    stdout.print(table)
    stdout.print(f"{found.n} samples, paired; 95 % score intervals (Tango), exact p (McNemar)")
    for note in found.notes:
        stdout.print(f"note: {note}", markup=False, soft_wrap=True)


@app.command("landscape")
def landscape_command(
    first: Annotated[Path, typer.Argument(metavar="W0", help="At the origin, say the pre-trained network.", show_default=False)],
    second: Annotated[Path, typer.Argument(metavar="W1", help="Off the x axis.", show_default=False)],
    third: Annotated[Path, typer.Argument(metavar="W2", help="At the end of the x axis.", show_default=False)],
    data: DataOption, threat: ThreatOption,
    output: Annotated[Path, typer.Option("-o", help="The run folder: losses, picture, report.")],
    points: Annotated[int, typer.Option(min=2, help="Points along each side.")] = 21,
    samples: Annotated[int, typer.Option(min=1, help="At most so many test samples, drawn by the seed.")] = 2000,
    attack_steps: Annotated[int, typer.Option(min=1, help="APGD steps; the highest loss of every sample counts.")] = 10,
    buffers: Annotated[str, typer.Option(help="base, recalibrate or recalibrate-adversarial.")] = "recalibrate",
    calibrate_samples: Annotated[int, typer.Option(min=2, help="Training samples that statistics are measured on.")] = 10_000,
    model: Model = None, normalize: Normalize = None, seed: Seed = 0, device: Device = "auto", threads: Threads = None,
    precision: Precision = "auto", data_root: DataRoot = None, image_size: ImageSize = None, allow_leakage: Leakage = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Map the robust loss on the plane through three checkpoints. Goes on where it was killed, point by point.

    Example: `robustsoup landscape base.safetensors eps16.safetensors eps96.safetensors --data digits --threat "Linf 56/255"
    --points 5 --samples 200 -o plane`
    """
    _threads(threads)
    names = _names([first, second, third])
    plane = {"checkpoints": list(names), "threat": threat, "points": points, "samples": samples, "buffers": buffers,
             "attack_steps": attack_steps, "calibrate_samples": calibrate_samples}  # fmt: skip
    content = {
        "name": "landscape", "data": _absolute_folder(data), "seed": seed, "image_size": image_size, "model": model,
        "normalize": normalize and [_numbers(part) for part in normalize], "allow_leakage": allow_leakage, "precision": precision,
        "ingredients": {name: str(Path(path).absolute()) for name, path in names.items()}, "planes": {"plane": plane},
        "evaluate": {"threats": [], "report": "chosen"}, "report": {"figures": ["landscape"]},
    }  # fmt: skip
    recipe = parse_recipe(content, "landscape", Path.cwd())
    raise typer.Exit(_finish(recipe, output, device, data_root, as_json=as_json))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Draw the figures of a run folder anew and write its report.html.

    Example, after `robustsoup demo`: `robustsoup report runs/quickstart`
    """
    stdout.print(f"report: {write_report(folder)}", markup=False, soft_wrap=True)


@app.command()
def fetch(
    what: Annotated[str, typer.Argument(metavar="WHAT", help="cifar10, or robustbench:NAME.", show_default=False)],
    sha256: Annotated[str | None, typer.Option(help="Refuse a checkpoint that has not this digest.")] = None,
    data_root: DataRoot = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Download data or a published checkpoint, once, and check it; say where it is and what to do next.

    No digests of RobustBench's files are published: the first one seen is recorded beside the file, and holds from then on.

    Example: `robustsoup fetch robustbench:Wang2023Better_WRN-28-10`
    """
    if what == "cifar10":
        if sha256:
            raise RequestError("--sha256: CIFAR-10 is checked against its published digests; leave it out")
        _fetch(what, data_root)
        answer = {"path": str(fetch_cifar10(data_root)), "next": 'robustsoup train --model resnet9 --data cifar10 --threat '
                  '"Linf 8/255" -o base.safetensors'}  # fmt: skip
    elif what.startswith("robustbench:"):
        answer = _fetch_published(what.removeprefix("robustbench:"), data_root, sha256)
    else:
        known = ", ".join(["cifar10", *(f"robustbench:{name}" for name in PUBLISHED)])
        raise RequestError(f'fetch: got "{what}", expected one of {known}')
    if as_json:
        return _print_json(answer)
    stdout.print(answer["path"], markup=False, soft_wrap=True)
    if "sha256" in answer:
        seen = "first seen now; no digest is published" if answer["first_seen"] else "as recorded"
        stdout.print(f"sha256 {answer['sha256']} ({seen})", markup=False, soft_wrap=True)
    stdout.print(f"next: {answer['next']}", markup=False, soft_wrap=True)


def _fetch_published(name: str, root: str | None, sha256: str | None) -> dict[str, Any]:
    with Bar(f"downloading {name}") as bar:
        found = fetch_published(name, root, sha256=sha256, on_progress=bar)
    model, threat = found.published.model, found.published.threat
    return {
        "path": str(found.path), "model": model, "threat": threat, "sha256": found.sha256, "first_seen": found.first_seen,
        "next": f'robustsoup evaluate "{found.path}" --model {model} --data cifar10 --threat "{threat}" --attack autoattack',
    }  # fmt: skip


def _finish(recipe: Recipe, folder: Path, device: str, data_root: str | None, *, as_json: bool) -> int:
    """Run a recipe into `folder`, report, print where to look; 3 if nothing meets the requirements."""
    prepared = _prepare(recipe, device, data_root)
    _say_leakage(*prepared.leakage)
    ensure_folder(folder)
    with RunReporter(prepared.context, folder) as reporter:
        results, selection = run_prepared(prepared, folder, reporter)
    page = write_report(folder)
    if as_json:
        _print_json(
            {key: results.get(key) for key in ("name", "selection", "soup", "leakage", "protocol", "rows", "planes")}
        )
    else:
        print_results(stdout, results, page)
    return 3 if selection is not None and not selection.met else 0


def _prepare(recipe: Recipe, device: str, data_root: str | None) -> Prepared:
    _fetch(recipe.data, data_root)
    recipe = with_files(recipe, lambda name: _fetch_published(name, data_root, None)["path"])
    with Bar(f"reading {recipe.data}") as bar:
        return prepare(recipe, device=device, data_root=data_root, on_progress=bar)


def _open(paths: list[Path]) -> list[Checkpoint]:
    """The checkpoints, checked, with a bar: their tensors stay in the files."""
    opened = []
    with Bar("opening checkpoints") as bar:
        for path in paths:
            opened.append(Checkpoint.open(path))
            bar(len(opened), len(paths), Path(path).name)
    return opened


def _load(spec: str, root: str | None, seed: int, image_size: int | None) -> Data:
    _fetch(spec, root)
    with Bar(f"reading {spec}") as bar:
        return load_data(spec, root=root, seed=seed, image_size=image_size, on_progress=bar)


def _fetch(spec: str, root: str | None) -> None:
    """Download what `spec` needs, with a bar, if it is not there."""
    if spec == "cifar10":
        with Bar("downloading CIFAR-10") as bar:
            fetch_cifar10(root, on_progress=bar)


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, indent=1) + "\n")


def _threads(count: int | None) -> None:
    if count:
        torch.set_num_threads(count)


def _check_output(path: Path, endings: set[str]) -> None:
    if path.suffix not in endings:
        raise RequestError(f"-o {path}: got the ending {path.suffix!r}, expected {' or '.join(sorted(endings))}")


def _say_leakage(status: str, why: str) -> None:
    if status == UNKNOWN:
        stderr.print(f"robustsoup: warning: split unknown: {why}; if it saw val or test, its figures flatter it",
                     markup=False, soft_wrap=True)  # fmt: skip
    if status == VIOLATED:
        stderr.print(
            f"robustsoup: warning: leakage allowed: {why}; every table and figure says so", markup=False, soft_wrap=True
        )


def _warn_leakage(checkpoints: list[Checkpoint], data: Data, *, allow: bool) -> None:
    _say_leakage(*check_leakage(checkpoints, data.val, allow=allow))


def _names(paths: list[Path]) -> dict[str, Path]:
    """A short unique name for each file: its stem, with the folder's name or a number where stems repeat."""
    names: dict[str, Path] = {}
    for path in paths:
        name = re.sub(r"[^\w.-]+", "-", Path(path).stem)
        if name in names or name == "pretrained":
            name = re.sub(r"[^\w.-]+", "-", f"{Path(path).absolute().parent.name}-{Path(path).stem}")
        number = 2
        while name in names:
            name, number = f"{name.rstrip('0123456789')}{number}", number + 1
        names[name] = path
    return names


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        raise ModelError(f'normalize: got "{text}", expected numbers by channel, as in "0.49,0.48,0.45"') from None


def _model(spec: str | None, normalize: tuple[str, str] | None, data: Data, paths: list[Path]) -> dict[str, Any]:
    """How the network is built: as told, else as the first file's record says."""
    outside = [_numbers(part) for part in normalize] if normalize else None
    if spec:
        settings = {
            "spec": spec,
            "classes": data.test.classes,
            "channels": data.record["channels"],
            "normalize": outside,
        }
        load_model(**settings)
        return settings
    for path in paths:
        if known := Checkpoint.open(path).provenance.get("network"):
            return known | ({"normalize": outside} if outside else {})
    raise ModelError(
        f"{paths[0]}: the file does not say what network it is; give --model, as in resnet9 or package.module:factory"
    )


def _absolute_folder(data: str) -> str:
    return f"folder:{Path(data.removeprefix('folder:')).absolute()}" if data.startswith("folder:") else data


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
