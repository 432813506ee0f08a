"""The shape of a ViT as its weights tell it, and what of other ViTs this one cannot be."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from effvit.attention.base import Grid
from effvit.errors import UserError
from effvit.model.names import StateDict

_FOREIGN = {
    "dist_token": "a distillation token",
    "head_dist": "a distillation head",
    "distillation_classifier": "a distillation head",
    "fc_norm": "a norm after average pooling",
    "norm_pre": "a norm before the blocks",
    "attn_pool": "attention pooling",
    "pre_logits": "a layer before the head",
    "ls1": "layer scale",
    "gamma_1": "layer scale",
    "layer_scale1": "layer scale",
    "q_norm": "normed queries",
    "relative_position_bias_table": "relative positions",
}


@dataclass(frozen=True)
class Shape:
    """Sizes in the names of `ViTConfig`; ``embeds_prefix`` is false where positions are of the patches alone."""

    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    patch_size: int
    num_channels: int
    prefix_tokens: int
    qkv_bias: bool
    num_classes: int | None
    grid: Grid
    embeds_prefix: bool

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width of images in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size


def refuse_foreign(names: Iterable[str]) -> None:
    """Raise ``UserError`` where names tell of parts that this ViT does not have."""
    if foreign := {_FOREIGN[part] for name in names for part in name.split(".") if part in _FOREIGN}:
        raise UserError(f"has {', '.join(sorted(foreign))}, which this ViT lacks; expected a plain ViT")


def read_shape(weights: StateDict, image_shapes: Iterable[tuple[int, int]] = ()) -> Shape:
    """Read the sizes of a ViT from its weights under this ViT's names.

    Weights tell how many patches there are, not how they lie: the first of ``image_shapes``, in pixels, with as many is
    taken, else a square.

    Raises:
        UserError: they are not of a ViT, or of one with other parts.
    """
    try:
        hidden_size, num_channels, patch_size, patch_width = weights["patch_embed.proj.weight"].shape
        _, positions, _ = weights["pos_embed"].shape
        intermediate_size, _ = weights["blocks.0.mlp.fc1.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"not the weights of a ViT ({_what(error)})") from error
    if patch_size != patch_width:
        raise UserError(f"patches of {patch_size} x {patch_width} pixels; expected square ones")
    prefix_tokens = _prefix_tokens(weights)
    guesses = [(height // patch_size, width // patch_size) for height, width in image_shapes]
    grid, embeds_prefix = _grid(positions, prefix_tokens, guesses)
    return Shape(
        hidden_size=hidden_size,
        num_hidden_layers=len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        intermediate_size=intermediate_size,
        patch_size=patch_size,
        num_channels=num_channels,
        prefix_tokens=prefix_tokens,
        qkv_bias=any(name.endswith((".attn.qkv.bias", ".query.bias")) for name in weights),
        num_classes=len(weights["head.weight"]) if "head.weight" in weights else None,
        grid=grid,
        embeds_prefix=embeds_prefix,
    )


def positions_of_all_tokens(positions: Tensor, shape: Shape) -> Tensor:
    """Position embeddings ``(1, S + P, C)``; where weights have those of patches alone, zeros come before them."""
    if shape.embeds_prefix:
        return positions
    return torch.cat([positions.new_zeros(1, shape.prefix_tokens, shape.hidden_size), positions], dim=1)


def _prefix_tokens(weights: StateDict) -> int:
    registers = weights["reg_token"].shape[1] if "reg_token" in weights else 0
    if registers and "cls_token" not in weights:
        raise UserError("has registers without a class token, which this ViT cannot have")
    return registers + ("cls_token" in weights)


def _grid(positions: int, prefix_tokens: int, guesses: list[Grid]) -> tuple[Grid, bool]:
    counts = {True: positions - prefix_tokens, False: positions}
    for embeds_prefix, patches in counts.items():
        for rows, columns in guesses:
            if rows * columns == patches:
                return (rows, columns), embeds_prefix
    for embeds_prefix, patches in counts.items():
        side = isqrt(max(0, patches))
        if side >= 1 and side**2 == patches:
            return (side, side), embeds_prefix
    raise UserError(f"pos_embed has {positions} positions; expected {prefix_tokens} prefix tokens and n x n patches")


def _what(error: Exception) -> str:
    return f"no {error.args[0]}" if isinstance(error, KeyError) else "shapes that no ViT has"
