"""The request of an evaluation, parsed and checked before any work."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
from torch import Tensor, nn

from robustsoup.attacks.adaptation import copy_network
from robustsoup.attacks.forward import pass_size
from robustsoup.checkpoints.checkpoint import Checkpoint, CheckpointLike, as_network
from robustsoup.data import Split, to_float
from robustsoup.device import resolve_device, resolve_precision
from robustsoup.errors import RequestError
from robustsoup.evaluation.attackers import Attacker, make_attacker
from robustsoup.evaluation.reuse import (
    POOL,
    SAME_ATTACK_KEYS,
    Reuse,
    check_same_network,
    check_same_samples,
    find_masking_check,
    is_same_attack,
    lacks_points,
    pool_points,
)
from robustsoup.evaluation.two_phase import SUBSET_KEY
from robustsoup.evaluation.verdicts import CLEAN_KEY, Evaluation, Record
from robustsoup.models import NetworkSettings, network_fingerprint, network_settings_of
from robustsoup.models.fit import check_fit
from robustsoup.settings import AttackSettings
from robustsoup.threats import ThreatModel, parse_threats


@dataclass(frozen=True)
class CheckedRequest:
    """A request that passed all checks.

    Attributes:
        model: Copy of the network on `device`.
        checkpoint_digest: Digest of the checkpoint; None for a module.
        network_settings: How the network was built; None if unknown.
        data: The samples.
        threats: Parsed threat models, without clean ones and without repetition.
        settings: The attack, with its precision resolved.
        attacker: Runs the attack.
        reuse: Work that is shared with other evaluations.
        device: Device of the network.
        warnings: Doubts that arose before any work.
    """

    model: nn.Module
    checkpoint_digest: str | None
    network_settings: NetworkSettings | None
    data: Split
    threats: tuple[ThreatModel, ...]
    settings: AttackSettings
    attacker: Attacker
    reuse: Reuse
    device: torch.device
    warnings: tuple[str, ...]

    @property
    def pass_size(self) -> int:
        """Images in one pass."""
        return pass_size(self.device, self.settings.batch_size)

    @property
    def checks_masking(self) -> bool:
        """Whether the masking check follows the attack."""
        is_attacked = bool(self.threats) and self.reuse.subset is None
        return is_attacked and self.settings.masking_check

    def find_masking_check(self, threat: ThreatModel) -> Record | None:
        """Return the findings of an identical earlier attack; None if there was none."""
        protocol, n = self.protocol(), len(self.data)
        return find_masking_check(self.reuse.after, threat, protocol=protocol, n=n)

    def needs_logits(self) -> bool:
        """Return whether clean predictions of an earlier evaluation do not suffice."""
        if self.settings.reads_clean_logits:
            return True
        return self.checks_masking and None in map(self.find_masking_check, self.threats)

    @property
    def broken_by(self) -> list[str]:
        """Causes of broken samples: clean, the attempts, the pool, and earlier attacks."""
        pool = [POOL] if self.reuse.pool else []
        earlier = self.reuse.after.record["broken_by"] if self.reuse.after else []
        return list(dict.fromkeys([CLEAN_KEY, *self.attacker.attempts, *pool, *earlier]))

    def continues(self, after: Evaluation) -> bool:
        """Return whether the attack is that of an earlier evaluation of a subset."""
        protocol = {"seed": self.settings.seed} | self.attacker.protocol()
        return SUBSET_KEY in after.record and is_same_attack(after, protocol)

    def protocol(self) -> Record:
        """Return the settings that decide the verdicts."""
        protocol: Record = {"seed": self.settings.seed, "broken_by": self.broken_by}
        protocol |= self.attacker.protocol()
        after = self.reuse.after
        if after is not None:
            earlier = {key: after.record.get(key) for key in SAME_ATTACK_KEYS}
            if not self.continues(after):
                protocol["after"] = earlier
            elif "after" in after.record:
                protocol["after"] = after.record["after"]
        return protocol

    def fingerprint(self) -> str:
        """Return a text that identifies the evaluation whose saved progress may be resumed."""
        after = self.reuse.after
        parts = [
            self.protocol(),
            self.data.fingerprint,
            self.reuse.keep_points,
            self.reuse.subset,
            None if after is None else after.to_json(),
            [evaluation.to_json() for evaluation in self.reuse.pool],
            self.checkpoint_digest or Checkpoint.of(self.model).digest,
            network_fingerprint(self.model),
        ]
        return json.dumps(parts, sort_keys=True)

    def fetch(self, samples: Tensor) -> Tensor:
        """Return samples (b,) int64 as float images (b, c, h, w) on the device."""
        images = self.data.images
        x = to_float(images[samples.to(images.device)]).to(self.device)
        return x.contiguous(memory_format=torch.channels_last)


def check_request(
    network: nn.Module | CheckpointLike,
    data: Split,
    threats: Sequence[ThreatModel | str],
    settings: AttackSettings,
    *,
    reuse: Reuse,
    device: str,
) -> CheckedRequest:
    """Parse and check a request before any work.

    Args:
        network: Module, checkpoint or path.
        data: The samples to evaluate on.
        threats: Threat models, as objects or text.
        settings: The attack.
        reuse: Work that is shared with other evaluations.
        device: "auto", "cpu", "cuda" or another device of PyTorch.

    Raises:
        RequestError: If a setting or a reused evaluation does not fit.
        ModelError: If the network does not fit the data.
    """
    attacked = tuple(dict.fromkeys(t for t in parse_threats(threats) if not t.is_clean))
    where = resolve_device(device)
    settings = replace(settings, precision=resolve_precision(settings.precision, where))
    source = network if isinstance(network, nn.Module) else Checkpoint.load(network)
    model = copy_network(source) if isinstance(source, nn.Module) else as_network(source)
    model = model.to(where)
    warnings = list(data.notes)
    if isinstance(source, nn.Module) and any(module.training for module in source.modules()):
        warnings.append("the network was in train mode; it was evaluated in eval mode")
    data = data.with_classes(check_fit(model, data, attacked))
    shape = tuple(data.images.shape[1:])
    attacker = make_attacker(settings, attacked, data.classes, where, shape)
    earlier = [*reuse.pool, *reuse.others, *([reuse.after] if reuse.after is not None else [])]
    check_same_samples(earlier, data)
    digest = None if isinstance(source, nn.Module) else source.digest
    check_same_network(reuse.after, digest)
    _check_subset(reuse, attacked, attacker, settings, len(data))
    if reuse.keep_points and reuse.after is not None and lacks_points(reuse.after, attacked):
        raise RequestError(
            "keep_points: after kept no points, which its verdicts need; evaluate it again with "
            "keep_points=True"
        )
    for threat in attacked:
        pool_points([*reuse.pool, *reuse.others], threat)
    return CheckedRequest(
        model,
        digest,
        network_settings_of(source) if isinstance(source, nn.Module) else source.network_settings,
        data,
        attacked,
        settings,
        attacker,
        reuse,
        where,
        tuple(warnings),
    )


def _check_subset(
    reuse: Reuse,
    threats: Sequence[ThreatModel],
    attacker: Attacker,
    settings: AttackSettings,
    n: int,
) -> None:
    """Raise RequestError if a part of the samples cannot be attacked by itself."""
    subset, after = reuse.subset, reuse.after
    if subset is None:
        return
    if not (isinstance(subset, Integral) and 1 <= subset < n):
        raise RequestError(f"subset: got {subset}, expected 1 to {n - 1} of {n} samples")
    if attacker.together > 1:
        raise RequestError("subset: requires an attack that attacks each sample by itself")
    if after is None:
        return
    if len(after.ids) != n or set(after.threats) != set(map(str, threats)):
        raise RequestError(
            "subset: after must be an evaluation of the same samples under the same threats, as "
            "its verdicts stand for the other samples"
        )
    earlier = after.record.get(SUBSET_KEY)
    protocol = attacker.protocol() | {"seed": settings.seed}
    if earlier and not (is_same_attack(after, protocol) and earlier["samples"] < subset):
        raise RequestError(
            f"subset: got {subset} after {earlier['samples']} samples; "
            "expected more samples and the same attack"
        )
