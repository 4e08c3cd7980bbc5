"""torchvision from PyPI beside a CPU build of PyTorch."""

import functools

import torch


@functools.cache
def declare_operators():
    """Declare two compiled operators that torchvision from PyPI lacks beside a CPU build.

    torchvision refers to them when it is imported; no classifier calls them. Returns what keeps the
    declaration alive.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
