"""torchvision's ``VisionTransformer``, whose attention is PyTorch's own ``nn.MultiheadAttention``."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from effvit.adapters.host import Host, Site, Tower, comes_from, join, refuse
from effvit.adapters.maps import linear_of, rows_of
from effvit.adapters.signature import Adapted, adapt
from effvit.attention import Attention
from effvit.errors import UserError


class ForTorchvision(Adapted):
    """``nn.MultiheadAttention`` with ``batch_first``, of tokens with themselves."""

    batch_first = True

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(B, N, C)`` to tokens, and the map: None, ``(B, N, N)`` as the heads' mean, or ``(B, H, N, N)``."""
        if query is not key or key is not value:
            raise UserError(
                "attention: got other keys or values than queries; the mechanisms mix tokens with themselves"
            )
        if attn_mask is not None or key_padding_mask is not None or is_causal:
            raise UserError("attention: got a mask; the mechanisms let all tokens attend to all")
        if not need_weights:
            return super().forward(query), None
        y, attention_map = super().forward(query, True)
        return y, attention_map.mean(dim=1) if average_attn_weights else attention_map


def towers(model: nn.Module) -> Iterator[Tower]:
    """torchvision's Vision Transformers in a model."""
    for name, module in model.named_modules():
        if comes_from(module, "torchvision", "VisionTransformer"):
            yield _tower(name, module)


def _tower(name: str, model: Any) -> Tower:
    side = model.image_size // model.patch_size
    tower = Tower(name, f"torchvision's {type(model).__name__}", model, (side, side), prefix_tokens=1)
    for block, (layer, module) in enumerate(model.encoder.layers.named_children()):
        where = join(name, f"encoder.layers.{layer}.self_attention")
        tower.sites.append(Site(where, block, partial(_host, where, module.self_attention, block)))
    return tower


def _host(name: str, module: Any, block: int) -> Host:
    if isinstance(module, ForTorchvision):
        rows, p, proj = rows_of(module), module.attn_drop, ("proj.", module.proj)
    else:
        _require_plain(name, module)
        rows = {"in_proj_": linear_of(module.in_proj_weight, module.in_proj_bias)}
        p, proj = module.dropout, ("out_proj.", module.out_proj)

    def finish(attention: Attention) -> None:
        adapt(attention, ForTorchvision)

    return Host(name, module, block, module.num_heads, rows, proj, p, finish)


def _require_plain(name: str, module: nn.Module) -> None:
    if type(module) is not nn.MultiheadAttention:
        raise refuse(name, module, "not PyTorch's MultiheadAttention")
    if not module.batch_first:
        raise refuse(name, module, "takes tokens before samples; expected batch_first=True")
    if module.bias_k is not None or module.add_zero_attn:
        raise refuse(name, module, "adds a key of its own (add_bias_kv, add_zero_attn), which the mechanisms have not")
    if module.in_proj_weight is None:
        raise refuse(name, module, "takes keys and values of other widths (kdim, vdim)")
