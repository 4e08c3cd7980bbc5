"""ResNet-18 and ResNet-50 for small images.

Their parameter names are those that most CIFAR code uses (conv1, layer1.0.conv1, ..., linear).
"""

from torch import Tensor, nn
from torch.nn import functional

from robustsoup.models.resnet9 import Normalize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (b, channels, h, w) -> (b, out, h / stride, w / stride)."""

    expansion = 1

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = _shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) -> (b, out, h / stride, w / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 and a shortcut: (b, channels, h, w) -> (b, out, h / stride, w / stride).

    The 3x3 has a quarter of the output's channels and the stride.
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
        self.shortcut = _shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) -> (b, out, h / stride, w / stride)."""
        out = functional.relu(self.bn1(self.conv1(x)))
        out = functional.relu(self.bn2(self.conv2(out)))
        return functional.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


def _shortcut(channels: int, out: int, stride: int) -> nn.Sequential:
    if stride == 1 and channels == out:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """Images (b, channels, h, w) in [0,1] -> logits (b, classes): a 3x3 stem, four stages at strides 1, 2, 2, 2.

    Source: He et al. 2016, arXiv:1512.03385, as it is used for 32x32 images: no max-pool, average-pool at the end.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: tuple[int, ...],
        classes: int,
        channels: int,
        width: int,
        mean: list[float],
        std: list[float],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inner = width
        for stage, depth in enumerate(depths):
            out = width * 2**stage * block.expansion
            blocks = []
            for number in range(depth):
                blocks.append(block(inner, out, 2 if stage and not number else 1))
                inner = out
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.linear = nn.Linear(inner, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (b, channels, h, w) in [0,1] -> logits (b, classes)."""
        x = functional.relu(self.bn1(self.conv1(self.normalize(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean(dim=(2, 3)))


def resnet18(
    *,
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ResNet:
    """A ResNet-18 with fresh weights: 11,173,962 parameters in 62 tensors at width 64 and 10 classes."""
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, channels, width, mean, std)


def resnet50(
    *,
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ResNet:
    """A ResNet-50 with fresh weights: 23,520,842 parameters in 161 tensors at width 64 and 10 classes."""
    mean, std = mean or [0.0] * channels, std or [1.0] * channels
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, channels, width, mean, std)
