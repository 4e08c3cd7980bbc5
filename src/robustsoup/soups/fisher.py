"""Fisher averaging: each weight counts by its Fisher information on attacked images."""

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import call_network
from robustsoup.checkpoints.parameters import inexact_parameters
from robustsoup.precision import full_float32
from robustsoup.seeding import keyed_generator
from robustsoup.soups.merging import Merge, Merged
from robustsoup.soups.summation import as_real, canonical_order, canonical_sum


def fisher(merge: Merge) -> Merged:
    """Return sum_i w_i F_i theta_i / sum_i w_i F_i, entry by entry.

    F_i is the diagonal of the Fisher information of ingredient i on images that are attacked on
    that ingredient. Entries that no ingredient has information on are averaged by the weights.

    Source: Matena and Raffel 2022, arXiv:2111.09832, Eq. 5; attacked images: here.
    """
    owners = dict.fromkeys(merge.parameters.values())
    weighted = {name: torch.zeros(()) for name in owners}
    total = {name: torch.zeros(()) for name in owners}
    for i in canonical_order(merge.digests):
        weight = merge.weights[i]
        if weight == 0:
            continue
        information = measure_fisher(merge, merge.network(i))
        for name in owners:
            part = weight * information[name]
            total[name] = total[name] + part
            weighted[name] = weighted[name] + part * merge.rows(name)[i].double()
    averaged = {
        name: torch.where(
            total[name] > 0,
            weighted[name] / total[name].clamp(min=torch.finfo(torch.float64).tiny),
            canonical_sum(merge.rows(name), merge.weights, merge.digests).double(),
        )
        for name in owners
    }
    return Merged({name: averaged[owner] for name, owner in merge.parameters.items()})


@full_float32()
def measure_fisher(merge: Merge, network: nn.Module) -> dict[str, Tensor]:
    """Return the diagonal of a network's Fisher information on attacked images.

    One label is drawn for each image from the network's own prediction, and the squared gradients
    of its log-probability are averaged; one image at a time, so any network works.

    Args:
        merge: Where images, attack and seed come from.
        network: The network, in eval mode.

    Returns:
        Parameter name -> float64 tensor of the shape that `Merge.rows` gives it, on the CPU.
    """
    parameters = inexact_parameters(network)
    sums = {
        name: torch.zeros_like(as_real(p.detach()), dtype=torch.float64)
        for name, p in parameters.items()
    }
    generator, count = keyed_generator("fisher", merge.seed), 0
    attacked = merge.attacked_batches(network)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for x, _ in attacked:
        for image in x.split(1):
            log_p = call_network(network, image).float().log_softmax(1)[0]
            drawn = int(torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator))
            grads = torch.autograd.grad(log_p[drawn], list(parameters.values()), allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    sums[name] += as_real(grad.resolve_conj()).double().square()
            count += 1
    return {name: (total / count).cpu() for name, total in sums.items()}
