"""Buffer policies: how a soup gets its running statistics of BatchNorm.

To add a policy, write a function of an UnfinishedSoup that returns Buffers, and register it in
`robustsoup.catalog.BUFFER_POLICIES`.
"""

import math

from robustsoup.checkpoints.checkpoint import Checkpoint
from robustsoup.errors import RequestError
from robustsoup.soups.ancestry import common_ancestor, fit_base
from robustsoup.soups.batchnorm import average_statistics, divide_samples, recalibrate
from robustsoup.soups.mixing import Buffers, UnfinishedSoup
from robustsoup.threats import CLEAN, ThreatModel


def copy_base(soup: UnfinishedSoup) -> Buffers:
    """Copy all buffers of the base: `soup.base`, else the common ancestor or first ingredient."""
    first = soup.ingredients[0]
    if soup.base is not None:
        source = Checkpoint.open(soup.base)
    else:
        source = common_ancestor(soup.ingredients) or first
    source = fit_base(source, first)
    mixed = {*first.parameters, *first.tied}
    tensors = {name: tensor for name, tensor in source.tensors.items() if name not in mixed}
    return Buffers(tensors, {"base": source.digest})


def average(soup: UnfinishedSoup) -> Buffers:
    """Average the statistics with the coefficients of the weight of their BatchNorm."""
    return Buffers(average_statistics(soup.ingredients, soup.coefficients))


def recalibrate_clean(soup: UnfinishedSoup) -> Buffers:
    """Measure the statistics on training samples."""
    return _recalibrate(soup, CLEAN)


def recalibrate_adversarial(soup: UnfinishedSoup) -> Buffers:
    """Measure the statistics on attacked training samples."""
    return _recalibrate(soup, soup.calibration.threat)


def take_tracked(soup: UnfinishedSoup) -> Buffers:
    """Take the statistics that learning tracked."""
    return Buffers(soup.coefficients.tracked)


def _recalibrate(soup: UnfinishedSoup, threat: ThreatModel) -> Buffers:
    how = soup.calibration
    if how.data is None:
        raise RequestError("buffers: requires training data; give calibrate_on (--data)")
    tensors = recalibrate(
        soup.network(),
        how.data,
        threat=threat,
        attack_steps=how.attack_steps,
        samples=how.samples,
        seed=how.seed,
        precision=how.precision,
    )
    record = {
        "samples": math.prod(divide_samples(min(how.samples, len(how.data)))),
        "threat": str(threat),
        "attack_steps": how.attack_steps,
    }
    return Buffers(tensors, record)
