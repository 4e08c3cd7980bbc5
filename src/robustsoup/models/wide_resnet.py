"""Wide ResNets with SiLU, under the names of the published checkpoints of Gowal et al. 2021 and Wang et al. 2023."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from robustsoup.models.resnet9 import Normalize

MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2471, 0.2435, 0.2616)
"""What every published checkpoint of these networks normalises by; their files hold neither."""


class WideBlock(nn.Module):
    """Pre-activation, two 3x3 convolutions and a shortcut: (b, channels, h, w) -> (b, out, h / stride, w / stride).

    Where channels change, the shortcut is a 1x1 convolution after BatchNorm and SiLU; elsewhere it is x itself.
    """

    def __init__(self, channels: int, out: int, stride: int, momentum: float) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv_0 = nn.Conv2d(channels, out, 3, stride, padding=int(stride == 1), bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out, momentum=momentum)
        self.conv_1 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) -> (b, out, h / stride, w / stride)."""
        out = functional.silu(self.batchnorm_0(x))
        skip = self.shortcut(out) if self.shortcut is not None else x
        out = functional.silu(self.batchnorm_1(self.conv_0(padded(out, self.conv_0))))
        return skip + self.conv_1(out)


class BlockGroup(nn.Module):
    """A row of blocks, of which the first may change channels and stride; called `block`, as in the published files."""

    def __init__(self, depth: int, channels: int, out: int, stride: int, momentum: float) -> None:
        super().__init__()
        first = WideBlock(channels, out, stride, momentum)
        self.block = nn.Sequential(
            first, *(WideBlock(out, out, 1, momentum) for _ in range(depth - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) -> (b, out, h / stride, w / stride)."""
        return self.block(x)


class WideResNet(nn.Module):
    """Images (b, channels, h, w) in [0,1], h and w at least 4 -> logits (b, classes).

    A 3x3 stem to 16 channels, three groups of (depth - 4) / 6 blocks to 16, 32 and 64 times width at strides 1, 2, 2,
    BatchNorm, SiLU, average-pool, linear.
    Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146, in the form of Gowal et al. 2021, arXiv:2110.09468.
    """

    def __init__(
        self,
        depth: int,
        width: int,
        classes: int,
        channels: int,
        momentum: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: got {depth}, expected 10, 16, 22, 28, ... (6 n + 4)")
        self.normalize = Normalize(mean, std, persistent=False)
        self.init_conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        groups, inner = [], 16
        for number in range(3):
            out = 16 * 2**number * width
            groups.append(BlockGroup((depth - 4) // 6, inner, out, 2 if number else 1, momentum))
            inner = out
        self.layer = nn.Sequential(*groups)
        self.batchnorm = nn.BatchNorm2d(inner, momentum=momentum)
        self.logits = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) in [0,1] -> logits (b, classes)."""
        x = self.layer(self.init_conv(self.normalize(x)))
        return self.logits(pooled(functional.silu(self.batchnorm(x))))


def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """x (b, c, h, w), with a zero row below and a zero column to the right if the 3x3 `conv` has stride 2 ("SAME")."""
    return functional.pad(x, (0, 1, 0, 1)) if conv.stride == (2, 2) else x


def pooled(x: Tensor) -> Tensor:
    """The mean over all pixels: x (b, c, h, w) -> (b, c)."""
    return functional.avg_pool2d(x, x.shape[2:]).flatten(1)


def constants(channels: int) -> tuple[list[float], list[float]]:
    """The published mean and std for colour images, 0 and 1 for others."""
    return (list(MEAN), list(STD)) if channels == 3 else ([0.0] * channels, [1.0] * channels)


def wide_resnet(
    *,
    depth: int = 28,
    width: int = 10,
    classes: int = 10,
    channels: int = 3,
    bn_momentum: float = 0.1,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> WideResNet:
    """A WideResNet with fresh weights: 36,479,194 parameters in 80 tensors at depth 28, width 10 and 10 classes.

    mean, std: no part of the state dict; without them, the published ones. bn_momentum: 0.01 in Wang et al.'s training.
    """
    own = constants(channels)
    return WideResNet(depth, width, classes, channels, bn_momentum, mean or own[0], std or own[1])
