"""Weights that belong to one grid of patches, carried over to another."""

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from effvit.attention.base import Attention, Grid
from effvit.errors import UserError, explain
from effvit.model.vit import ViT, ViTConfig


def resize(model: ViT, image_size: int | tuple[int, int]) -> ViT:
    """Change a model, in place, to images of another size; return it.

    Position embeddings and Linformer's projections are interpolated, as parameters of their own: an optimizer is to be
    made anew. All other weights stay what they are.

    Args:
        model: a model of effvit's.
        image_size: in pixels, one number or height and width; the patch size must divide it.

    Raises:
        UserError: the patch size does not divide the image size, or an option of attention does not fit the new grid.
            The model is then as it was.
    """
    if not isinstance(model, ViT):
        raise UserError(
            f"resize: got a {type(model).__name__}, expected effvit's ViT; resize a model of another library "
            "by its own means, then call swap_attention again"
        )
    try:
        config = ViTConfig(**(model.config.model_dump() | {"image_size": image_size}))
    except ValidationError as error:
        raise UserError(explain(error)) from error
    old_grid = model.config.grid_size
    attentions = [_on_grid(attention, config.grid_size) for attention in model.attentions()]
    for attention in attentions:
        attention.share_with(attentions[0])
    positions = resize_positions(model.pos_embed.detach(), old_grid, config.grid_size, config.prefix_tokens)
    model.pos_embed = nn.Parameter(positions.to(model.pos_embed.dtype), model.pos_embed.requires_grad)
    for old, new in zip(model.attentions(), attentions, strict=True):  # the objects stay, with what hooks they have
        old.__dict__.update({key: value for key, value in new.__dict__.items() if "hook" not in key})
    model.config = config
    return model


def _on_grid(old: Attention, grid_size: Grid) -> Attention:
    """The same mechanism on another grid, with the weights of ``old``."""
    new = type(old)(
        old.dim,
        old.num_heads,
        grid_size,
        old.options,
        prefix_tokens=old.prefix_tokens,
        layer=old.layer,
        depth=old.depth,
        attn_drop=old.attn_drop,
        value_conv=old.value_conv_size,
    )
    new.to(next(old.parameters()).device)
    new._modules.update(old._modules)
    carry_own_weights(old, new)
    return new.train(old.training)


def carry_own_weights(old: Attention, new: Attention, only: tuple[str, ...] = ()) -> list[str]:
    """Give a mechanism what another of its kind has been trained to, as far as shapes allow; return the names.

    Weights of one shape are the same objects then; those that belong to a number of tokens are interpolated. With
    ``only``, those whose names begin so.
    """
    places = dict(new.named_modules())
    stored = new.state_dict()
    carried = []
    made: dict[int, Tensor] = {}  # one for a weight under two names
    for name, tensor in (*old.named_parameters(remove_duplicate=False), *old.named_buffers()):
        if name not in stored or (only and not name.startswith(only)):
            continue
        fitting = made.get(id(tensor), _fitting(name, tensor, stored[name], old, new))
        if fitting is not None:
            made[id(tensor)] = fitting
            place, _, key = name.rpartition(".")
            setattr(places[place], key, fitting)
            carried.append(name)
    return carried


def _fitting(name: str, tensor: Tensor, target: Tensor, old: Attention, new: Attention) -> Tensor | None:
    """A weight in the shape of ``target``: itself, or interpolated to another grid; None where it cannot be."""
    of_tokens = old.fixed_length and "." not in name and tensor.shape[-1] == old.num_tokens
    if not of_tokens or old.grid_size == new.grid_size:
        return tensor if tensor.shape == target.shape else None
    if target.shape != (*tensor.shape[:-1], new.num_tokens):
        return None
    resized = resize_projection(tensor.detach().float(), old.grid_size, new.grid_size, old.prefix_tokens)
    return nn.Parameter(resized.to(tensor.dtype), tensor.requires_grad)


def resize_positions(positions: Tensor, old_grid: Grid, new_grid: Grid, prefix_tokens: int = 1) -> Tensor:
    """Position embeddings ``(1, S + P, C)`` of one grid of patches to ``(1, S + P', C)`` of another.

    Bicubic with antialiasing, as timm does it; those of the S prefix tokens are kept.
    """
    prefix, patches = positions.float().split([prefix_tokens, positions.shape[1] - prefix_tokens], dim=1)
    patches = patches.unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, C, gh, gw)
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", antialias=True)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)


def resize_projection(projection: Tensor, old_grid: Grid, new_grid: Grid, prefix_tokens: int = 1) -> Tensor:
    """Carry E or F ``(..., k, N_old)`` over to another grid of patches: ``(..., k, N_new)``.

    The patch part of each row is an image of the old grid, interpolated bilinearly; the prefix tokens' columns are
    kept; all is scaled by N_old / N_new, so that rows of E x keep their scale.

    Raises:
        UserError: the projection is not of that many tokens.
    """
    n_old, n_new = (prefix_tokens + grid[0] * grid[1] for grid in (old_grid, new_grid))
    if projection.shape[-1] != n_old:
        raise UserError(f"projection of {projection.shape[-1]} tokens: a grid of {old_grid} has {n_old}")
    prefix, patches = projection.flatten(0, -2).split([prefix_tokens, n_old - prefix_tokens], dim=-1)
    patches = F.interpolate(patches.unflatten(1, (1, *old_grid)), size=new_grid, mode="bilinear", align_corners=False)
    resized = torch.cat([prefix, patches.flatten(1)], dim=1) * (n_old / n_new)
    return resized.view(*projection.shape[:-1], n_new)
