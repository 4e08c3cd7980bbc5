"""ResNet-9, as David Page trained it on CIFAR-10 ("How to train your ResNet", 2018)."""

from torch import Tensor, nn

from robustsoup.models.normalize import Normalize


class ResNet9(nn.Module):
    """Images (b, channels, h, w) in [0, 1], h and w at least 8 -> logits (b, classes).

    Convolutions to width, 2, 4 and 8 times width, residuals after the second and fourth, a global
    max-pool, a linear layer without bias, logits times 0.125. 6,573,120 parameters in 25 tensors
    at width 64 and 10 classes.
    """

    def __init__(
        self, classes: int, channels: int, width: int, mean: list[float], std: list[float]
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.prep = _conv_block(channels, width)
        self.layer1 = _conv_block(width, 2 * width, pool=True)
        self.residual1 = _residual_block(2 * width)
        self.layer2 = _conv_block(2 * width, 4 * width, pool=True)
        self.layer3 = _conv_block(4 * width, 8 * width, pool=True)
        self.residual3 = _residual_block(8 * width)
        self.linear = nn.Linear(8 * width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) in [0, 1] to logits (b, classes)."""
        x = self.layer1(self.prep(self.normalize(x)))
        x = self.layer2(x + self.residual1(x))
        x = self.layer3(x)
        x = x + self.residual3(x)
        return self.linear(x.amax(dim=(2, 3))) * 0.125


def _conv_block(channels: int, out: int, pool: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out, 3, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.ReLU(inplace=True),
    ]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def _residual_block(channels: int) -> nn.Sequential:
    return nn.Sequential(_conv_block(channels, channels), _conv_block(channels, channels))


def resnet9(
    *,
    classes: int = 10,
    channels: int = 3,
    width: int = 64,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> ResNet9:
    """Build a ResNet9 with fresh weights.

    Args:
        classes: Number of classes.
        channels: Number of input channels.
        width: Channels of the first layer.
        mean: One number for each channel, subtracted from the inputs; zeros by default.
        std: One positive number for each channel, which divides the inputs; ones by default.
    """
    return ResNet9(classes, channels, width, mean or [0.0] * channels, std or [1.0] * channels)
