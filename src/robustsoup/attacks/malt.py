"""MALT's choice of target classes: those that a linear network would reach first.

For a linear network, the distance from an image to the region of another class is the margin over
the dual norm of the margin's gradient. MALT ranks the classes of any network by this quotient at
the clean image, and attacks them in this order.

Source: Melamed et al. 2024, arXiv:2407.02240.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import call_network
from robustsoup.attacks.lanes import run_in_lanes
from robustsoup.attacks.outcome import AttackedSamples
from robustsoup.attacks.projections import norms

MOST_CANDIDATES = 100
"""Most likely other classes whose distances are computed, as in the paper."""
DUAL_NORMS = {"Linf": "L1", "L2": "L2", "L1": "Linf"}


def rank_targets(model: nn.Module, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Rank the other classes of each image by their distance in the linear approximation.

    Takes one pass and a gradient for each candidate; the candidates are the 100 most likely other
    classes. A class without a gradient is ranked last, and ties follow the logits.

    Args:
        model: Network in eval mode whose weights need no gradient.
        x: (b, ...) images.
        y: (b,) int64 labels.
        norm: Norm of the threat model.

    Returns:
        (b, min(classes - 1, 100)) int64 classes, the nearest first.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        logits = call_network(model, point)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        others = logits.detach().scatter(1, y.view(-1, 1), -torch.inf)
        order = others.argsort(dim=1, descending=True, stable=True)
        candidates = order[:, : min(logits.shape[1] - 1, MOST_CANDIDATES)]
        margins = logits.gather(1, y.view(-1, 1)) - logits.gather(1, candidates)
        if not margins.requires_grad:  # for example, the network rounds its input
            return candidates
        sizes = []
        for column in margins.unbind(1):
            (grad,) = torch.autograd.grad(column.sum(), point, retain_graph=True, allow_unused=True)
            sizes.append(norms(torch.zeros_like(x) if grad is None else grad, DUAL_NORMS[norm]))
    size = torch.stack(sizes, 1)
    distance = torch.where(size > 0, margins.detach() / size, torch.inf)
    distance = distance.nan_to_num(torch.inf, torch.inf)
    return candidates.gather(1, distance.argsort(dim=1, stable=True))


class NearestTargets:
    """The ranked target classes of the samples of an attack, computed when they are needed.

    Args:
        model: Network in eval mode whose weights need no gradient.
        samples: The samples.
        norm: Norm of the threat model.
        size: Number of images in every pass.
        device: Device of the network.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: AttackedSamples,
        norm: str,
        size: int,
        device: torch.device,
    ) -> None:
        self.model, self.samples, self.norm = model, samples, norm
        self.size, self.device = size, device
        ranks = min(samples.classes - 1, MOST_CANDIDATES)
        self.table = torch.zeros(len(samples.y), ranks, dtype=torch.long)
        self.known = torch.zeros(len(samples.y), dtype=torch.bool)

    def rank(self, samples: Tensor, poll: Callable[[], None] | None = None) -> Tensor:
        """Rank the classes of some samples, in passes of one fixed size.

        Args:
            samples: (b,) int64 samples.
            poll: Called in this thread several times a second.

        Returns:
            (n, ranks) int64 classes; the rows of samples that were never asked for are 0.
        """
        new = samples[~self.known[samples]] if len(samples) else samples
        passes = [partial(self._rank_pass, batch) for batch in new.split(self.size)]
        if len(new):
            self.table[new] = torch.cat(run_in_lanes(passes, self.device, poll=poll))
            self.known[new] = True
        return self.table

    def _rank_pass(self, batch: Tensor) -> Tensor:
        padded = torch.cat([batch, batch[:1].expand(self.size - len(batch))])
        x, y = self.samples.fetch(padded), self.samples.y[padded].to(self.device)
        return rank_targets(self.model, x, y, self.norm)[: len(batch)].cpu()
