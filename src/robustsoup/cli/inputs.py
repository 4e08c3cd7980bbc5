"""From what a command was told to what it works on: data, checkpoints, networks; and what it says on the way."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.checkpoints.network import resolve_network
from robustsoup.checkpoints.provenance import Leakage, check_leakage
from robustsoup.checkpoints.published import fetch_published
from robustsoup.cli.progress import Bar, stderr
from robustsoup.data import Data, fetch_cifar10, load_data
from robustsoup.errors import ModelError, RequestError
from robustsoup.models import NetworkSettings, build_network


def use_threads(count: int | None) -> None:
    """Let PyTorch use so many threads; None leaves it alone."""
    if count:
        torch.set_num_threads(count)


def load(spec: str, root: str | None, seed: int, image_size: int | None) -> Data:
    """The data, downloaded if need be, with a bar."""
    fetch_data(spec, root)
    with Bar(f"reading {spec}") as bar:
        return load_data(spec, root=root, seed=seed, image_size=image_size, on_progress=bar)


def fetch_data(spec: str, root: str | None) -> None:
    """Download what `spec` needs, with a bar, if it is not there."""
    if spec == "cifar10":
        with Bar("downloading CIFAR-10") as bar:
            fetch_cifar10(root, on_progress=bar)


def fetch_checkpoint(name: str, root: str | None, sha256: str | None) -> dict[str, Any]:
    """Download a published checkpoint, with a bar; what to say of it."""
    with Bar(f"downloading {name}") as bar:
        found = fetch_published(name, root, sha256=sha256, on_progress=bar)
    model, threat = found.published.model, found.published.threat
    return {
        "path": str(found.path),
        "model": model,
        "threat": threat,
        "sha256": found.sha256,
        "first_seen": found.first_seen,
        "next": f'robustsoup evaluate "{found.path}" --model {model} --data cifar10 --threat "{threat}" --attack autoattack',
    }


def open_all(paths: list[Path]) -> list[Checkpoint]:
    """The checkpoints, checked, with a bar: their tensors stay in the files."""
    opened = []
    with Bar("opening checkpoints") as bar:
        for path in paths:
            opened.append(Checkpoint.open(path))
            bar(len(opened), len(paths), Path(path).name)
    return opened


def names_of(paths: list[Path]) -> dict[str, Path]:
    """A short unique name for each file: its stem, with the folder's name or a number where stems repeat."""
    names: dict[str, Path] = {}
    for path in paths:
        name = re.sub(r"[^\w.-]+", "-", Path(path).stem)
        if name in names or name == "pretrained":
            name = re.sub(
                r"[^\w.-]+", "-", f"{Path(path).absolute().parent.name}-{Path(path).stem}"
            )
        number = 2
        while name in names:
            name, number = f"{name.rstrip('0123456789')}{number}", number + 1
        names[name] = path
    return names


def model_settings(
    spec: str | None, normalize: tuple[str, str] | None, data: Data, paths: list[Path]
) -> NetworkSettings:
    """Return how the network is built: from --model, else from the first file that records it."""
    constants = [numbers(part) for part in normalize] if normalize else None
    settings = resolve_network(spec, normalize=constants, data=data, checkpoints=paths)
    if spec:
        build_network(settings)  # reports a wrong --model before any work
    return settings


def numbers(text: str) -> list[float]:
    """Numbers by channel, with commas between them."""
    try:
        return [float(part) for part in re.split(r"[,\s]+", text.strip())]
    except ValueError:
        raise ModelError(
            f'normalize: got "{text}", expected numbers by channel, as in "0.49,0.48,0.45"'
        ) from None


def absolute_folder(data: str) -> str:
    """The data with a folder's path made absolute."""
    return (
        f"folder:{Path(data.removeprefix('folder:')).absolute()}"
        if data.startswith("folder:")
        else data
    )


def check_output(path: Path, endings: set[str]) -> None:
    """Raise RequestError for a file of another ending."""
    if path.suffix not in endings:
        raise RequestError(
            f"-o {path}: got the ending {path.suffix!r}, expected {' or '.join(sorted(endings))}"
        )


def warn_leakage(checkpoints: list[Checkpoint], data: Data, *, allow: bool) -> None:
    """Warn where checkpoints may have seen val; refuse where they did, unless allowed."""
    say_leakage(check_leakage(checkpoints, data.val, allow=allow))


def say_leakage(leakage: Leakage) -> None:
    """Warn of what `check_leakage` found."""
    if leakage.status == "unknown":
        stderr.print(
            f"robustsoup: warning: split unknown: {leakage.why}; if it saw val or test, its figures flatter it",
            markup=False,
            soft_wrap=True,
        )
    if leakage.status == "violated":
        stderr.print(
            f"robustsoup: warning: leakage allowed: {leakage.why}; every table and figure says so",
            markup=False,
            soft_wrap=True,
        )


def print_json(content: Any) -> None:
    """JSON on standard output, and nothing else."""
    sys.stdout.write(json.dumps(content, indent=1) + "\n")
