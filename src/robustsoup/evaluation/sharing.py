"""Share one evaluation between the ranks of a command: each attacks its part of the samples.

A sample has its own noise, and every pass its recorded shape, so a verdict does not depend on who
attacks the sample. All ranks return the same evaluation.
"""

import contextlib
import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from robustsoup import distributed
from robustsoup.attacks.forward import predict_logits
from robustsoup.attacks.outcome import AttackedSamples, Outcome
from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.digests import digest_json
from robustsoup.evaluation.request import CheckedRequest
from robustsoup.files import remove_file
from robustsoup.paths import user_path
from robustsoup.progress import SavedState

RANK_FOLDER = ".rank"
"""The folders of other ranks, beside the state of the first one, begin with this."""

States = dict[str, dict[str, Tensor]]
"""Snapshots of outcomes, by the threat model as text."""


def check_same_request(request: CheckedRequest) -> None:
    """Check that all ranks evaluate the same network on the same samples, in the same way.

    Raises:
        RequestError: Names what differs.
    """
    if distributed.world() == 1:
        return
    threats = [str(threat) for threat in request.threats]
    checkpoint = request.checkpoint_digest or Checkpoint.of(request.model).digest
    distributed.check_same(
        {
            "device": distributed.describe_device(request.device),
            "digest of the data": request.data.digest,
            "digest of the checkpoint": checkpoint,
            "digest of the request": digest_json([request.fingerprint(), threats]),
        },
        "evaluate the same files on devices of one kind",
    )


def predict_shared(
    model: nn.Module, fetch: Callable[[Tensor], Tensor], n: int, size: int, device: torch.device
) -> Tensor:
    """Return the logits of samples 0..n-1; the arguments are those of `predict_logits`."""
    if distributed.world() == 1:
        return predict_logits(model, fetch, n, size, device)
    owned = distributed.deal(n, together=size)
    mine = owned.nonzero().flatten() if bool(owned.any()) else torch.arange(1)
    own = predict_logits(model, lambda rows: fetch(mine[rows]), len(mine), size, device)
    logits = own.new_zeros(n, own.shape[1])
    logits[mine] = own
    return distributed.merge_rows(logits, owned)


class Share:
    """This rank's part of an attack under one threat model.

    Args:
        samples: All samples.
        outcome: What is settled before the attack; the same in all ranks.
        attempts: Number of attempts of the attack.
        together: Samples that the attack takes in one call, and that one rank must attack.

    Attributes:
        samples: The samples; those of other ranks look as if they were classified wrongly.
        owned: (n,) bool, the samples whose results this rank knows.
    """

    def __init__(
        self,
        samples: AttackedSamples,
        outcome: Outcome,
        *,
        attempts: int,
        together: int,
    ) -> None:
        self.samples = samples
        self.owned = torch.full(samples.y.shape, distributed.is_first())
        if distributed.world() == 1:
            return
        waiting = samples.correct & ((outcome.settled < attempts) | (together > 1))
        dealt = distributed.from_first(lambda: waiting)
        self.owned[dealt] = distributed.deal(int(dealt.sum()), together)
        self.samples = hide_samples(samples, ~self.owned)

    def merge(self, outcome: Outcome) -> None:
        """Replace the results of the other ranks' samples by what these found."""
        rows = {field.name: getattr(outcome, field.name) for field in fields(outcome)}
        merged = {
            name: distributed.merge_rows(tensor, self.owned)
            for name, tensor in rows.items()
            if tensor is not None
        }
        # `settled` last: an interrupted merge leaves samples that are not settled yet.
        for name in sorted(merged, key=lambda name: name == "settled"):
            rows[name].copy_(merged[name])


def hide_samples(samples: AttackedSamples, hidden: Tensor) -> AttackedSamples:
    """Return the samples with another class predicted for the hidden ones."""
    wrong = functional.one_hot((samples.y + 1) % samples.classes, samples.classes)
    return replace(
        samples, logits=torch.where(hidden[:, None], wrong.to(samples.logits), samples.logits)
    )


class SharedState:
    """The saved state of an evaluation: each rank saves what it knows to a file of its own.

    Any number of ranks resumes from the files of any other number, which are in one folder or, but
    for the first, in folders of the ranks below it.

    Args:
        path: File of the first rank; None disables saving.
        fingerprint: Identifies the evaluation, as for `SavedState`.
    """

    def __init__(self, path: str | os.PathLike[str] | None, fingerprint: str) -> None:
        self.path, self.fingerprint = None if path is None else user_path(path), fingerprint
        own = self.path
        if own is not None and not distributed.is_first():
            own = own.with_name(f"{own.stem}.rank{distributed.rank()}{own.suffix}")
        self.saved = SavedState(own, fingerprint)

    def load(self) -> States:
        """Return what the files of all ranks hold together.

        Raises:
            CheckpointError: A file is damaged, or was saved by another evaluation.
        """
        states: list[States] = []
        paths = self._list_files()
        is_shared = all(names == paths for names in distributed.gather(paths))
        for path in paths:
            file = SavedState(path, self.fingerprint)
            state = file.load()
            with file.refuse_malformed():
                states.append({} if state is None else dict(state["outcomes"]))
        with self.refuse_malformed():
            merged = _merge_states(states)
            # The exchange also keeps a fast rank from saving while a slow one still reads.
            return _merge_states(distributed.gather({} if is_shared else merged)) or merged

    def refuse_malformed(self) -> contextlib.AbstractContextManager[None]:
        """Turn the errors of restoring a state that does not fit into a CheckpointError."""
        return self.saved.refuse_malformed()

    def due(self) -> bool:
        """Return whether the interval since the last save has passed."""
        return self.saved.due()

    def save(self, outcomes: Mapping[str, Outcome]) -> None:
        """Save what this rank knows."""
        if any(bool(outcome.settled.any()) for outcome in outcomes.values()):
            snapshots = {name: outcome.snapshot() for name, outcome in outcomes.items()}
            self.saved.save({"outcomes": snapshots})

    def clear(self) -> None:
        """Remove the files, because the evaluation is complete."""
        for path in self._list_files():
            remove_file(path)

    def _list_files(self) -> list[Path]:
        if self.path is None:
            return []
        folder = self.path.parent
        if folder.name.startswith(RANK_FOLDER):
            folder = folder.parent
        others = f"{glob.escape(self.path.stem)}.rank*{glob.escape(self.path.suffix)}"
        paths = [*folder.glob(others), *folder.glob(f"{RANK_FOLDER}*/{others}")]
        return [path for path in (folder / self.path.name, *sorted(paths)) if path.exists()]


def _merge_states(states: Sequence[States]) -> States:
    """Return for each threat and sample the result after the most attempts."""
    merged: States = {}
    for state in states:
        for name, latest in state.items():
            if name not in merged:
                merged[name] = latest
                continue
            ahead = latest["settled"] > merged[name]["settled"]
            for part, rows in merged[name].items():
                rows[ahead] = latest[part][ahead]
    return merged
