"""The small families of the embedded zoo, as torch modules (input [N, 1, 28, 28], 10 logits).

Each takes one idea of a published architecture at 58k to 127k parameters: VGG (plain), ResNet (residual), MobileNetV2
(inverted residual), ShuffleNetV2 (shuffle), DenseNet (dense) and MobileNetV3 (squeeze-excite); and ViT (attention),
which has no BatchNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution without bias, padded to keep the size at stride 1, and its BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Head(nn.Sequential):
    """Global average pooling and one linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def plain() -> nn.Module:
    """VGG without its wide linear layers."""
    layers: list[nn.Module] = []
    channels = 1
    for width, stride in ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (96, 1)):
        layers += [*conv_bn(channels, width, stride=stride), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, Head(channels))


class Residual(nn.Module):
    """ResNet basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(inputs, outputs, stride=stride), nn.ReLU(), *conv_bn(outputs, outputs))
        changes_shape = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(*conv_bn(inputs, outputs, 1, stride)) if changes_shape else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def residual() -> nn.Module:
    return nn.Sequential(
        *conv_bn(1, 16, stride=1),
        nn.ReLU(),
        Residual(16, 24, 2),
        Residual(24, 24, 1),
        Residual(24, 48, 2),
        Residual(48, 48, 1),
        Head(48),
    )


class InvertedResidual(nn.Module):
    """MobileNetV2 block: expand, depthwise, project; linear at the end."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            *conv_bn(inputs, hidden, 1),
            nn.ReLU6(),
            *conv_bn(hidden, hidden, 3, stride, hidden),
            nn.ReLU6(),
            *conv_bn(hidden, outputs, 1),
        )
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


def inverted() -> nn.Module:
    return nn.Sequential(
        *conv_bn(1, 16, stride=2),
        nn.ReLU6(),
        InvertedResidual(16, 16, 1, 4),
        InvertedResidual(16, 24, 1, 4),
        InvertedResidual(24, 24, 1, 4),
        InvertedResidual(24, 40, 2, 4),
        InvertedResidual(40, 40, 1, 4),
        InvertedResidual(40, 40, 1, 4),
        *conv_bn(40, 160, 1),
        nn.ReLU6(),
        Head(160),
    )


class Shuffle(nn.Module):
    """ShuffleNetV2 unit: half of the channels pass, half are worked on, then the halves are interleaved."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        half = outputs // 2
        worked = inputs if stride == 2 else inputs // 2
        self.right = nn.Sequential(
            *conv_bn(worked, half, 1),
            nn.ReLU(),
            *conv_bn(half, half, 3, stride, half),
            *conv_bn(half, half, 1),
            nn.ReLU(),
        )
        if stride == 2:
            self.left = nn.Sequential(*conv_bn(inputs, inputs, 3, 2, inputs), *conv_bn(inputs, half, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            left, right = self.left(x), self.right(x)
        else:
            left, right = x.chunk(2, dim=1)
            right = self.right(right)
        # Reshape and Transpose rather than channel_shuffle: every exporter knows how to write them.
        return torch.stack([left, right], 2).flatten(1, 2)


def shuffle() -> nn.Module:
    return nn.Sequential(
        *conv_bn(1, 24, stride=1),
        nn.ReLU(),
        Shuffle(24, 64, 2),
        Shuffle(64, 64, 1),
        Shuffle(64, 64, 1),
        Shuffle(64, 128, 2),
        Shuffle(128, 128, 1),
        Shuffle(128, 128, 1),
        *conv_bn(128, 192, 1),
        nn.ReLU(),
        Head(192),
    )


class DenseLayer(nn.Module):
    """DenseNet layer: BatchNorm and ReLU before each convolution; its output is appended to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            *conv_bn(inputs, 4 * growth, 1),
            nn.ReLU(),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def dense() -> nn.Module:
    growth, channels = 14, 24
    layers: list[nn.Module] = [*conv_bn(1, channels, stride=2), nn.ReLU()]
    for stage in range(2):
        for _ in range(4):
            layers.append(DenseLayer(channels, growth))
            channels += growth
        if stage == 0:
            half = channels // 2
            layers += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, half, 1, bias=False), nn.AvgPool2d(2)]
            channels = half
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(), Head(channels))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = channels // 4
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(),
            nn.Conv2d(squeezed, channels, 1),
            nn.Hardsigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class ExcitedBlock(nn.Module):
    """MobileNetV3 block: inverted residual with a squeeze-excite gate and hard swish."""

    def __init__(self, inputs: int, hidden: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(inputs, hidden, 1),
            nn.Hardswish(),
            *conv_bn(hidden, hidden, kernel, stride, hidden),
            SqueezeExcite(hidden),
            nn.Hardswish(),
            *conv_bn(hidden, outputs, 1),
        )
        self.skip = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


def excite() -> nn.Module:
    return nn.Sequential(
        *conv_bn(1, 16, stride=2),
        nn.Hardswish(),
        ExcitedBlock(16, 48, 24, 3, 1),
        ExcitedBlock(24, 72, 24, 5, 1),
        ExcitedBlock(24, 96, 40, 5, 2),
        ExcitedBlock(40, 120, 40, 5, 1),
        ExcitedBlock(40, 120, 40, 3, 1),
        *conv_bn(40, 160, 1),
        nn.Hardswish(),
        Head(160),
    )


class Attention(nn.Module):
    """Transformer block: LayerNorm and self-attention of 4 heads, LayerNorm and an MLP, a shortcut around each."""

    HEADS = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.mixed = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        q, k, v = self.before(self.first(x)).view(count, tokens, 3 * self.HEADS, -1).transpose(1, 2).chunk(3, 1)
        weights = (q @ k.transpose(2, 3) * (width / self.HEADS) ** -0.5).softmax(-1)
        x = x + self.mixed((weights @ v).transpose(1, 2).reshape(count, tokens, width))
        return x + self.mlp(self.second(x))


class Tokens(nn.Module):
    """Places of a feature map [N, C, H, W] as tokens [N, H W, C], each with a learned vector added for where it is."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2) + self.place


class MeanToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def attention() -> nn.Module:
    """ViT with a convolutional stem: LayerNorm only, no statistics of the data anywhere."""
    width = 64
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(32, width, 3, 2, 1),
        Tokens(width, 49),
        *[Attention(width) for _ in range(3)],
        nn.LayerNorm(width),
        MeanToken(),
        nn.Linear(width, 10),
    )


FAMILIES = {
    "plain": plain,
    "residual": residual,
    "inverted": inverted,
    "shuffle": shuffle,
    "dense": dense,
    "excite": excite,
}
WITHOUT_BATCHNORM = {"attention": attention}
