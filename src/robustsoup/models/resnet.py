"""ResNet-18 and ResNet-50 for small images.

The parameter names are those of most CIFAR code (conv1, layer1.0.conv1, ..., linear).
"""

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from robustsoup.models.normalize import Normalize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (b, channels, h, w) -> (b, out, h/stride, w/stride)."""

    expansion = 1

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = _projection_shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) to (b, out, h/stride, w/stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; shapes as in BasicBlock.

    The 3x3 convolution has a quarter of the output's channels and the stride.
    """

    expansion = 4

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        inner = out // self.expansion
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.shortcut = _projection_shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) to (b, out, h/stride, w/stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def _projection_shortcut(channels: int, out: int, stride: int) -> nn.Sequential:
    if stride == 1 and channels == out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


@dataclass(frozen=True)
class ResNetLayout:
    """The blocks of a ResNet.

    Attributes:
        block: The kind of block.
        depths: Blocks in each of the four stages.
        width: Channels of the stem.
    """

    block: type[BasicBlock] | type[Bottleneck]
    depths: tuple[int, int, int, int]
    width: int


class ResNet(nn.Module):
    """Images (b, channels, h, w) in [0, 1] -> logits (b, classes).

    A 3x3 stem, four stages at strides 1, 2, 2, 2, average-pool, linear; no max-pool, as is usual
    for images of 32x32 pixels.

    Source: He et al. 2016, arXiv:1512.03385.
    """

    def __init__(
        self,
        layout: ResNetLayout,
        classes: int,
        channels: int,
        mean: list[float],
        std: list[float],
    ) -> None:
        super().__init__()
        width = layout.width
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        outs = [width * 2**stage * layout.block.expansion for stage in range(4)]
        self.layer1 = _resnet_stage(layout, 0, width, outs[0])
        self.layer2 = _resnet_stage(layout, 1, outs[0], outs[1])
        self.layer3 = _resnet_stage(layout, 2, outs[1], outs[2])
        self.layer4 = _resnet_stage(layout, 3, outs[2], outs[3])
        self.linear = nn.Linear(outs[3], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) in [0, 1] to logits (b, classes)."""
        x = functional.relu(self.bn1(self.conv1(self.normalize(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean(dim=(2, 3)))


def _resnet_stage(layout: ResNetLayout, stage: int, channels: int, out: int) -> nn.Sequential:
    first = layout.block(channels, out, 2 if stage else 1)
    following_blocks = (layout.block(out, out, 1) for _ in range(layout.depths[stage] - 1))
    return nn.Sequential(first, *following_blocks)


def resnet18(
    *,
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ResNet:
    """Build a ResNet-18 with fresh weights.

    At width 64 and 10 classes: 11,173,962 parameters in 62 tensors.

    Args:
        classes: Number of classes.
        channels: Number of input channels.
        width: Channels of the stem.
        mean: One number for each channel, subtracted from the inputs; zeros by default.
        std: One positive number for each channel, which divides the inputs; ones by default.
    """
    layout = ResNetLayout(BasicBlock, (2, 2, 2, 2), width)
    return ResNet(layout, classes, channels, mean or [0.0] * channels, std or [1.0] * channels)


def resnet50(
    *,
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ResNet:
    """Build a ResNet-50 with fresh weights.

    At width 64 and 10 classes: 23,520,842 parameters in 161 tensors.

    Args:
        classes: Number of classes.
        channels: Number of input channels.
        width: Channels of the stem.
        mean: One number for each channel, subtracted from the inputs; zeros by default.
        std: One positive number for each channel, which divides the inputs; ones by default.
    """
    layout = ResNetLayout(Bottleneck, (3, 4, 6, 3), width)
    return ResNet(layout, classes, channels, mean or [0.0] * channels, std or [1.0] * channels)
