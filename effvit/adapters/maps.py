"""The maps to queries, keys, values and output, merged or split as a mechanism has them.

Where shapes allow it the parameter itself moves, so that an optimizer that knows it keeps it; otherwise its numbers do.
"""

import torch
from torch import Tensor, nn

from effvit.adapters.host import Host, join, refuse
from effvit.attention import Attention
from effvit.attention.standard import StandardAttention
from effvit.attention.uniform import UniformAttention
from effvit.kernels.choice import is_plain
from effvit.model.names import fused_to_standard

Origins = dict[str, str]
_NOT_PLAIN = (
    "not a plain nn.Linear (an adapter, quantised weights, a hook or a parametrisation): merge or remove it first"
)


def width(host: Host, mechanism: type[Attention]) -> int:
    """Width C of the tokens.

    Raises:
        UserError: the maps are not from C to 3C and from C to C, with C a multiple of the heads; or there are none to
            queries and keys, which ``mechanism`` needs.
    """
    sizes = [_shape(host, label, layer) for label, layer in host.rows.items()]
    dim, rows = sizes[0][1], sum(size[0] for size in sizes)
    if isinstance(host.module, UniformAttention):
        if not issubclass(mechanism, UniformAttention):
            raise refuse(host.name, host.module, "it has values alone, and no queries and keys to keep")
    elif rows != 3 * dim:
        raise refuse(host.name, host.module, f"its heads have {rows // 3} columns in all, at a width of {dim}")
    if host.proj is not None and _shape(host, *host.proj) != (dim, dim):
        raise refuse(host.name, host.module, f"maps its output to another width than {dim}")
    return dim


def has_bias(host: Host) -> bool:
    """Whether the maps to queries, keys and values have a bias."""
    biased = {getattr(layer, "bias", None) is not None for layer in host.rows.values()}
    if len(biased) > 1:
        raise refuse(host.name, host.module, f"of {_names(host)} only some have a bias")
    return biased.pop()


def take_maps(attention: Attention, host: Host) -> Origins:
    """Give a mechanism the maps of a module; return each parameter's name here and its names there.

    Raises:
        UserError: they would have to be merged or split and are more than weights.
    """
    if isinstance(attention, StandardAttention):
        origins = _split(attention, host)
    elif isinstance(attention, UniformAttention):
        origins = _values(attention, host)
    else:
        origins = _moved(attention, host)
    if host.proj is None:  # outside, where it stays
        del attention.proj, attention.proj_drop
        return origins
    label, layer = host.proj
    attention.add_module("proj", _as_linear(layer))
    return origins | {f"proj.{kind}": label + kind for kind, _ in layer.named_parameters()}


def rows_of(attention: Attention) -> dict[str, nn.Module]:
    """The layers of a mechanism whose weights, one below the other, are W_qkv; of the control its last third."""
    if isinstance(attention, UniformAttention):
        return {"value.": _as_linear(attention.value)}
    if not isinstance(attention, StandardAttention):
        return {"qkv.": _as_linear(attention.qkv)}
    names = [(head, kind) for kind in ("query", "key", "value") for head in range(attention.num_heads)]
    return {f"heads.{head}.{kind}.": attention.get_submodule(f"heads.{head}.{kind}") for head, kind in names}


def _moved(attention: Attention, host: Host) -> Origins:
    """Give a mechanism its merged map: the module's own layer where there is one."""
    only, *more = host.rows.values()
    if more or (is_plain(only) and type(attention.qkv) is not nn.Linear):
        attention.qkv = _filled(attention.qkv, *_merged(host))
    else:
        attention.add_module("qkv", only)
    return {f"qkv.{kind}": _origin(host, kind) for kind, _ in attention.qkv.named_parameters()}


def _split(attention: StandardAttention, host: Host) -> Origins:
    weight, bias = _merged(host)
    fused: dict[str, Tensor] = {"qkv.weight": weight}
    if bias is not None:
        fused["qkv.bias"] = bias
    origins = {}
    for name, part in fused_to_standard(fused, attention.num_heads).items():
        layer, _, kind = name.rpartition(".")
        trained = fused[f"qkv.{kind}"].requires_grad
        attention.get_submodule(layer).register_parameter(kind, nn.Parameter(part.detach(), trained))
        origins[name] = _origin(host, kind)
    return origins


def _values(attention: UniformAttention, host: Host) -> Origins:
    """The last third of W_qkv: queries and keys are not used."""
    if isinstance(host.module, UniformAttention):
        (only,) = host.rows.values()
        attention.add_module("value", only)
        return {f"value.{kind}": _origin(host, kind) for kind, _ in attention.value.named_parameters()}
    parts = [part if part is None else part.chunk(3)[2] for part in _merged(host)]
    weight, bias = (part if part is None else nn.Parameter(part.detach().clone(), part.requires_grad) for part in parts)
    assert weight is not None, "a linear map has a weight"
    _filled(attention.value, weight, bias)
    return {f"value.{kind}": _origin(host, kind) for kind, _ in attention.value.named_parameters()}


def _merged(host: Host) -> tuple[nn.Parameter, nn.Parameter | None]:
    """W_qkv ``(3C, C)`` and its bias ``(3C,)``, of plain layers alone."""
    layers = []
    for label, layer in host.rows.items():
        if not is_plain(layer):
            raise refuse(join(host.name, label.rstrip("._")), layer, _NOT_PLAIN)
        layers.append(layer)
    weight = _stacked(host, [layer.weight for layer in layers])
    return weight, _stacked(host, [layer.bias for layer in layers]) if has_bias(host) else None


def _stacked(host: Host, parts: list[Tensor]) -> nn.Parameter:
    first, *more = parts
    if any(part.requires_grad != first.requires_grad for part in more):
        raise refuse(host.name, host.module, f"of {_names(host)} only some are trained; freeze all of them or none")
    if more or not isinstance(first, nn.Parameter):
        return nn.Parameter(torch.cat([part.detach() for part in parts]), first.requires_grad)
    return first


def _filled(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    for name, tensor in (("weight", weight), ("bias", bias)):
        assert tensor is None or isinstance(tensor, nn.Parameter), "of a plain layer"
        layer.register_parameter(name, tensor)
    return layer


def _as_linear(layer: nn.Module) -> nn.Module:
    """The layer itself; of one that is an ``nn.Linear`` in all but name, such a one with its parameters."""
    if type(layer).__name__ != "NonDynamicallyQuantizableLinear" or layer._forward_hooks or layer._forward_pre_hooks:
        return layer
    assert isinstance(layer, nn.Linear)
    return linear_of(layer.weight, layer.bias)


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of these parameters themselves."""
    rows, columns = weight.shape
    return _filled(nn.Linear(columns, rows, device="meta"), weight, bias)


def _shape(host: Host, label: str, layer: nn.Module) -> tuple[int, int]:
    """Rows and columns of a layer's weight."""
    rows, columns = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if not (isinstance(rows, int) and isinstance(columns, int)):
        raise refuse(join(host.name, label.rstrip("._")), layer, _NOT_PLAIN)
    return rows, columns


def _origin(host: Host, kind: str) -> str:
    return ", ".join(label + kind for label in host.rows)


def _names(host: Host) -> str:
    return ", ".join(label.rstrip("._") for label in host.rows)
