"""Random small nets for hypothesis: a recipe is drawn, and built with generic parameters in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cases
import torch
from hypothesis import strategies as st
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.squeeze_excite import SEModule
from torch import Tensor, nn

SIZE = 8
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class Step:
    """One block: what it is, its width and its inner width, and the layers in it."""

    kind: str
    width: int
    inner: int
    norm: str
    act: str
    size: int = 3
    stride: int = 1


@dataclass(frozen=True)
class Recipe:
    """A net: a stem of ``width`` channels, steps, and a classifier (behind ``hidden`` units, unless 0)."""

    family: str
    width: int
    steps: tuple[Step, ...]
    hidden: int
    norm: str
    act: str
    pooled: bool
    seed: int

    @property
    def followed(self) -> bool:
        """Whether torch-pruning's graph follows all channels: not where a concatenation is flattened."""
        beside = any(step.kind == "beside" for step in self.steps)
        return self.pooled or self.family != "convolutional" or not beside

    def build(self) -> nn.Module:
        """The net, in eval mode; the same every time."""
        torch.manual_seed(self.seed)
        return cases.randomised(FAMILIES[self.family](self), self.seed)

    def images(self, n: int, seed: int = 1) -> Tensor:
        """``[n, 3, 8, 8]`` float64."""
        return cases.images(n, SIZE, self.seed + seed)


class Shortcut(nn.Module):
    """act(x + body(x)), x projected where the widths or the sizes differ."""

    def __init__(self, body: nn.Module, project: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.body, self.project, self.act = body, project, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.project(x) + self.body(x))


class Beside(nn.Module):
    """[x, body(x)] side by side."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


class Tokens(nn.Module):
    """Patches with positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.position = nn.Parameter(0.3 * torch.randn(1, (SIZE // 4) ** 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.position


class MeanOfTokens(nn.Module):
    """[B, N, C] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def _conv(into: int, out: int, step: Step, *, groups: int = 1, act: bool = True, size: int | None = None) -> nn.Module:
    """Convolution, norm, activation."""
    size = step.size if size is None else size
    stride = step.stride if size > 1 or step.size == 1 else 1
    layers = [nn.Conv2d(into, out, size, stride, size // 2, groups=groups, bias=step.norm == "none")]
    layers += [] if step.norm == "none" else [_norm2d(step.norm, out)]
    return nn.Sequential(*layers, *([ACTIVATIONS[step.act]()] if act else []))


def _norm2d(name: str, width: int) -> nn.Module:
    parts = next(n for n in (4, 3, 2, 1) if width % n == 0)
    return nn.GroupNorm(parts, width) if name == "group" else nn.BatchNorm2d(width)


def _plain(into: int, step: Step) -> tuple[nn.Module, int]:
    return _conv(into, step.width, step), step.width


def _residual(into: int, step: Step) -> tuple[nn.Module, int]:
    out = into if step.stride == 1 and step.inner % 2 else step.width
    same = out == into and step.stride == 1
    body = nn.Sequential(_conv(into, step.inner, step), nn.Conv2d(step.inner, out, 1), nn.BatchNorm2d(out))
    project = nn.Identity() if same else nn.Conv2d(into, out, 1, step.stride)
    return Shortcut(body, project, ACTIVATIONS[step.act]()), out


def _beside(into: int, step: Step) -> tuple[nn.Module, int]:
    return Beside(_conv(into, step.inner, Step("", 0, 0, step.norm, step.act))), into + step.inner


def _depthwise(into: int, step: Step) -> tuple[nn.Module, int]:
    """An inverted residual's body: expanded, each channel by itself (into one or two), gated, projected."""
    wide = step.inner * (1 + step.width % 2)
    gate = SEModule(wide, rd_channels=3) if step.width % 3 == 0 else nn.Identity()
    body = (
        _conv(into, step.inner, step, size=1),
        _conv(step.inner, wide, step, groups=step.inner),
        gate,
        _conv(wide, step.width, step, size=1, act=False),
    )
    return nn.Sequential(*body), step.width


def _grouped(into: int, step: Step) -> tuple[nn.Module, int]:
    """A convolution in two or three groups between two others."""
    parts = 2 + step.inner % 2
    wide = parts * (1 + step.inner // parts)
    body = (
        _conv(into, wide, step, size=1),
        _conv(wide, wide, step, groups=parts),
        _conv(wide, step.width, step, size=1),
    )
    return nn.Sequential(*body), step.width


MAPS = {"plain": _plain, "residual": _residual, "beside": _beside, "depthwise": _depthwise, "grouped": _grouped}


def _classifier(width: int, recipe: Recipe) -> list[nn.Module]:
    if not recipe.hidden:
        return [nn.Linear(width, cases.CLASSES)]
    norms = {"batch": [nn.BatchNorm1d(recipe.hidden)], "layer": [nn.LayerNorm(recipe.hidden)]}.get(recipe.norm, [])
    act = ACTIVATIONS[recipe.act]()
    return [nn.Linear(width, recipe.hidden), *norms, act, nn.Linear(recipe.hidden, cases.CLASSES)]


def _convolutional(recipe: Recipe) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, recipe.width, 3, padding=1), ACTIVATIONS[recipe.act]()]
    width = recipe.width
    for step in recipe.steps:
        layer, width = MAPS[step.kind](width, step)
        layers.append(layer)
    layers += [nn.AdaptiveAvgPool2d(1 if recipe.pooled else 2), nn.Flatten()]
    return nn.Sequential(*layers, *_classifier(width * (1 if recipe.pooled else 4), recipe))


def _attentive(recipe: Recipe) -> nn.Module:
    """Attention of timm and MLPs behind LayerNorms, each under a shortcut."""
    heads = 2 + recipe.width % 3
    width = heads * (2 + recipe.width % 2)
    layers: list[nn.Module] = [Tokens(width)]
    for step in recipe.steps:
        attention = Attention(
            width, heads, qkv_bias=step.inner % 3 > 0, qk_norm=step.width % 3 == 0, norm_layer=nn.LayerNorm
        )
        attention.fused_attn = False  # torch counts no multiplications inside of the fused one
        for body in (attention, Mlp(width, step.inner, act_layer=type(ACTIVATIONS[step.act]()))):
            layers.append(Shortcut(nn.Sequential(nn.LayerNorm(width), body), nn.Identity(), nn.Identity()))
    return nn.Sequential(*layers, nn.LayerNorm(width), MeanOfTokens(), *_classifier(width, recipe))


def _dense(recipe: Recipe) -> nn.Module:
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, recipe.width)]
    width = recipe.width
    for step in recipe.steps:
        layers += [ACTIVATIONS[step.act](), nn.Linear(width, step.inner)]
        layers += [] if step.norm == "none" else [nn.BatchNorm1d(step.inner)]
        width = step.inner
    return nn.Sequential(*layers, ACTIVATIONS[recipe.act](), *_classifier(width, recipe))


FAMILIES: dict[str, Callable[[Recipe], nn.Module]] = {
    "convolutional": _convolutional,
    "attentive": _attentive,
    "dense": _dense,
}

WIDTHS = st.integers(4, 12)
ACTS = st.sampled_from(sorted(ACTIVATIONS))
STEPS = st.builds(
    Step,
    st.sampled_from(sorted(MAPS)),
    WIDTHS,
    WIDTHS,
    st.sampled_from(["none", "batch", "group"]),
    ACTS,
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2]),
)
RECIPES = st.builds(
    Recipe,
    st.sampled_from(["convolutional", "convolutional", "attentive", "dense"]),
    WIDTHS,
    st.lists(STEPS, min_size=1, max_size=3).map(tuple),
    st.sampled_from([0, 5, 9]),
    st.sampled_from(["none", "batch", "layer"]),
    ACTS,
    st.booleans(),
    st.integers(0, 999),
)
