"""MART (Wang et al. 2020, ICLR) as a custom objective of the logits of two batches.

In the folder of this file, on the command line:

    robustsoup train --model resnet9 --data cifar10 --threat "Linf 8/255" --objective mart:mart \
        -o mart.safetensors

In Python: `rs.train(..., objective=mart)`. In a recipe: `objective = "mart:mart"`. The attack
maximises the cross-entropy, the default of `robustsoup.Objective`. As in the authors' code, each
batch is normalised by its own BatchNorm statistics.
"""

from torch import Tensor
from torch.nn import functional

from robustsoup import Objective


def mart_loss(clean: Tensor, attacked: Tensor, y: Tensor, weight: float = 6.0) -> Tensor:
    """Return boosted cross-entropy plus a KL divergence, weighted by the error on the clean image.

    Args:
        clean: (b, classes) logits of the clean images.
        attacked: (b, classes) logits of the attacked images.
        y: (b,) int64 labels.
        weight: Weight of the KL divergence from clean to attacked predictions.

    Returns:
        (b,) loss of each sample.

    Source: Wang et al. 2020, section 3.3.
    """
    p, q = clean.softmax(1), attacked.softmax(1)
    largest_wrong = q.scatter(1, y.view(-1, 1), 0.0).amax(1)
    cross_entropy = functional.cross_entropy(attacked, y, reduction="none")
    boosted = cross_entropy - (1.0001 - largest_wrong).log()
    kl = (p * (clean.log_softmax(1) - attacked.log_softmax(1))).sum(1)
    return boosted + weight * kl * (1 - p.gather(1, y.view(-1, 1)).squeeze(1))


mart = Objective(mart_loss, name="mart:mart", separate_passes=True)
