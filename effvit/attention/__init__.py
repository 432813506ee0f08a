"""Attention mechanisms, one a file: a file here that registers a class is a mechanism, named after the file.

A mechanism's file is imported only when that mechanism is used.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from effvit.attention.base import Attention, AttentionOptions, Grid, registered
from effvit.errors import UserError, did_you_mean, explain

__all__ = ["Attention", "attention_class", "available_attention", "build_attention", "check_options"]

BASELINE = "fused"
# Of tables and legends.
_ORDER = (
    *("standard", "fused", "linformer", "performer", "nystromformer", "hybrid"),
    *("linear", "focused", "agent", "pooled", "window", "uniform"),
)
MOST_VALUE_CONV = 63
_NOT_MECHANISMS = {"__init__", "base"}


def available_attention() -> tuple[str, ...]:
    """Names of all mechanisms."""
    names = {path.stem for path in Path(__file__).parent.glob("*.py")} - _NOT_MECHANISMS
    return tuple(sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)))


def attention_class(name: str) -> type[Attention]:
    """Return the mechanism called ``name``.

    Raises:
        UserError: there is none of that name.
    """
    known = available_attention()
    if name not in known:
        hint = did_you_mean(name, known) if isinstance(name, str) else ""
        raise UserError(f"attention={name!r}: unknown mechanism, expected one of {', '.join(known)}{hint}")
    import_module(f"effvit.attention.{name}")
    return registered(name)


def check_options(
    name: str, options: dict[str, Any], grid_size: Grid | None = None, prefix_tokens: int = 1
) -> AttentionOptions:
    """Validate the options of a mechanism, and that they fit a grid of patches where one is given.

    Raises:
        UserError: an option is unknown, of the wrong type, out of range or does not fit the grid.
    """
    kind = attention_class(name).Options
    try:
        checked = kind(**options)
    except ValidationError as error:
        raise UserError(explain(error, f"attention.{name}", kind)) from error
    if grid_size is not None:
        checked.check_grid(grid_size, prefix_tokens)
    return checked


def check_value_conv(side: int) -> None:
    """Raise ``UserError`` where that is no side of a kernel."""
    if type(side) is not int or side < 0 or (side and side % 2 == 0) or side > MOST_VALUE_CONV:
        raise UserError(f"value_conv={side!r}: must be odd and at most {MOST_VALUE_CONV}, or 0 for no convolution")


def build_attention(
    name: str,
    dim: int,
    num_heads: int,
    grid_size: Grid,
    *,
    prefix_tokens: int = 1,
    layer: int = 0,
    depth: int = 1,
    qkv_bias: bool = True,
    attn_drop: float = 0.0,
    proj_drop: float = 0.0,
    value_conv: int = 0,
    **options: Any,
) -> Attention:
    """Build the attention module of one transformer block.

    Args:
        name: one of ``available_attention()``.
        dim: width C of the tokens.
        num_heads: heads H, dividing ``dim``.
        grid_size: rows and columns of patches; the tokens are prefix tokens and these patches, row-major.
        prefix_tokens: tokens before the patches: 0, 1 (the class token), or more (registers).
        layer: index of the block, from 0, for mechanisms that alternate.
        depth: number of blocks.
        qkv_bias: whether the query, key and value maps have a bias.
        attn_drop: dropout of attention probabilities.
        proj_drop: dropout after the output projection.
        value_conv: side of a depthwise convolution of the patches' values that is added to what is mixed; odd, 0 none.
        **options: the mechanism's own options.

    Returns:
        A module from tokens ``(B, prefix_tokens + gh*gw, C)`` to tokens of the same shape.

    Raises:
        UserError: unknown mechanism or option, or one that does not fit.
    """
    if num_heads < 1 or dim < 1 or dim % num_heads:
        raise UserError(f"num_heads={num_heads}: must divide the width {dim}")
    if min(grid_size) < 1:
        raise UserError(f"grid_size={tuple(grid_size)}: needs at least one row and one column of patches")
    if prefix_tokens < 0:
        raise UserError(f"prefix_tokens={prefix_tokens}: must be 0 or more")
    if not 0 <= layer < depth:
        raise UserError(f"layer={layer}: must be from 0 to depth - 1, with depth={depth}")
    check_value_conv(value_conv)
    checked = check_options(name, options)
    return attention_class(name)(
        dim,
        num_heads,
        (grid_size[0], grid_size[1]),
        checked,
        prefix_tokens=prefix_tokens,
        layer=layer,
        depth=depth,
        qkv_bias=qkv_bias,
        attn_drop=attn_drop,
        proj_drop=proj_drop,
        value_conv=value_conv,
    )
