"""Another attention in a Vision Transformer, in place and with its weights."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effvit.adapters import own, timm, torchvision, transformers
from effvit.adapters.host import Host, Tower, refuse
from effvit.adapters.maps import has_bias, take_maps, width
from effvit.adapters.refused import nothing_known
from effvit.adapters.report import SwappedLayer, SwapReport, pattern
from effvit.adapters.signature import mechanism_of
from effvit.attention import Attention, attention_class, build_attention, check_options, check_value_conv
from effvit.errors import UserError
from effvit.model.resize import carry_own_weights
from effvit.model.vit import ViT

_FAMILIES = (own, timm, transformers, torchvision)
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def swap_attention(
    model: nn.Module, name: str, *, layers: Iterable[int] | None = None, value_conv: int = 0, **options: Any
) -> SwapReport:
    """Put a mechanism into the blocks of a Vision Transformer, in place.

    The model is, or contains, one of timm, transformers (ViT, DeiT, DINOv2, and the vision towers of CLIP and
    SigLIP), torchvision's or effvit's. The maps to queries, keys, values and output are kept, as well as everything
    around attention; what the mechanism has beyond that starts fresh. Where blocks have the mechanism already, that is
    kept too, and interpolated where the grid of patches has changed since.

    Args:
        model: the model.
        name: one of ``available_attention()``.
        layers: indices of the blocks, from 0, negative ones from the end; all by default.
        value_conv: side of a depthwise convolution of the patches' values that is added to what is mixed; odd, 0 none.
        **options: the mechanism's own options.

    Returns:
        What was kept, is new, and is unused.

    Raises:
        UserError: unknown mechanism or option, or one that does not fit the grid of patches; no attention that is
            known; or something about it that the mechanism cannot honour. The model is then as it was.
    """
    attention_class(name)
    check_value_conv(value_conv)
    found = _towers(model)
    chosen = None if layers is None else _indices(layers)
    swaps = [(tower, _swapped(tower, name, _blocks(tower, chosen), options, value_conv)) for tower in found]
    new = {id(host.module): attention for _, swapped in swaps for host, attention, _ in swapped}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]
    for tower in found:
        if isinstance(tower.module, ViT):
            _describe(tower.module, name, options, value_conv)
    notes = [note for tower in found for note in _notes(tower, name, value_conv)]
    return SwapReport(
        name,
        [_place(tower, [host for host, _, _ in swapped]) for tower, swapped in swaps],
        [layer for _, swapped in swaps for _, _, layer in swapped],
        list(dict.fromkeys(notes)),
    )


def _towers(model: nn.Module) -> list[Tower]:
    if not isinstance(model, nn.Module):
        raise UserError(f"swap_attention: got a {type(model).__name__}, expected a torch.nn.Module")
    for module in model.modules():
        if wrapper := next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None):
            raise UserError(f"swap_attention: the model is inside {wrapper}; swap attention first, then wrap it")
    found = find_towers(model)
    if not found:
        raise nothing_known(model)
    return found


def find_towers(model: nn.Module) -> list[Tower]:
    """Vision Transformers in a model that are known, with attention in them."""
    return [tower for family in _FAMILIES for tower in family.towers(model) if tower.sites]


def _indices(layers: Iterable[int]) -> list[int]:
    chosen: list[Any]
    try:
        chosen = list(layers)
    except TypeError:
        chosen = [None]
    if any(type(layer) is not int for layer in chosen):
        raise UserError(f"layers={layers!r}: expected indices of blocks, for example [0, 1] or range(6, 12)")
    return chosen


def _blocks(tower: Tower, layers: list[int] | None) -> set[int]:
    if layers is None:
        return set(range(tower.depth))
    if not layers or any(not -tower.depth <= layer < tower.depth for layer in layers):
        raise UserError(f"layers={layers}: expected some of 0 to {tower.depth - 1}, the blocks of {tower.what}")
    return {layer % tower.depth for layer in layers}


def _swapped(
    tower: Tower, name: str, blocks: set[int], options: dict[str, Any], value_conv: int
) -> list[tuple[Host, Attention, SwappedLayer]]:
    """Mechanisms for the chosen blocks, complete and not yet in the model."""
    _require_fit(tower, name, options, value_conv)
    swapped = []
    for site in tower.sites:
        if site.block in blocks:
            host = site.read()
            swapped.append((host, *_in_place_of(host, tower, name, options, value_conv)))
            swapped[-1][1].share_with(swapped[0][1])
    return swapped


def _require_fit(tower: Tower, name: str, options: dict[str, Any], value_conv: int) -> None:
    """Raise ``UserError`` where the options do not fit the grid, or the mechanism not the model's tokens."""
    check_options(name, options, tower.grid_size, tower.prefix_tokens)
    if not _needs_all_patches(name, value_conv):
        return
    what = "value_conv" if value_conv else name
    if tower.grid_size is None:
        raise refuse(tower.name, tower.module, f"has no fixed grid of patches, which {what} needs")
    if tower.drops_patches:
        raise refuse(tower.name, tower.module, f"{tower.drops_patches} leaves out patches; {what} needs all of them")


def _needs_all_patches(name: str, value_conv: int) -> bool:
    mechanism = attention_class(name)
    return mechanism.needs_grid or mechanism.fixed_length or value_conv > 0


def _in_place_of(
    host: Host, tower: Tower, name: str, options: dict[str, Any], value_conv: int
) -> tuple[Attention, SwappedLayer]:
    _require_own_forward(host)
    dim, qkv_bias = width(host, attention_class(name)), has_bias(host)
    like = next(host.module.parameters())
    with torch.device(like.device):
        attention = build_attention(
            name,
            dim,
            host.num_heads,
            tower.grid_size or (1, 1),
            prefix_tokens=tower.prefix_tokens,
            layer=host.block,
            depth=tower.depth,
            qkv_bias=qkv_bias,
            attn_drop=host.attn_drop,
            value_conv=value_conv,
            **options,
        )
    _to_place_of(like, attention)
    origins = take_maps(attention, host)
    if isinstance(host.module, Attention):
        same = mechanism_of(host.module) is type(attention)
        carried = carry_own_weights(host.module, attention, () if same else ("value_conv.",))
        origins |= {each: each for each in carried if each not in origins}
    unfinished = set(attention.state_dict())
    host.finish(attention)
    _keep_hooks_and_mode(attention, host)
    kept = origins | {each: each for each in attention.state_dict() if each not in unfinished}
    used = {name for origin in kept.values() for name in origin.split(", ")}
    new = [each for each in attention.state_dict() if each not in kept]
    unused = [each for each in host.module.state_dict() if each not in used]
    trained = dict(attention.named_parameters())
    return attention, SwappedLayer(host.name, kept, new, unused, [each for each in new if each not in trained])


def _keep_hooks_and_mode(attention: Attention, host: Host) -> None:
    for kind in _HOOKS:
        setattr(attention, kind, getattr(host.module, kind))
    kept = set(host.module.modules())
    for module in attention.modules():
        if module not in kept:
            module.training = host.module.training


def _to_place_of(like: Tensor, attention: Attention) -> None:
    """Bring a mechanism to the device and precision of the weights whose place it takes."""
    if like.device.type != "meta":  # where tables keep their values
        attention.to(like.device)
    if like.is_floating_point():
        for parameter in attention.parameters():  # tables, such as Performer's features, keep their precision
            parameter.data = parameter.data.to(like.dtype)


def _require_own_forward(host: Host) -> None:
    replaced = host.module.__dict__.get("forward")
    if replaced is not None and getattr(replaced, "__func__", None) is not type(host.module).forward:
        raise refuse(host.name, host.module, "its forward was replaced on the object; swap attention first")


def _place(tower: Tower, hosts: list[Host]) -> str:
    blocks = len({host.block for host in hosts})
    place = f"{blocks} of {tower.depth} blocks of {tower.what} ({pattern(host.name for host in hosts)})"
    if tower.grid_size is None:
        return place
    rows, columns = tower.grid_size
    plural = "" if tower.prefix_tokens == 1 else "s"
    return f"{place}: {tower.prefix_tokens} prefix token{plural}, {rows} x {columns} patches"


def _notes(tower: Tower, name: str, value_conv: int) -> Iterator[str]:
    mechanism = attention_class(name)
    if tower.any_size and tower.grid_size and _needs_all_patches(name, value_conv):
        yield "the model takes images of any size, {} those of {} x {} patches alone".format(name, *tower.grid_size)
    if isinstance(tower.module, ViT):
        if own.is_mixed(tower.module):
            yield "blocks differ in attention, which a model directory cannot say: save_model refuses"
    elif mechanism.after_step is not Attention.after_step:
        yield "what changes while training does so where the training loop calls after_step of each block's attention"


def _describe(vit: ViT, name: str, options: dict[str, Any], value_conv: int) -> None:
    """Have effvit's configuration say which mechanism the model has, where there is one for all blocks."""
    if not own.is_mixed(vit):
        changes = {"attention": name, "attention_options": options, "value_conv": value_conv}
        vit.config = vit.config.model_copy(update=changes)
