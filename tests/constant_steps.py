"""Steps on networks that answer class 0 to every image, so that all soups score the same."""

import torch

from robustsoup import distributed
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.data import load_data
from robustsoup.models import NetworkSettings, build_network
from robustsoup.progress import SavedState
from robustsoup.runs.context import Context
from robustsoup.runs.store import STATE, Store
from robustsoup.runs.tasks import EvaluationSettings, MeasureClean, Mixing
from robustsoup.runs.worker import Worker, measure_clean
from robustsoup.settings import AttackSettings, BufferSettings
from robustsoup.soups.grid import grid

MIXING = Mixing(BufferSettings(buffers="average"))
CLEAN = EvaluationSettings("val", 16, (), AttackSettings())
"""Without an attack, on 16 samples."""


def name_ingredients(n):
    """Return the names of n ingredients."""
    return tuple(f"ingredient{number}" for number in range(n))


def constant_worker(folder, n):
    """Return a worker with n ingredients and a store in a folder."""
    settings = NetworkSettings("resnet9:width=2", classes=10, channels=1)
    network = build_network(settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    checkpoint = Checkpoint.of(network)
    context = Context(load_data("digits"), settings, torch.device("cpu"))
    files = dict.fromkeys(name_ingredients(n), checkpoint)
    return Worker(context, Store(folder), files, allow_leakage=False, warn=lambda _: None)


def resume_clean_verdicts(folder):
    """Resume the clean verdicts of 3 soups; two were measured by one process.

    Returns:
        The verdicts that this rank announces, as (done, total).
    """
    worker, shown = constant_worker(folder / "store", 2), []
    task = MeasureClean(name_ingredients(2), tuple(grid(2, 0.5)), MIXING, CLEAN)
    own = folder if distributed.is_first() else folder / f"rank{distributed.rank()}"
    own.mkdir(exist_ok=True)
    if distributed.is_first():
        digest = CLEAN.take_samples(worker.context.data).digest
        SavedState(own / STATE, digest).save({"hits": torch.ones(2, CLEAN.samples)})
    measure_clean(worker, task, own, lambda *progress: shown.append(progress[:2]))
    return shown
