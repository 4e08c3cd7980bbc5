"""The pre-activation ResNet-18 with SiLU of Gowal et al. 2021, with its checkpoint's names."""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from robustsoup.models.normalize import Normalize
from robustsoup.models.wide_resnet import average_pool, pad_same, published_constants


class PreActBlock(nn.Module):
    """Pre-activation block: (b, channels, h, w) -> (b, out, h/stride, w/stride).

    Two 3x3 convolutions and a shortcut: a 3x3 convolution of x if the shape changes, else x itself.
    """

    def __init__(self, channels: int, out: int, stride: int, momentum: float) -> None:
        super().__init__()
        padding = int(stride == 1)
        self.batchnorm_0 = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv_2d_1 = nn.Conv2d(channels, out, 3, stride, padding, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(out, momentum=momentum)
        self.conv_2d_2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or channels != out:
            self.shortcut = nn.Conv2d(channels, out, 3, stride, padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) to (b, out, h/stride, w/stride)."""
        out = functional.silu(self.batchnorm_0(x))
        skip = self.shortcut(pad_same(x, self.shortcut)) if self.shortcut is not None else x
        out = self.conv_2d_1(pad_same(out, self.conv_2d_1))
        return self.conv_2d_2(functional.silu(self.batchnorm_1(out))) + skip


class PreActResNet(nn.Module):
    """Images (b, channels, h, w) in [0, 1], h and w at least 8 -> logits (b, classes).

    A 3x3 stem, four stages of two blocks to 1, 2, 4 and 8 times width at strides 1, 2, 2, 2,
    BatchNorm, SiLU, average-pool, linear.

    Source: He et al. 2016, arXiv:1603.05027, in the form of Gowal et al. 2021, arXiv:2110.09468.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        channels: int,
        *,
        momentum: float,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std, persistent=False)
        self.conv_2d = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.layer_0 = _preact_stage(width, width, 1, momentum)
        self.layer_1 = _preact_stage(width, 2 * width, 2, momentum)
        self.layer_2 = _preact_stage(2 * width, 4 * width, 2, momentum)
        self.layer_3 = _preact_stage(4 * width, 8 * width, 2, momentum)
        self.batchnorm = nn.BatchNorm2d(8 * width, momentum=momentum)
        self.logits = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, channels, h, w) in [0, 1] to logits (b, classes)."""
        x = self.conv_2d(self.normalize(x))
        x = self.layer_3(self.layer_2(self.layer_1(self.layer_0(x))))
        return self.logits(average_pool(functional.silu(self.batchnorm(x))))


def _preact_stage(channels: int, out: int, stride: int, momentum: float) -> nn.Sequential:
    return nn.Sequential(
        PreActBlock(channels, out, stride, momentum), PreActBlock(out, out, 1, momentum)
    )


def preact_resnet18(
    *,
    width: int = 64,
    classes: int = 10,
    channels: int = 3,
    bn_momentum: float = 0.1,
    mean: list[float] | None = None,
    std: list[float] | None = None,
) -> PreActResNet:
    """Build a PreActResNet-18 with fresh weights.

    At width 64 and 10 classes: 12,548,426 parameters in 56 tensors.

    Args:
        width: Channels of the stem.
        classes: Number of classes.
        channels: Number of input channels.
        bn_momentum: Momentum of BatchNorm.
        mean: One number for each channel, subtracted from the inputs; not in the state dict. The
            published constants by default.
        std: One positive number for each channel, which divides the inputs; as `mean`.
    """
    default_mean, default_std = published_constants(channels)
    return PreActResNet(
        width,
        classes,
        channels,
        momentum=bn_momentum,
        mean=mean or default_mean,
        std=std or default_std,
    )
