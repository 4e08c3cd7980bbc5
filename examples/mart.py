"""MART (Wang et al. 2020, ICLR) as an objective of one's own: one function of the two batches' logits.

    robustsoup train --model resnet9 --data cifar10 --threat "Linf 8/255" --objective mart:mart -o mart.safetensors

where this file lies; in Python rs.train(..., objective=mart); in a recipe objective = "mart:mart". The attack climbs the
cross-entropy, as for every plain function; for another one make a robustsoup.Objective of it.
"""

from torch import Tensor
from torch.nn import functional


def mart(clean: Tensor, attacked: Tensor, y: Tensor, weight: float = 6.0) -> Tensor:
    """Boosted cross-entropy, plus the KL from clean to attacked, weighed by how wrong the network is on the clean image.

    clean, attacked: logits (b, classes); y: (b,) -> (b,). Source: Wang et al. 2020, section 3.3.
    """
    p, q = clean.softmax(1), attacked.softmax(1)
    likeliest_other = q.scatter(1, y.view(-1, 1), 0.0).amax(1)
    boosted = (
        functional.cross_entropy(attacked, y, reduction="none") - (1.0001 - likeliest_other).log()
    )
    kl = (p * (clean.log_softmax(1) - attacked.log_softmax(1))).sum(1)
    return boosted + weight * kl * (1 - p.gather(1, y.view(-1, 1)).squeeze(1))
