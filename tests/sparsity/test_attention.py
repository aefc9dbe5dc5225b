"""Single weights of `nn.MultiheadAttention`: scored, pruned, masked in every path of its forward, saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import pytest
import timm
import torch
from single import compare
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as torch_prune

import jbrprune
from jbrprune.checkpoint.checkpoint import load, save
from jbrprune.sparsity.masks import make_permanent, masks_of, put_masks, weights_of


class Attending(nn.Module):
    """An attention that reads keys and values of the same width, or of another one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tokens, self.others = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(3, width, 4, 4)
        sizes = {} if width == 8 else {"kdim": width, "vdim": width, "add_bias_kv": True}
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **sizes)  # type: ignore[arg-type]
        self.head = nn.Linear(8, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        query = self.tokens(x).flatten(2).transpose(1, 2)
        other = self.others(x).flatten(2).transpose(1, 2) if self.attention.in_proj_weight is None else query
        return self.head(query + self.attention(query, other, other, need_weights=False)[0]).mean(1)


class Encoder(nn.Module):
    """Layers that have a fused path of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, layer = nn.Conv2d(3, 8, 4, 4), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, cases.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(x).flatten(2).transpose(1, 2)).mean(1))


def beit() -> nn.Module:
    """Its attention reads the weight of a linear layer that it does not call."""
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    return timm.create_model("beit_base_patch16_224", num_classes=cases.CLASSES, **arguments)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "one weight": Attending,
    "three weights": lambda: Attending(12),
    "encoder": Encoder,
    "beit": beit,
}
IMAGES = cases.images(24, 16)


def made(name: str) -> nn.Module:
    return cases.randomised(MODELS[name]()).double().eval()


@pytest.mark.parametrize("parameters", ["weights", "all"])
@pytest.mark.parametrize("name", ["one weight", "three weights", "encoder"])
def test_scores(name: str, parameters: Any) -> None:
    """One backward per sample gives the same."""
    scores = compare(made(name), IMAGES[:3], parameters=parameters)
    ends = {
        "one weight": "in_proj_weight",
        "three weights": "v_proj_weight",
        "encoder": "layers.1.self_attn.in_proj_weight",
    }
    assert any(key.endswith(ends[name]) for key in scores.sums)
    assert any(key.endswith("out_proj.weight") for key in scores.sums)
    assert any(key.endswith("in_proj_bias") for key in scores.sums) == (parameters == "all")


@pytest.mark.parametrize(
    "how", [{"sparsity": 0.6}, {"pattern": "1:4"}, {"sparsity": 0.5, "scope": "layer", "steps": 2}]
)
@pytest.mark.parametrize("name", ["one weight", "three weights", "encoder"])
def test_all_weights_are_pruned(name: str, how: dict[str, Any]) -> None:
    result = jbrprune.sparsify(made(name), IMAGES, progress=False, **how)
    weights = {key: slot.stored for key, slot in weights_of(result.model).items()}
    assert len(weights) == {"one weight": 5, "three weights": 7, "encoder": 10}[name]
    rows = {row.name: (row.before, row.after) for row in result.report.layers}
    for key, weight in weights.items():
        assert rows[key.removesuffix(".weight")] == (weight.numel(), int((weight != 0).sum()))
        if "pattern" in how and weight.dim() == 2:
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 1).all()
    zeros, total = (sum(f(w) for w in weights.values()) for f in (lambda w: int((w == 0).sum()), torch.numel))
    if "sparsity" in how:
        assert abs(zeros - how["sparsity"] * total) <= len(weights)
    assert not torch_prune.is_pruned(result.model)


def _attend(model: Attending, x: Tensor) -> Tensor:
    """What `Attending` computes, written out, with the masked weights multiplied here."""

    def masked(module: nn.Module, name: str) -> Tensor:
        return module.get_parameter(f"{name}_orig") * module.get_buffer(f"{name}_mask")

    attention = model.attention
    tokens = F.conv2d(x, masked(model.tokens, "weight"), model.tokens.bias, 4).flatten(2).transpose(1, 2)
    q, k, v = (tokens @ masked(attention, "in_proj_weight").T + attention.in_proj_bias).chunk(3, -1)
    heads = [((q[..., part] @ k[..., part].mT) / 2).softmax(-1) @ v[..., part] for part in (slice(0, 4), slice(4, 8))]
    projected = torch.cat(heads, -1) @ masked(attention.out_proj, "weight").T + attention.out_proj.bias
    return F.linear(tokens + projected, masked(model.head, "weight"), model.head.bias).mean(1)


def test_masked_attention_computes_with_the_masked_weights() -> None:
    """In training, and in the fused path of inference, also after the values under the masks have changed."""
    model = made("one weight")
    generator = torch.Generator().manual_seed(0)
    masks = {key: torch.rand(slot.stored.shape, generator=generator) < 0.5 for key, slot in weights_of(model).items()}
    put_masks(model, masks)
    assert isinstance(model, Attending)
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(3):
        optimiser.zero_grad()
        outputs = model.train()(IMAGES)
        torch.testing.assert_close(outputs, _attend(model, IMAGES))
        outputs.square().mean().backward()
        gradient = model.attention.out_proj.get_parameter("weight_orig").grad
        assert gradient is not None
        assert (gradient[model.attention.out_proj.get_buffer("weight_mask") == 0] == 0).all()
        assert gradient.any()
        optimiser.step()
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(IMAGES), _attend(model, IMAGES))


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_masks_hold_whoever_reads_a_weight(name: str, tmp_path: Path) -> None:
    """Saved, loaded, changed under the masks, and made permanent: always the same function."""
    model = jbrprune.sparsify(made(name), IMAGES, sparsity=0.6, permanent=False, progress=False).model
    save(model, tmp_path / "m", size=(3, 16, 16))
    loaded = load(tmp_path / "m", model=made(name))
    assert masks_of(loaded).keys() == masks_of(model).keys()
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    for key, parameter in loaded.named_parameters():
        parameter.add_(1.0 if key.endswith("_orig") else 0.0)
    outputs = loaded(IMAGES)
    assert not torch.allclose(outputs, model(IMAGES))
    permanent = make_permanent(loaded)
    torch.testing.assert_close(permanent(IMAGES), outputs)
    assert not any(module._forward_pre_hooks for module in permanent.modules())
