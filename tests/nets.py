"""Hand-made nets: what can be removed from each, and what a dependency graph reads wrongly in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

Body = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Named parts and a function that runs them."""

    def __init__(self, body: Body, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, x)


class TwoBlocks(nn.Module):
    """A residual net with one identity block and one with a strided, projected shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.one = BasicBlock(6, 6)
        shortcut = nn.Sequential(nn.Conv2d(6, 10, 1, 2, bias=False), nn.BatchNorm2d(10))
        self.two = BasicBlock(6, 10, stride=2, downsample=shortcut)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return pooled(self, self.two(self.one(F.relu(self.bn(self.stem(x))))))


@dataclass(frozen=True)
class Case:
    """A net, the groups (name -> units) that can go, and the layers that a graph reads wrongly."""

    make: Callable[[], nn.Module]
    groups: dict[str, int]
    refused: tuple[str, ...] = ()


def pooled(net: nn.Module, x: Tensor) -> Tensor:
    return net.fc(x.mean((2, 3)))  # type: ignore[operator]


def mapped(function: Callable[[Tensor], Tensor], out: int = 16, into: int = 16, refused: bool = True) -> Case:
    """conv a -> function -> conv b: the function moves or mixes channels."""

    def make() -> nn.Module:
        return Net(
            lambda s, x: pooled(s, s.b(function(F.relu(s.a(x))))), a=conv(3, out), b=conv(into, 12), fc=linear(12)
        )

    return Case(make, {"b": 12}, ("a",)) if refused else Case(make, {"a": 8, "b": 12})


def conv(into: int, out: int, size: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(into, out, size, **options)  # type: ignore[arg-type]


def linear(into: int, out: int = 4) -> nn.Linear:
    return nn.Linear(into, out)


def layered(layer: nn.Module, width: int, out: int | None = None) -> nn.Module:
    """conv a -> layer -> conv b."""
    return Net(
        lambda s, x: pooled(s, s.b(F.relu(s.n(s.a(x))))),
        a=conv(3, width),
        n=layer,
        b=conv(out or width, 12),
        fc=linear(12),
    )


def _halves(net: Net, x: Tensor) -> Tensor:
    p, q = F.relu(net.a(x)).chunk(2, 1)
    return pooled(net, net.b(p) + net.c(q))


def _rotated(net: Net, x: Tensor) -> Tensor:
    p, q, r = net.p(x), net.q(x), net.r(x)
    return pooled(net, net.b(torch.cat([p, q], 1).relu()) + net.c(torch.cat([q, r], 1).relu()))


def _dense(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).relu()
    x = torch.cat([x, net.b(x).relu()], 1)
    x = torch.cat([x, net.c(x).relu()], 1)
    return pooled(net, x)


def _twice(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.c(net.b(net.b(net.a(x).relu()).relu()).relu()))


def _branches(net: Net, x: Tensor) -> Tensor:
    return pooled(net, net.d(net.c(net.a(x).relu())) + net.e(net.c(net.b(x).relu())))


def _shuffled(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def _gated(x: Tensor) -> Tensor:
    p, q = x.chunk(2, 1)
    return p * q.sigmoid()


def _maxout(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c // 2, 2, h, w).amax(2)


def _attention(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).flatten(2).transpose(1, 2)
    b, n, _ = x.shape
    q, k, v = (layer(x).reshape(b, n, 4, -1).transpose(1, 2) for layer in (net.q, net.k, net.v))
    y = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    return net.fc((x + net.proj(y.transpose(1, 2).reshape(b, n, -1))).mean(1))


def _gated_tokens(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).flatten(2).transpose(1, 2) + net.position
    p, q = net.b(x).chunk(2, -1)
    return net.fc((x + net.c(p * q.sigmoid())).mean(1))


def _mixed_tokens(net: Net, x: Tensor) -> Tensor:
    x = net.a(x).flatten(2)
    return net.fc((x + net.c(net.b(x).relu())).mean(2))


def _gram(net: Net, x: Tensor) -> Tensor:
    x = net.b(net.a(x).relu()).flatten(2)
    return net.fc(torch.einsum("bcn,bdn->bcd", x, x).flatten(1))


def _partly_added(net: Net, x: Tensor) -> Tensor:
    """Wider and wider layers, each with a shortcut over the channels of the one before (RexNet)."""
    x = net.layers[0](net.a(x).relu())
    for layer in net.layers[1:]:
        y = layer(x.relu())
        y[:, : x.shape[1]] += x
        x = y
    return pooled(net, x)


def _kernels(net: Net, x: Tensor) -> Tensor:
    both = torch.stack([net.a(x), net.c(x)], 1)
    b, p, c, _, _ = both.shape
    weights = net.z(both.sum(1).mean((2, 3)).relu()).view(b, p, c, 1, 1).softmax(1)
    return pooled(net, net.b((both * weights).sum(1)))


CASES: dict[str, Case] = {
    "two blocks": Case(TwoBlocks, {"stem": 6, "one.conv1": 6, "two.conv1": 10, "two.conv2": 10}),
    "grouped": Case(lambda: layered(conv(24, 12, groups=6), 24, 12), {"a": 6, "b": 12}),
    "depthwise": Case(lambda: layered(conv(8, 8, groups=8), 8), {"a": 8, "b": 12}),
    "depthwise, three outputs each": Case(lambda: layered(conv(8, 24, groups=8), 8, 24), {"a": 8, "b": 12}),
    "grouped, one output each": Case(lambda: layered(conv(24, 6, groups=6), 24, 6), {"b": 12}, ("a",)),
    "group norm": Case(lambda: layered(nn.GroupNorm(6, 24), 24), {"a": 6, "b": 12}),
    "instance norm": Case(lambda: layered(nn.InstanceNorm2d(8, affine=True), 8), {"a": 8, "b": 12}),
    "prelu": Case(lambda: layered(nn.PReLU(8), 8), {"a": 8, "b": 12}),
    "transposed": Case(lambda: layered(nn.ConvTranspose2d(8, 10, 2, 2), 8, 10), {"a": 8, "n": 10, "b": 12}),
    "dense": Case(
        lambda: Net(_dense, a=conv(3, 6), b=conv(6, 4, padding=1), c=conv(10, 5, padding=1), fc=linear(15)),
        {"a": 6, "b": 4, "c": 5},
    ),
    "rotated concatenations": Case(
        lambda: Net(_rotated, p=conv(3, 8), q=conv(3, 6), r=conv(3, 8), b=conv(14, 12), c=conv(14, 12), fc=linear(12)),
        {"p": 8, "q": 6, "r": 8, "b": 12},
    ),
    "concatenated with itself": Case(
        lambda: Net(
            lambda s, x: pooled(s, s.b(torch.cat([s.a(x)] * 2, 1).relu())), a=conv(3, 8), b=conv(16, 12), fc=linear(12)
        ),
        {"a": 8, "b": 12},
    ),
    "flattened": Case(
        lambda: Net(lambda s, x: s.fc(s.a(x).relu().flatten(1)), a=conv(3, 8, 4, stride=4), fc=linear(72)), {"a": 8}
    ),
    "two pools": Case(
        lambda: Net(
            lambda s, x: s.fc(torch.cat([s.a(x).mean((2, 3)), s.a(x).amax((2, 3))], 1)), a=conv(3, 8), fc=linear(16)
        ),
        {"a": 8},
    ),
    "called twice": Case(
        lambda: Net(_twice, a=conv(3, 8), b=conv(8, 8), c=conv(8, 12), fc=linear(12)), {"a": 8, "c": 12}
    ),
    "called in two branches": Case(
        lambda: Net(_branches, a=conv(3, 8), b=conv(3, 8), c=conv(8, 6), d=conv(6, 12), e=conv(6, 12), fc=linear(12)),
        {"a": 8, "c": 6, "d": 12},
    ),
    "spatial gate": Case(
        lambda: Net(
            lambda s, x: pooled(s, s.b(s.a(x) * s.g(s.a(x)).sigmoid())),
            a=conv(3, 8),
            g=conv(8, 1, 1),
            b=conv(8, 12),
            fc=linear(12),
        ),
        {"a": 8, "b": 12},
    ),
    "bare scale": Case(
        lambda: Net(
            lambda s, x: pooled(s, s.b(s.a(x) * s.w[:, None, None])),
            a=conv(3, 8),
            w=nn.Parameter(torch.randn(8)),
            b=conv(8, 12),
            fc=linear(12),
        ),
        {"a": 8, "b": 12},
    ),
    "gated by halves": mapped(_gated, into=8, refused=False),
    "every other": mapped(lambda x: x[:, ::2] * x[:, 1::2], into=8, refused=False),
    "halves added": mapped(lambda x: sum(x.chunk(2, 1)), into=8, refused=False),  # type: ignore[arg-type,return-value]
    "neighbours' maximum": mapped(_maxout, into=8, refused=False),
    "gated tokens behind positions": Case(
        lambda: Net(
            _gated_tokens,
            a=conv(3, 10, 4, stride=4),
            position=nn.Parameter(torch.randn(1, 9, 10)),
            b=linear(10, 16),
            c=linear(8, 10),
            fc=linear(10),
        ),
        {"a": 10, "b": 8},
    ),
    "mixed tokens": Case(
        lambda: Net(_mixed_tokens, a=conv(3, 12, 4, stride=4), b=linear(9, 7), c=linear(7, 9), fc=linear(12)),
        {"b": 7},
        ("a",),
    ),
    # what is read wrongly, and must be refused
    "halves to two layers": Case(
        lambda: Net(_halves, a=conv(3, 16), b=conv(8, 12), c=conv(8, 12), fc=linear(12)), {"b": 12}, ("a", "a'")
    ),
    "halves swapped": mapped(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "shuffled by reshaping": mapped(_shuffled),
    "shuffled": mapped(lambda x: F.channel_shuffle(x, 4)),
    "pixels from channels": mapped(lambda x: F.pixel_shuffle(x, 2), into=4),
    "channels from pixels": mapped(lambda x: F.pixel_unshuffle(x, 2), out=6, into=24),
    "flipped": mapped(lambda x: x.flip(1)),
    "rolled": mapped(lambda x: x.roll(3, 1)),
    "permuted": mapped(lambda x: x[:, [*range(1, 16), 0]]),
    "repeated": mapped(lambda x: x.repeat(1, 2, 1, 1), out=8),
    "repeated one by one": mapped(lambda x: x.repeat_interleave(2, 1), out=8),
    "halved twice": mapped(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], into=8),
    "padded": mapped(lambda x: F.pad(x, (0, 0, 0, 0, 4, 4)), out=8),
    "gated by the mean": mapped(lambda x: x * x.mean(1, keepdim=True)),
    "softmax": mapped(lambda x: x.softmax(1)),
    "normalised": mapped(lambda x: F.normalize(x, dim=1)),
    "running sum": mapped(lambda x: x.cumsum(1)),
    "fixed scale": mapped(lambda x: x * torch.arange(1.0, 17.0)[:, None, None].to(x)),
    "attention by reshaping": Case(
        lambda: Net(
            _attention,
            a=conv(3, 16, 4, stride=4),
            q=linear(16, 16),
            k=linear(16, 16),
            v=linear(16, 16),
            proj=linear(16, 16),
            fc=linear(16),
        ),
        {"a": 16},
        ("q",),
    ),
    "chosen kernels": Case(
        lambda: Net(_kernels, a=conv(3, 16), c=conv(3, 16), z=linear(16, 32), b=conv(16, 12), fc=linear(12)),
        {"b": 12},
        ("a",),
    ),
    "shortcuts over some channels": Case(
        lambda: Net(
            _partly_added,
            a=conv(3, 6),
            layers=nn.ModuleList([conv(6, 40), *(conv(40 + 4 * i, 44 + 4 * i, 1) for i in range(8))]),
            fc=linear(72),
        ),
        {"a": 6},
        ("layers.0",),
    ),
    "products of features": Case(lambda: Net(_gram, a=conv(3, 5), b=conv(5, 8), fc=linear(64)), {"a": 5}, ("b",)),
}


def example(n: int = 2) -> Tensor:
    """``[n, 3, 12, 12]`` for every net here."""
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(1))
