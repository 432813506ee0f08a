"""Vision Transformers of Hugging Face's transformers, versions 4.4x and 5: ViT, DeiT, DINOv2, and the vision towers of
CLIP and SigLIP.

Two forms of attention occur. In the nested one, ``ViTSelfAttention`` has ``query``, ``key`` and ``value``, and the
output map is outside, in ``ViTSelfOutput``; in the flat one, attention has ``q_proj``, ``k_proj``, ``v_proj`` and
``o_proj`` or ``out_proj``.
"""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from effvit.adapters.host import Finish, Host, Site, Tower, comes_from, join, refuse, require_scale
from effvit.adapters.maps import rows_of
from effvit.adapters.signature import Adapted, adapt
from effvit.attention import Attention
from effvit.errors import UserError

_FAMILIES = ("ViT", "DeiT", "Dinov2", "Dinov2WithRegisters", "CLIPVision", "SiglipVision")
_EMBEDDINGS = tuple(f"{family}Embeddings" for family in _FAMILIES)
_ATTENTION = tuple(f"{family.removesuffix('Vision')}{inner}Attention" for family in _FAMILIES for inner in ("Self", ""))
_NESTED, _FLAT = ("query", "key", "value"), ("q_proj", "k_proj", "v_proj")


class ForTransformers(Adapted):
    """The flat form. Results are a pair of tokens and the attention map, or None where nobody asks for it."""

    config: Any

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        causal_attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(B, N, C)`` to tokens, and the map ``(B, H, N, N)``."""
        if attention_mask is not None or causal_attention_mask is not None:
            raise UserError("attention: got a mask; the mechanisms let all tokens attend to all")
        if output_attentions or self._is_recorded():
            y, attention_map = super().forward(hidden_states, True)
            return y, attention_map
        return super().forward(hidden_states), None

    def _is_recorded(self) -> bool:
        """Whether the model asks for the map without a word to the attention itself.

        By its configuration, by a ``forward`` that records and is there as long as that is wanted (4.5x, 5.0), or by a
        hook that stays and looks itself up whether it is wanted (later).
        """
        if getattr(self.config, "output_attentions", False) or hasattr(self.__dict__.get("forward"), "__wrapped__"):
            return True
        recorder = sys.modules.get("transformers.utils.output_capturing")
        if recorder is None or not self._forward_hooks:
            return False
        wanted = recorder._active_collector.get()
        return wanted is not None and "attentions" in wanted

    def prune_heads(self, heads: Any) -> None:
        """Refuse, where there is something to prune."""
        if heads:
            raise UserError("attention: the mechanisms do not prune heads")


class ForTransformersNested(ForTransformers):
    """The nested form, whose output map is outside."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        head_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens ``(B, N, C)`` to the heads' outputs ``(B, N, C)``, and the map ``(B, H, N, N)``."""
        if head_mask is not None:
            raise UserError("attention: got a head mask, which the mechanisms do not apply")
        return super().forward(hidden_states, output_attentions=output_attentions)

    def merge(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)


def towers(model: nn.Module) -> Iterator[Tower]:
    """Vision Transformers of transformers in a model."""
    for name, module in model.named_modules():
        if comes_from(getattr(module, "embeddings", None), "transformers", *_EMBEDDINGS):
            yield _tower(name, module)


def _tower(name: str, model: Any) -> Tower:
    patches = getattr(model.embeddings, "patch_embeddings", model.embeddings)
    (height, width), (rows, columns) = _pair(patches.image_size), _pair(patches.patch_size)
    tower = Tower(
        name,
        f"transformers' {type(model).__name__}",
        model,
        (height // rows, width // columns),
        _prefix_tokens(model.embeddings),
        any_size=True,
    )
    pruned: set[int] = set()
    for where, module in model.named_modules():
        if isinstance(module, ForTransformers) or comes_from(module, "transformers", *_ATTENTION):
            pruned = getattr(module, "pruned_heads", pruned)
            if not hasattr(module, "attention"):  # of the nested form that is what has the maps
                at, block = join(name, where), len(tower.sites)
                tower.sites.append(Site(at, block, partial(_host, at, module, block, pruned)))
                pruned = set()
    return tower


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _prefix_tokens(embeddings: nn.Module) -> int:
    tokens = (getattr(embeddings, name, None) for name in ("cls_token", "distillation_token", "register_tokens"))
    found = sum(token.shape[1] for token in tokens if token is not None)
    return found + (getattr(embeddings, "class_embedding", None) is not None)


def _host(name: str, module: Any, block: int, pruned: set[int]) -> Host:
    if isinstance(module, ForTransformers):
        return _adapted_host(name, module, block)
    nested = hasattr(module, "query")
    names = _NESTED if nested else _FLAT
    output = next((part for part in ("out_proj", "o_proj") if hasattr(module, part)), None)
    if not all(hasattr(module, part) for part in names) or nested == (output is not None):
        raise refuse(name, module, f"expected maps called {', '.join(names)}{'' if nested else ' and out_proj'}")
    if pruned:
        raise refuse(name, module, f"heads {sorted(pruned)} are pruned")
    if getattr(module, "is_causal", False):
        raise refuse(name, module, "lets no token attend to later ones")
    head_dim = _first(module, "head_dim", "attention_head_size")
    require_scale(name, module, _first(module, "scaling", "scale", default=head_dim**-0.5), head_dim)
    return Host(
        name,
        module,
        block,
        _first(module, "num_attention_heads", "num_heads"),
        {f"{part}.": getattr(module, part) for part in names},
        None if output is None else (f"{output}.", getattr(module, output)),
        _dropout(module),
        _finish(ForTransformersNested if nested else ForTransformers, type(module), getattr(module, "config", None)),
    )


def _adapted_host(name: str, module: ForTransformers, block: int) -> Host:
    signature, _, host_class = type(module).parts
    proj = None if issubclass(signature, ForTransformersNested) else ("proj.", module.proj)
    finish = _finish(signature, host_class, module.config)
    return Host(name, module, block, module.num_heads, rows_of(module), proj, module.attn_drop, finish)


def _finish(signature: type[ForTransformers], host_class: type, config: Any) -> Finish:
    def finish(attention: Attention) -> None:
        # An instance of what the model looks for to record attention maps.
        adapt(attention, signature, host_class).config = config

    return finish


def _first(module: nn.Module, *names: str, default: Any = None) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), default)


def _dropout(module: nn.Module) -> float:
    """Probability with which attention is dropped."""
    dropout = _first(module, "attention_dropout", "dropout_prob", "dropout", default=0.0)
    return dropout.p if isinstance(dropout, nn.Dropout) else float(dropout)
