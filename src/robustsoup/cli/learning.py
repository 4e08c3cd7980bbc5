"""The command that learns mixing coefficients."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robustsoup import distributed
from robustsoup.cli.options import (
    AllowLeakage,
    Base,
    Combine,
    DataOptions,
    Fields,
    Files,
    Given,
    NetworkOptions,
    RunOptions,
    Track,
    TrainingThreats,
    with_threats,
)
from robustsoup.cli.terminal import print_error, print_line, print_warning
from robustsoup.errors import RequestError
from robustsoup.settings import BufferSettings, DialSettings, LearnSettings

if TYPE_CHECKING:
    from robustsoup.checkpoints.checkpoint import Checkpoint
    from robustsoup.data import Data
    from robustsoup.soups.coefficients import Coefficients, Dial
    from robustsoup.tracking import OnEpoch


def learn_command(
    checkpoints: Files,
    data: DataOptions,
    settings: Annotated[
        LearnSettings,
        Fields(omit=("threat", "also", "combine"), names={"buffers": "learning_buffers"}),
    ],
    threat: TrainingThreats,
    output: Annotated[
        Path, typer.Option("-o", help="Folder for the soup and its coefficients, or the dial.")
    ],
    dial: Annotated[DialSettings, Fields(only=("by",), names={"by": "dial_by"})],
    soup: Annotated[BufferSettings, Fields(only=("buffers",))],
    network: NetworkOptions,
    run: RunOptions,
    given: Given,
    place: Annotated[
        str, typer.Option(help="Where ingredients are stored: auto, device, memory or files.")
    ] = "auto",
    budget: Annotated[
        float | None,
        typer.Option(
            help="GiB that ingredients may occupy with --place auto; by default a quarter of the "
            "free memory."
        ),
    ] = None,
    base: Base = None,
    allow_leakage: AllowLeakage = False,
    combine: Combine = None,
    track: Track = None,
) -> None:
    """Learn mixing coefficients for each layer under attack.

    Writes the coefficients and their soup. With --dial, learns a line of soups over the whole
    trade-off in one run; `mix --at` then chooses one of them. The same command resumes an
    interrupted run. With `torchrun --nproc-per-node N -m robustsoup learn ...`, N processes share
    each batch.

    Example: `robustsoup learn eps16.safetensors eps96.safetensors --data digits
    --threat "Linf 64/255" --epochs 5 -o learned`; the whole trade-off:
    `robustsoup learn eps16.safetensors eps96.safetensors --data digits --threat "Linf 64/255"
    --epochs 5 --dial -o turned`, then `robustsoup mix eps16.safetensors eps96.safetensors
    --coefficients turned/dial.safetensors --at 0.7 -o cleaner.safetensors`
    """
    from robustsoup import tracking
    from robustsoup.cli.inputs import (
        load_requested_data,
        make_context,
        name_checkpoints,
        open_checkpoints,
        print_notes,
        warn_of_leakage,
    )
    from robustsoup.cli.learned_folder import LearnedFolder
    from robustsoup.files import check_writable, remove_file
    from robustsoup.runs.locks import lock_folder
    from robustsoup.soups.ancestry import fit_base
    from robustsoup.soups.ingredients import choose_place
    from robustsoup.soups.mixing import check_buffer_policy
    from robustsoup.user_code import import_named_module

    _check_learn_options(settings, soup, base, given)
    check_writable(output, folder=True)
    if settings.dial is not None:
        settings = replace(settings, dial=dial)
    settings = with_threats(settings, threat, combine)
    policy = soup.buffers or "tracked"
    on_epoch = tracking.track(track) if track and distributed.is_first() else None
    run.use_threads()
    for name in (settings.objective, settings.transform, policy, settings.buffers):
        import_named_module(name)
    source = load_requested_data(data, network, checkpoints)
    check_buffer_policy(policy, source.train, settings.threat, affine=settings.affine)
    context = make_context(source, network, run, checkpoints)
    opened = open_checkpoints(checkpoints, network.opening)
    ingredients = [context.record_network(item) for item in opened]
    print_notes(*ingredients)
    warn_of_leakage(ingredients, source, allow=allow_leakage)
    opened_base = None if base is None else fit_base(network.opening.open(base), ingredients[0])
    place = choose_place(place, budget, ingredients, context.device)
    if place == "files":
        print_error(_describe_streaming(ingredients))
    with lock_folder(output, print_error) if distributed.is_first() else nullcontext():
        state = output / ".state.pt"
        learned = _learn_with_bar(
            ingredients,
            source,
            settings,
            base=opened_base,
            place=place,
            allow_leakage=allow_leakage,
            device=run.device,
            state_path=state,
            on_epoch=on_epoch,
        )
        if not distributed.is_first():
            return
        folder = LearnedFolder(output, list(name_checkpoints(checkpoints)))
        lines = folder.write(
            learned, ingredients, context, policy=policy, base=opened_base, settings=settings
        )
        remove_file(state)
    for warning in learned.record.get("warnings", ()):
        print_warning(warning)
    for line in lines:
        print_line(line)


def _check_learn_options(
    settings: LearnSettings, soup: BufferSettings, base: Path | None, given: Given
) -> None:
    """Raise RequestError for options that do not apply together."""
    if settings.dial is None and "dial_by" in given:
        raise RequestError("--dial-by: requires --dial")
    unused = {
        "--objective": settings.objective != "ce",
        "--early-stop": settings.early_stop is not None,
        "--buffers": soup.buffers is not None,
    }
    for option, is_given in unused.items():
        if settings.dial is not None and is_given:
            raise RequestError(
                f"{option}: does not apply to --dial (choose --buffers in `mix --at`)"
            )
    if base and "base" not in (soup.buffers, settings.buffers):
        raise RequestError("--base: requires --buffers base or --learning-buffers base")


def _learn_with_bar(
    ingredients: list["Checkpoint"],
    data: "Data",
    settings: LearnSettings,
    *,
    base: "Checkpoint | None",
    place: str,
    allow_leakage: bool,
    device: str,
    state_path: Path,
    on_epoch: "OnEpoch | None",
) -> "Coefficients | Dial":
    """Learn a soup, or a dial if `settings.dial` is set, with a progress bar."""
    from robustsoup.cli.progress import Bar
    from robustsoup.soups.learning import learn, learn_dial

    val = data.val if settings.early_stop else None
    learn_with = partial(learn, val=val) if settings.dial is None else learn_dial
    with Bar("learning") as bar:
        return learn_with(
            ingredients,
            data.train,
            settings,
            base=base,
            place=place,
            allow_leakage=allow_leakage,
            device=device,
            state_path=state_path,
            on_progress=bar,
            on_epoch=on_epoch,
        )


def _describe_streaming(ingredients: list["Checkpoint"]) -> str:
    from robustsoup.soups.ingredients import total_bytes

    size = total_bytes(ingredients) / 2**30
    return (
        f"{len(ingredients)} ingredients of {size:.2f} GiB are read from their files at each step; "
        "change that with --budget or --place"
    )
