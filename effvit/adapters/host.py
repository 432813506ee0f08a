"""What an attention module of another library has, in this package's terms.

Shapes: C width, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import isclose
from typing import Any

from torch import nn

from effvit.attention import Attention
from effvit.attention.base import Grid
from effvit.errors import UserError

Finish = Callable[[Attention], None]


def as_it_is(attention: Attention) -> None:
    """Leave the mechanism under its own signature."""


@dataclass(frozen=True)
class Host:
    """An attention module whose place a mechanism can take.

    ``rows`` are the layers whose weights, one below the other, are W_qkv ``(3C, C)``, keyed by what their parameters'
    names begin with. ``proj`` is the output map, None where it stays outside. ``finish`` gives the mechanism the
    signature that the model calls, and whatever else of the module it keeps.
    """

    name: str
    module: nn.Module
    block: int
    num_heads: int
    rows: dict[str, nn.Module]
    proj: tuple[str, nn.Module] | None
    attn_drop: float = 0.0
    finish: Finish = as_it_is


@dataclass(frozen=True)
class Site:
    """An attention module of a block. ``read`` looks into it; it raises ``UserError`` where it cannot be replaced."""

    name: str
    block: int
    read: Callable[[], Host]


@dataclass(frozen=True)
class Tower:
    """A Vision Transformer found in a model, with its attention modules in order.

    ``any_size`` says that it takes images of other sizes than the grid's; ``drops_patches`` names the part that leaves
    out patches while training.
    """

    name: str
    what: str
    module: nn.Module
    grid_size: Grid | None
    prefix_tokens: int
    sites: list[Site] = field(default_factory=list)
    any_size: bool = False
    drops_patches: str | None = None

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return 1 + max(site.block for site in self.sites)


def comes_from(module: object, library: str | tuple[str, ...], *names: str) -> bool:
    """Whether an object's class, or one that it extends, is of these names and of the library or one of several."""
    libraries = (library,) if isinstance(library, str) else library
    return any(cls.__name__ in names and cls.__module__.partition(".")[0] in libraries for cls in type(module).__mro__)


def join(*parts: str) -> str:
    """Names of a module and of what is in it, as in a state dict."""
    return ".".join(part for part in parts if part)


def refuse(where: str, module: nn.Module, why: str) -> UserError:
    """Return the one line for an attention whose place cannot be taken."""
    return UserError(f"{where or 'the model'} ({type(module).__name__}): {why}")


def require_scale(where: str, module: nn.Module, scale: Any, head_dim: int) -> None:
    """Raise ``UserError`` where scores are not scaled by 1 / √d."""
    if not (isinstance(scale, float | int) and isclose(scale, head_dim**-0.5, rel_tol=1e-6)):
        raise refuse(where, module, f"scales scores by {scale}; mechanisms here scale them by 1 / √{head_dim}")
