"""effvit's own ViT, and its mechanisms wherever somebody has put them."""

from collections.abc import Iterator
from functools import partial

from torch import nn

from effvit.adapters.host import Host, Site, Tower, join
from effvit.adapters.maps import rows_of
from effvit.attention import Attention
from effvit.model.vit import ViT


def towers(model: nn.Module) -> Iterator[Tower]:
    """effvit's Vision Transformers in a model."""
    for name, module in model.named_modules():
        if isinstance(module, ViT):
            config = module.config
            tower = Tower(name, "effvit's ViT", module, config.grid_size, config.prefix_tokens)
            for block, each in enumerate(module.blocks):
                where, attention = join(name, f"blocks.{block}.attn"), getattr(each, "attn", None)
                if isinstance(attention, Attention):
                    tower.sites.append(Site(where, block, partial(_host, where, attention, block)))
            yield tower


def _host(name: str, module: Attention, block: int) -> Host:
    proj, proj_drop = module.proj, module.proj_drop

    def finish(attention: Attention) -> None:
        attention.proj_drop = proj_drop

    return Host(name, module, block, module.num_heads, rows_of(module), ("proj.", proj), module.attn_drop, finish)


def is_mixed(vit: ViT) -> bool:
    """Whether blocks differ in attention, or in its options, which a configuration cannot say."""
    first, *others = vit.attentions()
    return any(_kind(each) != _kind(first) for each in others)


def _kind(attention: Attention) -> tuple[object, ...]:
    return type(attention), attention.options, attention.value_conv_size
