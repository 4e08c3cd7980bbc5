"""Wide ResNets with SiLU, named as in the checkpoints of Gowal et al. and Wang et al."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from robustsoup.models.normalize import Normalize

PUBLISHED_MEAN = (0.4914, 0.4822, 0.4465)
PUBLISHED_STD = (0.2471, 0.2435, 0.2616)
"""The constants by which all published checkpoints of these networks normalize; their files do not
hold them."""


class WideBlock(nn.Module):
    """Pre-activation block: (b, channels, h, w) -> (b, out, h/stride, w/stride).

    Two 3x3 convolutions and a shortcut: a 1x1 convolution after BatchNorm and SiLU if the channels
    change, else x itself.
    """

    def __init__(self, channels: int, out: int, stride: int, momentum: float) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv_0 = nn.Conv2d(channels, out, 3, stride, padding=int(stride == 1), bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out, momentum=momentum)
        self.conv_1 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) to (b, out, h/stride, w/stride)."""
        out = functional.silu(self.batchnorm_0(x))
        skip = self.shortcut(out) if self.shortcut is not None else x
        out = functional.silu(self.batchnorm_1(self.conv_0(pad_same(out, self.conv_0))))
        return skip + self.conv_1(out)


class BlockGroup(nn.Module):
    """A sequence of blocks; the first may change channels and stride."""

    def __init__(self, depth: int, channels: int, out: int, stride: int, momentum: float) -> None:
        super().__init__()
        first = WideBlock(channels, out, stride, momentum)
        following_blocks = (WideBlock(out, out, 1, momentum) for _ in range(depth - 1))
        self.block = nn.Sequential(first, *following_blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) to (b, out, h/stride, w/stride)."""
        return self.block(x)


@dataclass(frozen=True)
class WideResNetSize:
    """The size of a WideResNet: depth 6 n + 4, and the widening factor."""

    depth: int
    width: int


class WideResNet(nn.Module):
    """Images (b, channels, h, w) in [0, 1], h and w at least 4 -> logits (b, classes).

    A 3x3 stem to 16 channels, three groups of (depth - 4) / 6 blocks to 16, 32 and 64 times width
    at strides 1, 2, 2, BatchNorm, SiLU, average-pool, linear.

    Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146, in the form of Gowal et al. 2021,
    arXiv:2110.09468.
    """

    def __init__(
        self,
        size: WideResNetSize,
        classes: int,
        channels: int,
        *,
        momentum: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        depth, width = size.depth, size.width
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth: got {depth}, expected 10, 16, 22, 28, ... (6 n + 4)")
        self.normalize = Normalize(mean, std, persistent=False)
        self.init_conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        outs = [16 * 2**number * width for number in range(3)]
        self.layer = nn.Sequential(
            BlockGroup((depth - 4) // 6, 16, outs[0], 1, momentum),
            BlockGroup((depth - 4) // 6, outs[0], outs[1], 2, momentum),
            BlockGroup((depth - 4) // 6, outs[1], outs[2], 2, momentum),
        )
        self.batchnorm = nn.BatchNorm2d(outs[2], momentum=momentum)
        self.logits = nn.Linear(outs[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) in [0, 1] to logits (b, classes)."""
        x = self.layer(self.init_conv(self.normalize(x)))
        return self.logits(average_pool(functional.silu(self.batchnorm(x))))


def pad_same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad x (b, c, h, w) below and on the right by one zero if the 3x3 `conv` has stride 2."""
    return functional.pad(x, (0, 1, 0, 1)) if conv.stride == (2, 2) else x


def average_pool(x: Tensor) -> Tensor:
    """Average over all pixels: (b, c, h, w) -> (b, c)."""
    return functional.avg_pool2d(x, x.shape[2:]).flatten(1)


def published_constants(channels: int) -> tuple[list[float], list[float]]:
    """Return the published (mean, std) for colour images, zeros and ones for others."""
    return (
        (list(PUBLISHED_MEAN), list(PUBLISHED_STD))
        if channels == 3
        else ([0.0] * channels, [1.0] * channels)
    )


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
    """Build a WideResNet with fresh weights.

    At depth 28, width 10 and 10 classes: 36,479,194 parameters in 80 tensors.

    Args:
        depth: 6 n + 4, at least 10.
        width: The widening factor.
        classes: Number of classes.
        channels: Number of input channels.
        bn_momentum: Momentum of BatchNorm; 0.01 in the training of Wang et al.
        mean: One number for each channel, subtracted from the inputs; not in the state dict. The
            published constants by default.
        std: One positive number for each channel, which divides the inputs; as `mean`.
    """
    default_mean, default_std = published_constants(channels)
    size = WideResNetSize(depth, width)
    return WideResNet(
        size,
        classes,
        channels,
        momentum=bn_momentum,
        mean=mean or default_mean,
        std=std or default_std,
    )
