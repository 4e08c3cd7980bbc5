"""RegMean: the linear layers whose outputs are nearest to those of all ingredients."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from robustsoup.attacks.forward import call_network
from robustsoup.precision import full_float32
from robustsoup.soups.merging import Merge, Merged
from robustsoup.soups.summation import canonical_order, canonical_sum

OFF_DIAGONAL = 0.9
"""Factor of the Gram matrices' entries off the diagonal, as in the paper's section 4.2."""
RIDGE = 1e-8
"""Pull towards the average, as a share of the mean diagonal, for inputs that are always 0."""
GRAM_BUDGET = 2**30
"""Bytes of Gram matrices that are held at once; more layers take more passes over the images."""
BYTES_PER_ENTRY = 3 * 8
"""A layer holds three float64 matrices: its own, the sum over the ingredients, and the factor."""

Batches = Sequence[tuple[Tensor, Tensor]]


@full_float32()
def regmean(merge: Merge) -> Merged:
    """Return W = (sum_i w_i G_i)^-1 sum_i w_i G_i W_i for linear layers, and averages elsewhere.

    G_i is the Gram matrix of the layer's inputs on images that are attacked on ingredient i, with
    its entries off the diagonal shrunk; layers that share a weight count the inputs of all. A
    convolution is a linear layer of its patches; grouped and transposed convolutions, biases and
    normalisation are averaged by the weights. So are layers that the network does not call as
    modules, such as the last one of nn.MultiheadAttention, and those whose weight the files hold in
    another form, such as a parametrization; the record names them.

    Source: Jin et al. 2022, arXiv:2212.09849, section 3; attacked images and convolutions: here.
    """
    owners = dict.fromkeys(merge.parameters.values())
    tensors = {
        name: canonical_sum(merge.rows(name), merge.weights, merge.digests) for name in owners
    }
    order = [i for i in canonical_order(merge.digests) if merge.weights[i] > 0]
    found = find_linear_layers(merge.network(order[0]))
    uses: dict[str, list[str]] = {}
    for name in found:
        if name in merge.parameters:
            uses.setdefault(merge.parameters[name], []).append(name)
    layers = {owner: found[names[0]] for owner, names in uses.items()}
    attacked = {i: merge.attacked_batches(merge.network(i)) for i in order}
    averaged = [name for name in found if name not in merge.parameters]
    for group in group_by_budget(layers, GRAM_BUDGET):
        sums: dict[str, Tensor] = {}
        products: dict[str, Tensor] = {}
        called = group
        for i in order:
            grams = measure_grams(
                merge.network(i), attacked[i], {owner: uses[owner] for owner in group}
            )
            called = [name for name in called if name in grams]
            for name in called:
                gram = merge.weights[i] * shrink(grams.pop(name))
                matrix = merge.ingredients[i].tensors[name].double().flatten(1).T
                product = gram @ matrix
                sums[name] = sums[name] + gram if name in sums else gram
                products[name] = products[name] + product if name in products else product
        averaged += [name for name in group if name not in called]
        for name in called:
            average = tensors[name].double()
            solved = solve_layer(sums.pop(name), products.pop(name), average.flatten(1).T)
            tensors[name] = solved.T.reshape(average.shape)
    merged = {name: tensors[owner] for name, owner in merge.parameters.items()}
    return Merged(merged, record={"averaged_layers": averaged} if averaged else {})


def find_linear_layers(network: nn.Module) -> dict[str, int]:
    """Return the number of inputs of each linear layer by the name of its weight.

    Layers with a forward of their own, which may pad inputs or standardise weights, are none.
    """
    sizes: dict[str, int] = {}
    for prefix, module in network.named_modules():
        name = f"{prefix}.weight" if prefix else "weight"
        dense = type(module).forward is nn.Linear.forward or (
            type(module).forward is nn.Conv2d.forward
            and module.groups == 1
            and module.padding_mode == "zeros"
        )
        weight = module.weight if dense else None
        if isinstance(weight, Tensor) and not weight.is_complex():
            sizes[name] = weight[0].numel()
    return sizes


def group_by_budget(sizes: Mapping[str, int], budget: int) -> Iterator[list[str]]:
    """Divide layers into groups whose Gram matrices fit the budget; a larger layer is alone."""
    group: list[str] = []
    used = 0
    for name, size in sizes.items():
        needed = BYTES_PER_ENTRY * size**2
        if group and used + needed > budget:
            yield list(group)
            group.clear()
            used = 0
        group.append(name)
        used += needed
    if group:
        yield group


@torch.no_grad()
def measure_grams(
    network: nn.Module, attacked: Batches, uses: Mapping[str, Sequence[str]]
) -> dict[str, Tensor]:
    """Return X^T X / rows of the inputs of some layers.

    Args:
        network: The network, in eval mode.
        attacked: Images and labels.
        uses: Name of a weight -> its names in all layers that share it.

    Returns:
        Name of a weight -> float64 matrix on the CPU; none if no layer with it was called.
    """
    modules = dict(network.named_modules())
    grams: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(
        name: str, module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        x = list_inputs(module, inputs[0] if inputs else named["input"]).double()
        gram = (x.T @ x).cpu()
        grams[name] = grams[name] + gram if name in grams else gram
        rows[name] = rows.get(name, 0) + len(x)

    hooks = [
        modules[name.removesuffix("weight").removesuffix(".")].register_forward_pre_hook(
            partial(add, owner), with_kwargs=True
        )
        for owner, names in uses.items()
        for name in names
    ]
    try:
        for x, _ in attacked:
            call_network(network, x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: gram / rows[name] for name, gram in grams.items()}


def list_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Return the inputs of a linear layer as rows: for a convolution, its patches."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    padding = module._reversed_padding_repeated_twice  # as "same" and "valid" compute it
    padded = nn.functional.pad(x, padding)
    patches = nn.functional.unfold(
        padded, module.kernel_size, dilation=module.dilation, stride=module.stride
    )
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def shrink(gram: Tensor) -> Tensor:
    """Return a Gram matrix with its entries off the diagonal shrunk."""
    return OFF_DIAGONAL * gram + (1 - OFF_DIAGONAL) * torch.diag(gram.diagonal())


def solve_layer(gram: Tensor, product: Tensor, average: Tensor) -> Tensor:
    """Return the solution W of gram W = product, pulled to the average where gram has no rank.

    Args:
        gram: (k, k), sum of the weighted Gram matrices.
        product: (k, m), sum of the Gram matrices times the weights of the layer.
        average: (k, m), the average of the weights of the layer.
    """
    ridge = RIDGE * float(gram.diagonal().mean())
    if ridge == 0:
        return average
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge * eye, product + ridge * average)
