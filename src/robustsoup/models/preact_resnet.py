"""The pre-activation ResNet-18 with SiLU of Gowal et al. 2021, under the names of its published checkpoint."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from robustsoup.models.resnet9 import Normalize
from robustsoup.models.wide_resnet import constants, padded, pooled


class PreActBlock(nn.Module):
    """Pre-activation, two 3x3 convolutions and a shortcut: (b, channels, h, w) -> (b, out, h / stride, w / stride).

    Where the shape changes, the shortcut is a 3x3 convolution of x itself.
    """

    def __init__(self, channels: int, out: int, stride: int, momentum: float) -> None:
        super().__init__()
        padding = int(stride == 1)
        self.batchnorm_0 = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv_2d_1 = nn.Conv2d(channels, out, 3, stride, padding, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out, momentum=momentum)
        self.conv_2d_2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        changes = stride != 1 or channels != out
        self.shortcut = (
            nn.Conv2d(channels, out, 3, stride, padding, bias=False) if changes else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) -> (b, out, h / stride, w / stride)."""
        out = functional.silu(self.batchnorm_0(x))
        skip = self.shortcut(padded(x, self.shortcut)) if self.shortcut is not None else x
        out = self.conv_2d_1(padded(out, self.conv_2d_1))
        return self.conv_2d_2(functional.silu(self.batchnorm_1(out))) + skip


class PreActResNet(nn.Module):
    """Images (b, channels, h, w) in [0,1], h and w at least 8 -> logits (b, classes).

    A 3x3 stem, four stages of two blocks to 1, 2, 4 and 8 times width at strides 1, 2, 2, 2, BatchNorm, SiLU,
    average-pool, linear.
    Source: He et al. 2016, arXiv:1603.05027, in the form of Gowal et al. 2021, arXiv:2110.09468.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        channels: int,
        momentum: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std, persistent=False)
        self.conv_2d = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        inner = width
        for stage in range(4):
            out = width * 2**stage
            first = PreActBlock(inner, out, 2 if stage else 1, momentum)
            setattr(
                self, f"layer_{stage}", nn.Sequential(first, PreActBlock(out, out, 1, momentum))
            )
            inner = out
        self.batchnorm = nn.BatchNorm2d(inner, momentum=momentum)
        self.logits = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) in [0,1] -> logits (b, classes)."""
        x = self.conv_2d(self.normalize(x))
        x = self.layer_3(self.layer_2(self.layer_1(self.layer_0(x))))
        return self.logits(pooled(functional.silu(self.batchnorm(x))))


def preact_resnet18(
    *,
    width: int = 64,
    classes: int = 10,
    channels: int = 3,
    bn_momentum: float = 0.1,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> PreActResNet:
    """A PreActResNet-18 with fresh weights: 12,548,426 parameters in 56 tensors at width 64 and 10 classes.

    mean, std, bn_momentum: as for `wide_resnet`.
    """
    own = constants(channels)
    return PreActResNet(width, classes, channels, bn_momentum, mean or own[0], std or own[1])
