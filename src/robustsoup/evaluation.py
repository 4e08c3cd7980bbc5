"""evaluate: clean and robust verdicts of one network, sample by sample."""

import copy
import json
import os
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustsoup.attacks import ATTACKS, run_apgd
from robustsoup.attacks.apgd import BATCH
from robustsoup.attacks.forward import frozen_eval, predict
from robustsoup.checkpoints import Checkpoint, as_network
from robustsoup.data import Split, to_float
from robustsoup.errors import CheckpointError, Diverged, ModelError, RequestError
from robustsoup.files import atomic_path, write_text
from robustsoup.precision import resolve_device, resolve_precision
from robustsoup.progress import Progress
from robustsoup.statistics import Accuracy
from robustsoup.threats import ThreatModel, norms
from robustsoup.training import check_fit

CLEAN_KEY = "clean"
UNION_KEY = "union"


@dataclass(frozen=True)
class Verdicts:
    """What one threat model did to each of n samples.

    robust: (n,) bool, right without and under attack; step: (n,) the step that broke it (0: wrong clean, or fooled by
    the starting point), -1 where robust; norm: (n,) float32 norm of the perturbation that was found, 0 if wrong clean.
    """

    robust: Tensor
    step: Tensor
    norm: Tensor


class Accuracies(dict[str, Accuracy]):
    """Accuracies by "clean", "union" (robust to every threat), or a threat model, as an object or as text."""

    def __getitem__(self, key: str | ThreatModel) -> Accuracy:
        return super().__getitem__(str(key))


@dataclass(frozen=True)
class Evaluation:
    """Verdicts per sample, and who made them how.

    ids, labels, prediction: (n,) int64; margin: (n,) float32, the right logit less the largest other, without attack;
    threats: threat (as text) -> Verdicts; record: JSON-able settings and provenance.
    """

    ids: Tensor
    labels: Tensor
    prediction: Tensor
    margin: Tensor
    threats: dict[str, Verdicts]
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> Accuracies:
        """The accuracy under each threat, clean, and (with two threats or more) under their union."""
        correct = self.prediction == self.labels
        masks = {CLEAN_KEY: correct, **{name: verdicts.robust for name, verdicts in self.threats.items()}}
        if len(self.threats) > 1:
            masks[UNION_KEY] = torch.stack([v.robust for v in self.threats.values()]).all(0)
        return Accuracies({name: Accuracy(int(mask.sum()), len(mask)) for name, mask in masks.items()})

    def to_json(self) -> dict[str, Any]:
        """The record and the accuracies with their intervals, ready for json.dumps."""
        return {**self.record, "accuracy": {
            name: {"value": a.value, "low": a.low, "high": a.high, "hits": a.hits, "n": a.n}
            for name, a in self.accuracy.items()
        }}  # fmt: skip

    def save(self, path: str | os.PathLike) -> Path:
        """Write PATH (.json) and, first, the verdicts per sample beside it as .npz."""
        path = Path(path)
        arrays = {"ids": self.ids, "labels": self.labels, "prediction": self.prediction, "margin": self.margin}
        for number, verdicts in enumerate(self.threats.values()):
            arrays |= {f"{name}_{number}": value for name, value in vars(verdicts).items()}
        with atomic_path(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, **{name: value.numpy() for name, value in arrays.items()})
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Evaluation":
        """Read what `save` wrote. Raises CheckpointError naming the file."""
        path = Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            with open(path.with_suffix(".npz"), "rb") as raw, np.load(raw) as file:
                arrays = {name: torch.from_numpy(file[name]) for name in file.files}
            names = record["threats"]
            record.pop("accuracy")
            threats = {
                name: Verdicts(*(arrays[f"{part}_{number}"] for part in ("robust", "step", "norm")))
                for number, name in enumerate(names)
            }
            samples = [arrays[part] for part in ("ids", "labels", "prediction", "margin")]
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path}: not an evaluation that robustsoup wrote: {error}") from None
        return cls(*samples, threats, record)


def evaluate(
    network: nn.Module | Checkpoint | str | os.PathLike, data: Split, threats: Sequence[ThreatModel | str] = (), *,
    attack: str = "apgd", steps: int = 100, samples: int | None = None, seed: int = 0, batch_size: int = BATCH,
    device: str = "auto", precision: str = "float32", on_progress: Progress | None = None,
) -> Evaluation:  # fmt: skip
    """Clean and robust verdicts of one network on a split, sample by sample, in eval mode.

    threats: what it is attacked with, one after the other; clean ones add nothing. samples: only the first so many.
    steps: of APGD on cross-entropy, one restart, cold start seeded by (seed, sample id); in L1 they are spent as in
    AutoAttack (3 eps, 2 eps, eps). A sample that is wrong clean counts as broken and is not attacked.
    on_progress(done, total, figures) counts samples times (threats + 1). A module that is given is not changed.

    Raises ModelError if the network does not fit the data, Diverged if its logits hold NaN, RequestError for a wrong
    setting.
    """
    parsed = [threat for threat in map(ThreatModel.parse, threats) if not threat.is_clean]
    if attack not in ATTACKS:
        raise RequestError(f'attack: got "{attack}", expected one of {", ".join(ATTACKS)}')
    if steps < 1 or batch_size < 1:
        raise RequestError(f"evaluate: got steps {steps} and batch_size {batch_size}, expected at least 1 of both")
    where = resolve_device(device)
    precision = resolve_precision(precision, where)
    data = data.first(samples).to(where)
    if not isinstance(network, nn.Module):
        network = Checkpoint.load(network)
    model = copy.deepcopy(network) if isinstance(network, nn.Module) else as_network(network)
    model = model.to(where, memory_format=torch.channels_last)
    check_fit(model, data)
    x = to_float(data.images).contiguous(memory_format=torch.channels_last)
    started = time.perf_counter()
    with frozen_eval(model):
        logits = predict(model, x, batch_size, precision)
    if not bool(logits.isfinite().all()):
        raise Diverged("evaluate: the network's logits hold NaN or infinity; its weights or statistics are broken")
    labels = data.labels.cpu()
    correct = logits.argmax(1) == labels
    total = len(data) * (len(parsed) + 1)
    found = {}
    for number, threat in enumerate(parsed, 1):
        head = number * len(data)
        figures = f"clean {correct.float().mean():.1%}"
        result = run_apgd(
            model, x, data.labels, threat, steps=steps, seed=seed, ids=data.ids, batch_size=batch_size,
            precision=precision, known_correct=correct,
            on_progress=_samples_done(on_progress, head, len(data), total, figures),
        )  # fmt: skip
        length = norms(result.x_adv.cpu() - x.cpu(), threat.norm).float()
        found[str(threat)] = Verdicts(~result.broken, result.step, length)
    record = {
        "kind": "evaluation", "split": data.name, "data": data.record, "samples": len(data), "threats": list(found),
        "attack": attack, "loss": "ce", "steps": steps, "restarts": 1, "seed": seed, "batch_size": batch_size,
        "precision": precision, "l1_schedule": "3eps,2eps,eps", "device": where.type,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "seconds": time.perf_counter() - started,
        "checkpoint": network.digest if isinstance(network, Checkpoint) else None,
    }  # fmt: skip
    return Evaluation(data.ids.cpu(), labels, logits.argmax(1), _margin(logits, labels), found, record)


def refuse_chance(network: nn.Module | Checkpoint, data: Split, name: str, *, device: str = "auto") -> None:
    """Raise ModelError if clean accuracy cannot be told from guessing: the sign of a wrong normalisation or class order.

    Judged on at most 1,000 samples; fewer than 50 are too few to say so.
    """
    clean = evaluate(network, data, samples=min(len(data), 1000), device=device).accuracy[CLEAN_KEY]
    classes = data.classes
    if clean.low <= 1 / classes and clean.n >= 50:
        raise ModelError(
            f"{name}: clean accuracy {clean} is near chance ({1 / classes:.1%}); does the network expect --normalize MEAN "
            "STD, or another order of the classes?"
        )


def _samples_done(on_progress: Progress | None, head: int, size: int, total: int, figures: str):
    if on_progress is None:
        return None
    return lambda done, of: on_progress(head + (size - of) + done, total, figures)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    right = logits.gather(1, labels.view(-1, 1)).squeeze(1)
    others = logits.scatter(1, labels.view(-1, 1), -torch.inf)
    return right - others.max(1).values
