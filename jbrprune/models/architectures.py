"""Every fact about timm classes that pruning needs, as data: heads, classifiers, attributes to set afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from timm.layers.attention import Attention
from torch import nn

from jbrprune.errors import ModelError


@dataclass(frozen=True)
class AttentionLayout:
    """How an attention class lays out its heads.

    Attributes:
        producers: Linear submodules whose output rows are ``[blocks, heads, head_dim]``, and their blocks.
        consumer: Linear submodule whose input columns are ``[heads, head_dim]``.
        heads: Attribute that holds the number of heads.
        widths: Attributes that hold heads * head_dim.
        mixed: Submodules that mix the heads unless they are `nn.Identity`: heads cannot go then.
    """

    producers: tuple[tuple[str, int], ...]
    consumer: str
    heads: str
    widths: tuple[str, ...]
    mixed: tuple[str, ...]


# Exact classes: a subclass may have another forward.
ATTENTION: dict[type[nn.Module], AttentionLayout] = {
    Attention: AttentionLayout((("qkv", 3), ("gate", 1)), "proj", "num_heads", ("attn_dim",), ("norm",)),
}


@dataclass(frozen=True)
class Heads:
    """The heads of one attention module: qualified names and sizes."""

    name: str
    producers: tuple[tuple[str, int], ...]
    consumer: str
    count: int
    head_dim: int


def attention_heads(model: nn.Module) -> Iterator[Heads]:
    """Attention modules whose whole heads can be removed."""
    for name, module in model.named_modules():
        layout = ATTENTION.get(type(module))
        if layout is None or any(type(getattr(module, part)) is not nn.Identity for part in layout.mixed):
            continue
        prefix = f"{name}." if name else ""
        present = tuple((prefix + p, blocks) for p, blocks in layout.producers if getattr(module, p) is not None)
        count = getattr(module, layout.heads)
        consumer = module.get_submodule(layout.consumer)
        yield Heads(name, present, prefix + layout.consumer, count, consumer.in_features // count)  # type: ignore[operator]


def heads_of(module: nn.Module) -> int:
    """Number of heads of an attention module."""
    return getattr(module, ATTENTION[type(module)].heads)


def set_heads(module: nn.Module, count: int) -> None:
    """Tell an attention module how many heads are left; the size of a head stays."""
    layout = ATTENTION[type(module)]
    head_dim = getattr(module, layout.widths[0]) // getattr(module, layout.heads)
    setattr(module, layout.heads, count)
    for width in layout.widths:
        setattr(module, width, count * head_dim)


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """Qualified names of the layers whose outputs are the logits, as far as the model tells."""
    if not hasattr(model, "get_classifier"):
        return ()
    heads = model.get_classifier()  # type: ignore[operator]
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[head] for head in heads if head in names)


# Widths that timm models keep beside their layers; `reset_classifier` builds from them.
FEATURE_WIDTHS = ("num_features", "head_hidden_size")
TOKEN_WIDTHS = ("embed_dim",)


def update_widths(model: nn.Module, before: int | None, tokens: dict[int, int]) -> None:
    """Correct the widths that a timm model keeps of itself after pruning.

    Args:
        model: The pruned model.
        before: Input width of the classifier before pruning, or None where there is no single one.
        tokens: Width of the residual stream before -> after, where it was pruned.
    """
    names = classifiers(model)
    if names and before is not None:
        after = model.get_submodule(names[0]).in_features if _is_linear(model, names[0]) else before
        for attribute in FEATURE_WIDTHS:
            if getattr(model, attribute, None) == before:
                setattr(model, attribute, after)
    for attribute in TOKEN_WIDTHS:
        width = getattr(model, attribute, None)
        if isinstance(width, int) and width in tokens:
            setattr(model, attribute, tokens[width])


def classifier_width(model: nn.Module) -> int | None:
    """Input width of the classifier, if it is a Linear layer."""
    names = classifiers(model)
    return model.get_submodule(names[0]).in_features if names and _is_linear(model, names[0]) else None  # type: ignore[return-value]


def refuse_masked(model: nn.Module) -> None:
    """Refuse a model that `torch.nn.utils.prune` has wrapped.

    Raises:
        ModelError: Names the parameters.
    """
    masked = [name.removesuffix("_mask") for name, _ in model.named_buffers() if name.endswith("_mask")]
    masked = [name for name in masked if f"{name}_orig" in dict(model.named_parameters())]
    if masked:
        raise ModelError(
            f"{masked[0]} (and {len(masked) - 1} more) is masked by torch.nn.utils.prune; such a model cannot be "
            "copied or shrunk. Make the masks permanent first: torch.nn.utils.prune.remove(module, name)."
        )


def _is_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear)
