"""Small nets as data: one more entry tests everything once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNorm2d, RmsNorm, SimpleNorm2d
from timm.layers.norm_act import BatchNormAct2d, GroupNormAct, LayerNormAct2d, RmsNormAct2d
from timm.layers.squeeze_excite import SEModule
from timm.models._efficientnet_blocks import DepthwiseSeparableConv
from timm.models.resnet import Bottleneck
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from jbrprune.pruning.options import RunOptions
from jbrprune.pruning.prepare import Calibration, open_problem, read_calibration
from jbrprune.sparsity.masks import Slot

CLASSES = 4


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Generic parameters and statistics instead of ones and zeros; float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                shift = 0.7 if name in ("weight", "gamma") else 0.0
                parameter.data = shift + 0.5 * torch.randn(parameter.shape, generator=generator)
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=generator))
    return model.double().eval()


class Chain(nn.Module):
    """stem -> layer -> (relu) -> pool -> head."""

    def __init__(self, layer: nn.Module, stem: nn.Module, width: int, relu: nn.Module | None = None) -> None:
        super().__init__()
        self.stem, self.layer, self.relu = stem, layer, relu or nn.GELU()
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.layer(self.stem(x)))
        return self.head(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if x.dim() > 2 else x


class Tokens(Chain):
    """As `Chain`, for layers over [B, N, C]."""

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean(1)


class ToTokens(nn.Module):
    """Patches as tokens: [B, C, H, W] -> [B, N, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).transpose(1, 2)


class ToMap(nn.Module):
    """[B, C, H, W] -> [B, H, W, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).permute(0, 2, 3, 1)


class Residual(nn.Module):
    """The layer's input is read by a shortcut and by a second layer: both would leak into its input gradient."""

    def __init__(self, layer: nn.Module, stem: nn.Module, width: int, tokens: bool) -> None:
        super().__init__()
        self.stem, self.layer, self.tokens = stem, layer, tokens
        self.head = nn.Linear(width, CLASSES)
        self.other = nn.Linear(width, width) if tokens else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.gelu(self.layer(x)) + x * x + self.other(x)
        return self.head(x.mean(1) if self.tokens else x.flatten(2).mean(2))


class Twice(nn.Module):
    """One convolution, one norm and one linear layer, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.norm(self.conv(x)))
        x = x.mean((2, 3))
        return self.head(torch.tanh(self.fc(torch.tanh(self.fc(x)))))


class InPlaceSum(nn.Module):
    """``x += shortcut``, in-place activations behind batch norms; the last sum overwrites what a layer has read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv, self.bn1 = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.relu_(self.bn0(self.stem(x)))
        x = self.bn1(self.conv(shortcut))
        x += shortcut
        x = F.relu_(x)
        y = self.conv2(x)
        y += x
        return self.head(torch.tanh(y).mean((2, 3)))


class Overwritten(nn.Module):
    """Inputs of a convolution, a linear layer and a batch norm are changed in place after they were read.

    Autograd would refuse a weight gradient here (``reference`` is the same net without the overwriting).
    """

    def __init__(self, in_place: bool = True) -> None:
        super().__init__()
        self.in_place = in_place
        self.stem, self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(x)
        x = x.mul_(0.5) if self.in_place else x * 0.5
        z = self.bn(y)
        y = y.add_(1) if self.in_place else y + 1
        h = (x + y + z).mean((2, 3))
        g = self.fc(h)
        h = h.sub_(1) if self.in_place else h - 1
        return self.head(torch.tanh(g) + h)


class Concat(nn.Module):
    """Dense connection: two branches side by side, read by one layer; flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 2, 1)
        self.mix, self.norm = nn.Conv2d(6, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5 * 16, 7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.one(x)), F.relu(self.two(x))], 1)
        x = F.relu(self.norm(self.mix(x))).flatten(1)
        return self.head(F.gelu(self.fc(x)))


class Windows(nn.Module):
    """A layer inside windows: [B * windows, tokens, C]."""

    def __init__(self, merge: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 1), nn.LayerNorm(6)
        self.qkv, self.proj = nn.Linear(6, 18), nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES)
        self.sequence_first = merge

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        x = x.reshape(b, h // 4, 4, w // 4, 4, c).transpose(2, 3)
        x = (x.transpose(0, 1) if self.sequence_first else x).reshape(-1, 16, c)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v))
        if self.sequence_first:
            x = x.reshape(h // 4, b, -1, c).transpose(0, 1)
        return self.head(x.reshape(b, -1, c).mean(1))


class VGG(nn.Sequential):
    """In-place activations directly behind convolutions and linear layers: their outputs are overwritten."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(6, 5, 3, padding=1),
            nn.LeakyReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(5 * 16, 9),
            nn.Dropout(0.5, inplace=True),
            nn.ReLU(inplace=True),
            nn.Linear(9, CLASSES),
        )


def _tokens(layer: nn.Module, width: int = 6) -> nn.Module:
    return Tokens(layer, ToTokens(6), width)


def _chain(layer: nn.Module, width: int = 6, relu: nn.Module | None = None) -> nn.Module:
    return Chain(layer, nn.Conv2d(3, 6, 3, padding=1), width, relu)


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


class Lines(nn.Module):
    """[B, C, H, W] -> [B, width, H * W]."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv1d(3, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x.flatten(2))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: _tokens(nn.Linear(6, 5), 5),
    "linear without bias": lambda: _tokens(nn.Linear(6, 5, bias=False), 5),
    "linear over a map": lambda: Chain(nn.Linear(6, 5), ToMap(6), 4),
    "conv1d": lambda: Chain(nn.Conv1d(6, 5, 3, stride=2), Lines(), 5),
    "conv1d depthwise": lambda: Chain(nn.Conv1d(6, 12, 3, groups=6), Lines(), 12),
    "conv2d": lambda: _chain(nn.Conv2d(6, 5, 3), 5),
    "conv2d without bias": lambda: _chain(nn.Conv2d(6, 5, 3, bias=False), 5),
    "conv2d strided, reflected": lambda: _chain(nn.Conv2d(6, 5, 3, stride=2, padding=1, padding_mode="reflect"), 5),
    "conv2d dilated": lambda: _chain(nn.Conv2d(6, 5, 3, dilation=2, padding="same"), 5),
    "conv2d grouped": lambda: _chain(nn.Conv2d(6, 9, 3, groups=3), 9),
    "conv2d depthwise": lambda: _chain(nn.Conv2d(6, 6, 3, groups=6)),
    "conv2d depthwise, multiplier 2": lambda: _chain(nn.Conv2d(6, 12, 3, groups=6), 12),
    "conv2d transposed": lambda: _chain(nn.ConvTranspose2d(6, 5, 3, stride=2), 5),
    "conv2d transposed, grouped": lambda: _chain(nn.ConvTranspose2d(6, 9, 3, groups=3, output_padding=0), 9),
    "batch norm": lambda: _chain(nn.BatchNorm2d(6)),
    "batch norm, in-place relu": lambda: _chain(nn.BatchNorm2d(6), relu=nn.ReLU(inplace=True)),
    "batch norm without parameters": lambda: _chain(nn.BatchNorm2d(6, affine=False)),
    "batch norm and activation": lambda: _chain(BatchNormAct2d(6)),
    "batch norm and GELU": lambda: _chain(BatchNormAct2d(6, act_layer=nn.GELU)),
    "group norm": lambda: _chain(nn.GroupNorm(2, 6)),
    "group norm and activation": lambda: _chain(GroupNormAct(6, num_groups=2)),
    "layer norm": lambda: _tokens(nn.LayerNorm(6)),
    "layer norm without bias": lambda: _tokens(nn.LayerNorm(6, bias=False)),
    "layer norm without parameters": lambda: _tokens(nn.LayerNorm(6, elementwise_affine=False)),
    "layer norm over several dimensions": lambda: _tokens(nn.LayerNorm((16, 6))),
    "layer norm 2d": lambda: _chain(LayerNorm2d(6)),
    "layer norm 2d and activation": lambda: _chain(LayerNormAct2d(6)),
    "rms norm": lambda: _tokens(RmsNorm(6)),
    "rms norm 2d and activation": lambda: _chain(RmsNormAct2d(6, act_layer=nn.GELU)),
    "simple norm 2d": lambda: _chain(SimpleNorm2d(6)),
    "layer scale": lambda: _tokens(timm.layers.LayerScale(6)),
    "layer scale in place": lambda: _tokens(nn.Sequential(nn.Linear(6, 6), timm.layers.LayerScale(6, inplace=True))),
    "layer scale 2d": lambda: _chain(timm.layers.LayerScale2d(6)),
    "global response norm": lambda: Chain(GlobalResponseNorm(6), ToMap(6), 4),
    "global response norm, channels first": lambda: _chain(GlobalResponseNorm(6, channels_last=False)),
    "squeeze and excite": lambda: _chain(SEModule(6, rd_channels=3)),
    "bottleneck": lambda: _chain(Bottleneck(6, 8, stride=2, downsample=_downsample(6, 32)), 32),
    "depthwise separable": lambda: _chain(DepthwiseSeparableConv(6, 8, se_layer=SEModule), 8),
    "transformer block": lambda: _tokens(Block(6, 2, init_values=0.5)),
    "transformer block with normalised queries": lambda: _tokens(Block(6, 2, qk_norm=True)),
}

RESIDUAL: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: Residual(nn.Linear(6, 6), ToTokens(6), 6, True),
    "layer norm": lambda: Residual(nn.LayerNorm(6), ToTokens(6), 6, True),
    "conv2d": lambda: Residual(nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(3, 6, 1), 6, False),
    "conv2d grouped": lambda: Residual(nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Conv2d(3, 6, 1), 6, False),
    "conv2d depthwise": lambda: Residual(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(3, 6, 1), 6, False),
    "conv2d transposed": lambda: Residual(
        nn.ConvTranspose2d(6, 6, 3, padding=1, groups=2), nn.Conv2d(3, 6, 1), 6, False
    ),
    "batch norm": lambda: Residual(nn.BatchNorm2d(6), nn.Conv2d(3, 6, 1), 6, False),
    "layer norm 2d": lambda: Residual(LayerNorm2d(6), nn.Conv2d(3, 6, 1), 6, False),
}

NETS: dict[str, Callable[[], nn.Module]] = {
    "called twice": Twice,
    "sum in place": InPlaceSum,
    "concatenation, flattened": Concat,
    "channels last": lambda: _channels_last(Concat()),
    "in-place activations without norm": VGG,
    "windows": Windows,
    "frozen": lambda: _frozen(Concat()),
}

# Whole timm models: name -> (keyword arguments, image size)
_NARROW = {"layers": (2, 1, 1, 1), "channels": (16, 24, 32, 40)}
MODELS: dict[str, tuple[str, dict, int]] = {
    "resnet18": ("resnet18", _NARROW, 32),
    "resnet26": ("resnet26", _NARROW, 32),
    "resnext": ("resnext50_32x4d", _NARROW | {"cardinality": 4, "base_width": 32}, 32),
    "mobilenetv2": ("mobilenetv2_035", {}, 32),
    "mobilenetv3": ("mobilenetv3_small_050", {}, 32),
    "regnety": ("regnety_002", {}, 32),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (12, 16, 20, 24)}, 32),
    "convnextv2": ("convnextv2_atto", {"depths": (1, 1, 1, 1), "dims": (12, 16, 20, 24)}, 32),
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48}, 32),
    "deit distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2, "embed_dim": 48}, 32),
}


def timm_model(case: str) -> tuple[nn.Module, Tensor]:
    """A whole timm model, generic parameters, and 3 images that fit it."""
    name, options, size = MODELS[case]
    torch.manual_seed(0)
    return randomised(timm.create_model(name, num_classes=CLASSES, **options)), images(3, size)


def images(n: int, size: int = 8, seed: int = 1) -> Tensor:
    """``[n, 3, size, size]`` float64."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _downsample(inside: int, outside: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inside, outside, 1, 2, bias=False), nn.BatchNorm2d(outside))


def calibration(model: nn.Module, data: object, *, judged: bool = False, **options: Any) -> Calibration:
    """All of the images as a run splits them."""
    how = RunOptions(**{"images": None, "progress": False} | options)
    return read_calibration(open_problem(model, data, how.batch_size), how, judged=judged)


def effective(slot: Slot) -> Tensor:
    """Values of a parameter that count: zero where it is masked."""
    weight = slot.stored.detach()
    return weight if slot.mask is None else torch.where(slot.mask.bool(), weight, 0)
