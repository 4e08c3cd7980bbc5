"""Load the inputs that a command names: data, checkpoints and networks."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from robustsoup import distributed
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import (
    choose_image_size,
    describe_configuration,
    describe_other_sizes,
    resolve_network,
)
from robustsoup.checkpoints.opening import Opening
from robustsoup.checkpoints.provenance import Leakage, check_leakage
from robustsoup.checkpoints.published import Fetched, fetch_published
from robustsoup.checkpoints.wrapping import file_ending
from robustsoup.cli.options import DataOptions, NetworkOptions, RunOptions
from robustsoup.cli.progress import Bar
from robustsoup.cli.terminal import print_error, print_warning
from robustsoup.data import Data, fetch_cifar10, fetch_cifar100, load_data
from robustsoup.data.duplicates import Overlap, find_exact_overlaps
from robustsoup.device import resolve_device
from robustsoup.errors import RequestError
from robustsoup.files import check_writable
from robustsoup.models import (
    build_network,
)
from robustsoup.runs.caches import hold_caches
from robustsoup.runs.context import Context
from robustsoup.user_code import import_named_module


def load_requested_data(
    options: DataOptions,
    network: NetworkOptions,
    checkpoints: Sequence[Path] = (),
    *,
    warn: bool = True,
) -> Data:
    """Load the data, with a bar; download it first if necessary.

    Args:
        options: The data.
        network: Decides the size of decoded images, if the options do not.
        checkpoints: Decide the size, if neither the options nor the network do.
        warn: Whether to warn of images that are in two splits.
    """
    import_named_module(options.data)
    import_named_module(network.model)
    side = options.image_size or choose_image_size(
        options.data, network.model, checkpoints, network.opening
    )
    data = _read_data(options, side)
    print_notes(data)
    if warn:
        warn_of_overlaps(find_exact_overlaps(data))
    for text in describe_other_sizes(map(network.opening.open, checkpoints), data):
        print_warning(text)
    return data


@distributed.local_first()
def _read_data(options: DataOptions, side: int | None) -> Data:
    """Download the data if necessary, and read it."""
    hold_caches()
    download_data(options.data, options.data_root)
    with Bar(f"reading {options.data}") as bar:
        return load_data(
            options.data,
            root=options.data_root,
            seed=options.seed,
            image_size=side,
            channels=options.channels,
            on_progress=bar,
        )


def print_notes(*sources: Data | Checkpoint) -> None:
    """Print what reading left out or changed, each line once."""
    for note in dict.fromkeys(note for source in sources for note in source.notes):
        print_error(note)


def download_data(source: str, root: str | None) -> None:
    """Download the files of a data source, with a bar, unless they exist."""
    if source == "cifar10":
        with Bar("downloading CIFAR-10") as bar:
            fetch_cifar10(root, on_progress=bar)
    if source == "cifar100":
        with Bar("downloading CIFAR-100") as bar:
            fetch_cifar100(root, on_progress=bar)


def download_checkpoint(name: str, root: str | None, sha256: str | None = None) -> Fetched:
    """Download a published checkpoint, with a bar, unless it exists."""
    with Bar(f"downloading {name}") as bar:
        return fetch_published(name, root, sha256=sha256, on_progress=bar)


def open_checkpoints(paths: Sequence[Path], opening: Opening) -> list[Checkpoint]:
    """Open and verify checkpoints, with a bar; their tensors stay in the files.

    Args:
        paths: The files.
        opening: How they are opened.
    """
    opening.check(paths)
    opened: list[Checkpoint] = []
    with Bar("opening checkpoints") as bar:
        for path in paths:
            opened.append(opening.open(path))
            bar(len(opened), len(paths), path.name)
    return opened


def make_context(
    data: Data,
    network: NetworkOptions,
    run: RunOptions,
    checkpoints: Sequence[Checkpoint | Path] = (),
) -> Context:
    """Return the data, network and device of a command.

    Args:
        data: Determines the number of classes and channels.
        network: The network, which comes before every record; without a model, the first file that
            records its network decides.
        run: The device.
        checkpoints: Checkpoints or files that may record their network.
    """
    import_named_module(network.model)
    network.opening.check(checkpoints)
    settings = resolve_network(
        network.model,
        normalize=network.constants,
        data=data,
        checkpoints=checkpoints,
        opening=network.opening,
    )
    if network.model:
        build_network(settings)  # reports a wrong --model before any work
        opened = map(network.opening.open, checkpoints)
        for text in describe_configuration(settings, data, opened):
            print_warning(text)
    return Context(
        data,
        settings,
        resolve_device(run.device),
        network_named=bool(network.model),
        constants_named=bool(network.normalize),
    )


def name_checkpoints(paths: Sequence[Path]) -> dict[str, Path]:
    """Return a short unique name for each file.

    The name is the file's stem; repeated stems get the name of their folder or a number. Names that
    differ in case alone count as repeated, because files are named after them.
    """
    names: dict[str, Path] = {}
    taken = {"pretrained"}
    for path in paths:
        name = re.sub(r"[^\w.-]+", "-", path.stem)
        if name.casefold() in taken:
            name = re.sub(r"[^\w.-]+", "-", f"{path.absolute().parent.name}-{path.stem}")
        number = 2
        while name.casefold() in taken:
            name, number = f"{name.rstrip('0123456789')}{number}", number + 1
        names[name] = path
        taken.add(name.casefold())
    return names


def check_output_file(path: Path, suffixes: Collection[str]) -> None:
    """Check, before any work, the suffix of the output file and that it can be written.

    Raises:
        RequestError: The suffix is none of `suffixes`.
        StorageError: The file cannot be written.
    """
    if file_ending(path) not in suffixes:
        expected = " or ".join(sorted(suffixes))
        raise RequestError(f'-o {path}: got the suffix "{path.suffix}", expected {expected}')
    check_writable(path, folder=False)


def warn_of_overlaps(overlaps: Sequence[Overlap]) -> None:
    """Warn of images that are in two splits."""
    for overlap in overlaps:
        print_warning(f"duplicates: {overlap}")


def warn_of_leakage(checkpoints: Sequence[Checkpoint], data: Data, *, allow: bool) -> None:
    """Warn if checkpoints may have been trained on val; refuse known leakage unless allowed."""
    print_leakage(check_leakage(checkpoints, data.val, allow=allow))


def print_leakage(leakage: Leakage) -> None:
    """Print a warning for the result of `check_leakage`."""
    if leakage.status == "unknown":
        print_warning(
            f"split unknown: {leakage.why}; accuracies are too high if a checkpoint was trained on "
            "the samples that evaluate it"
        )
    if leakage.status == "violated":
        print_warning(f"leakage allowed: {leakage.why}; every table and figure says so")
