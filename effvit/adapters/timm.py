"""timm's Vision Transformers, from version 1.0 on: ``VisionTransformer`` and what extends it, such as its DeiT."""

from collections.abc import Iterator
from functools import partial
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from effvit.adapters.host import Host, Site, Tower, comes_from, join, refuse, require_scale
from effvit.adapters.maps import rows_of
from effvit.adapters.signature import Adapted, adapt
from effvit.attention import Attention, attention_class, build_attention, check_options, check_value_conv
from effvit.attention.base import Grid
from effvit.errors import UserError
from effvit.kernels.layers import apply_linear

_NORMS = ("q_norm", "k_norm", "norm")  # in timm's Attention; the last one in newer versions


class MapProbe(nn.Dropout):
    """Passes the attention map through as it is: hooks find it here. The mechanism applies the probability ``p``."""

    def forward(self, input: Tensor) -> Tensor:
        """The map ``(B, H, N, N)``."""
        return input


class ForTimm(Adapted):
    """timm's ``Attention``: norms of queries and keys by head, and of the heads' outputs."""

    q_norm: nn.Module
    k_norm: nn.Module
    norm: nn.Module

    def forward(  # type: ignore[override]
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, return_map: bool = False
    ) -> Any:
        """Tokens ``(B, N, C)`` to tokens; with ``return_map`` a pair of those and the map ``(B, H, N, N)``."""
        if not isinstance(attn_mask, Proxy) and (attn_mask is not None or is_causal):  # torch.fx gives all arguments
            raise UserError("attention: got a mask; the mechanisms let all tokens attend to all")
        probe: Any = self.attn_drop  # a MapProbe here, where a mechanism has a number
        if return_map or not (probe._forward_hooks or probe._forward_pre_hooks):
            return super().forward(x, return_map)
        y, attention_map = super().forward(x, True)
        probe(attention_map)
        return y

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, *rest = super().project(x)
        return self.q_norm(q), self.k_norm(k), *rest

    @property
    def maps_meet_features(self) -> bool:
        """Whether no norm stands between the maps and Performer's features."""
        return isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity)

    def merge(self, y: Tensor) -> Tensor:
        return self.proj_drop(apply_linear(self.proj, self.norm(y.transpose(1, 2).flatten(2))))

    @property
    def dropout_p(self) -> float:
        probe: Any = self.attn_drop
        return probe.p if self.training else 0.0

    def init_weights(self) -> None:
        """What timm calls after it has initialised all layers."""
        self.reset_mechanism()
        self.reset_value_conv()

    reset_parameters = init_weights


def towers(model: nn.Module) -> Iterator[Tower]:
    """timm's Vision Transformers in a model."""
    for name, module in model.named_modules():
        if comes_from(module, "timm", "VisionTransformer"):
            yield _tower(name, module)


def _tower(name: str, model: Any) -> Tower:
    grid = getattr(model.patch_embed, "grid_size", None)
    dropping = type(getattr(model, "patch_drop", None)).__name__ == "PatchDropout"
    tower = Tower(
        name,
        f"timm's {type(model).__name__}",
        model,
        None if grid is None else (grid[0], grid[1]),
        model.num_prefix_tokens,
        any_size=bool(getattr(model, "dynamic_img_size", False)),
        drops_patches="patch_drop" if dropping else None,
    )
    for block, layer in enumerate(model.blocks):
        where = join(name, f"blocks.{block}")
        found = [
            Site(join(where, inside), block, partial(_host, join(where, inside), module, block))
            for inside, module in layer.named_modules()
            if isinstance(module, Attention) or (inside and "Attention" in type(module).__name__)
        ]
        tower.sites.extend(found or [Site(where, block, partial(_refuse, where, layer))])
    return tower


def _refuse(name: str, block: nn.Module) -> Host:
    raise refuse(name, block, "its attention is no module of its own")


def _host(name: str, module: Any, block: int) -> Host:
    if isinstance(module, ForTimm):
        rows = rows_of(module)
    elif not _is_timms(module):
        raise refuse(name, module, "is another attention than timm's Attention; its weights mean something else")
    elif getattr(module, "gate", None) is not None:
        raise refuse(name, module, "gates the output of attention, which the mechanisms do not")
    else:
        require_scale(name, module, module.scale, module.head_dim)
        rows = {"qkv.": module.qkv}
    p = getattr(module.attn_drop, "p", 0.0)

    def finish(attention: Attention) -> None:
        probe = MapProbe(p)
        for kind in ("_forward_hooks", "_forward_pre_hooks"):
            setattr(probe, kind, getattr(module.attn_drop, kind))
        _under_timms_signature(
            attention, probe, {part: getattr(module, part) for part in _NORMS if hasattr(module, part)}
        )
        attention.proj_drop = module.proj_drop

    return Host(name, module, block, module.num_heads, rows, ("proj.", module.proj), p, finish)


def _is_timms(module: nn.Module) -> bool:
    cls = type(module)
    return cls.__name__ == "Attention" and cls.__module__ in ("timm.layers.attention", "timm.models.vision_transformer")


def _under_timms_signature(attention: Attention, probe: MapProbe, norms: dict[str, nn.Module]) -> None:
    adapted = adapt(attention, ForTimm)
    del adapted.attn_drop
    adapted.add_module("attn_drop", probe)
    for name in _NORMS:
        setattr(adapted, name, norms.get(name) or nn.Identity())


def timm_layer(
    name: str,
    *,
    grid_size: Grid | None = None,
    prefix_tokens: int = 1,
    depth: int = 1,
    value_conv: int = 0,
    **options: Any,
) -> type:
    """Return a class for timm's ``attn_layer=``, of a mechanism with these options.

    Args:
        name: one of ``available_attention()``.
        grid_size: rows and columns of patches, which timm does not pass to a layer; not needed by mechanisms that take
            any number of tokens.
        prefix_tokens: tokens before the patches.
        depth: blocks of the model, for mechanisms that differ from block to block or share weights between blocks.
        value_conv: side of a depthwise convolution of the patches' values that is added to what is mixed; odd, 0 none.
        **options: the mechanism's own options.

    Raises:
        UserError: unknown mechanism or option, one that does not fit, or a grid that is needed and not given.
    """
    mechanism = attention_class(name)
    _require_place(grid_size, prefix_tokens, depth)
    if depth == 1 and options.get("share") == "layers":
        raise UserError("timm_layer: share='layers' needs depth=, the model's number of blocks")
    if grid_size is None:
        if mechanism.needs_grid or mechanism.fixed_length or value_conv:
            what = "value_conv" if value_conv else name
            raise UserError(f"timm_layer: {what} needs grid_size=(rows, columns), the model's grid of patches")
        grid_size = (1, 1)
    check_value_conv(value_conv)
    check_options(name, options, grid_size, prefix_tokens)
    place = {"grid_size": grid_size, "prefix_tokens": prefix_tokens, "depth": depth, "value_conv": value_conv}
    made = count()
    first: list[Attention] = []

    def new(cls: type, dim: int, num_heads: int = 8, **arguments: Any) -> nn.Module:
        layer = next(made) % depth
        attention = _built(arguments, name=name, dim=dim, num_heads=num_heads, layer=layer, **place, **options)
        if layer == 0:
            first[:] = [attention]
        attention.share_with(first[0])
        return attention

    return type(f"{mechanism.__name__}Layer", (), {"__new__": new, "__doc__": f"{name} as timm's attention."})


def _require_place(grid_size: Any, prefix_tokens: Any, depth: Any) -> None:
    """Raise ``UserError`` where these are not what they should be."""
    if not _is_count(depth, 1):
        raise UserError(f"timm_layer: depth={depth!r}: expected the model's number of blocks")
    if not _is_count(prefix_tokens, 0):
        raise UserError(f"timm_layer: prefix_tokens={prefix_tokens!r}: expected a whole number from 0")
    pair = isinstance(grid_size, tuple | list) and len(grid_size) == 2 and all(_is_count(side, 1) for side in grid_size)
    if grid_size is not None and not pair:
        raise UserError(f"timm_layer: grid_size={grid_size!r}: expected (rows, columns), each at least 1")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _built(arguments: dict[str, Any], **build: Any) -> Attention:
    """A mechanism from what timm gives an attention layer."""
    defaults: dict[str, Any] = {"qkv_bias": False, "proj_bias": True, "qk_norm": False, "scale_norm": False}
    defaults |= {"attn_drop": 0.0, "proj_drop": 0.0, "norm_layer": None, "device": None, "dtype": None}
    if wrong := [key for key, value in arguments.items() if key not in defaults and value]:
        raise UserError(f"timm_layer: got {', '.join(wrong)}, which the mechanisms have not")
    given = defaults | arguments
    attention = build_attention(qkv_bias=given["qkv_bias"], proj_drop=given["proj_drop"], **build)
    if not given["proj_bias"]:
        attention.proj = nn.Linear(attention.dim, attention.dim, bias=False)
    heads = attention.head_dim if given["qk_norm"] else 0
    sizes = {"q_norm": heads, "k_norm": heads, "norm": attention.dim if given["scale_norm"] else 0}
    norms = {part: given["norm_layer"](size) for part, size in sizes.items() if size}
    _under_timms_signature(attention, MapProbe(given["attn_drop"]), norms)
    return attention.to(device=given["device"], dtype=given["dtype"])
