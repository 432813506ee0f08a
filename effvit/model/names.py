"""Names of a ViT's weights in timm, transformers and torchvision. This ViT has timm's.

Whose names a state dict has is seen from the names themselves, whatever its file is called. What a wrapper puts before
all names (``module.`` of DistributedDataParallel, ``model.`` of a Lightning module) is taken off, and ``_orig_mod.`` of
torch.compile wherever it stands.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effvit.errors import UserError

StateDict = dict[str, Tensor]
_KIND = r"\.(weight|bias)"
_MAPS = ("q", "k", "v")
_HF_MAPS = ("query", "key", "value")  # also of ``standard``, for each head
_HEAD_KEY = re.compile(r"(?P<prefix>.*)heads\.(?P<head>\d+)\.(?P<map>query|key|value)\.(?P<kind>weight|bias)")


@dataclass(frozen=True)
class Scheme:
    """A library's names: ``mark`` is one that every model has; patterns and what they become here; unused ones."""

    library: str
    mark: str
    names: tuple[tuple[str, str], ...] = ()
    unused: dict[str, str] = field(default_factory=dict)

    def rename(self, name: str) -> str:
        """This ViT's name; one that is not of the scheme stays as it is."""
        for pattern, here in self.names:
            if match := re.fullmatch(pattern, name):
                return match.expand(here)
        return name

    def why_unused(self, name: str) -> str | None:
        """Why a classifier has no use for a weight; None where it has."""
        return next((why for pattern, why in self.unused.items() if re.fullmatch(pattern, name)), None)


_BASE = r"(?:(?:vit|deit)\.)?"
_HF_LAYER = _BASE + r"(?:encoder\.layer|layers)\.(\d+)\."  # of version 4, in files of 5 as well; of 5 in memory
_TV_LAYER = r"encoder\.layers\.encoder_layer_(\d+)\."

_SCHEMES = (
    Scheme("timm", r"patch_embed\.proj\.weight"),
    Scheme(
        "transformers",
        _BASE + r"embeddings\.patch_embeddings\.projection\.weight",
        (
            (_BASE + r"embeddings\.cls_token", "cls_token"),
            (_BASE + r"embeddings\.distillation_token", "reg_token"),  # which a plain classifier only attends to
            (_BASE + r"embeddings\.position_embeddings", "pos_embed"),
            (_BASE + r"embeddings\.patch_embeddings\.projection" + _KIND, r"patch_embed.proj.\1"),
            (_HF_LAYER + r"layernorm_before" + _KIND, r"blocks.\1.norm1.\2"),
            (_HF_LAYER + r"layernorm_after" + _KIND, r"blocks.\1.norm2.\2"),
            (_HF_LAYER + r"attention\.(?:attention\.query|q_proj)" + _KIND, r"blocks.\1.attn.q.\2"),
            (_HF_LAYER + r"attention\.(?:attention\.key|k_proj)" + _KIND, r"blocks.\1.attn.k.\2"),
            (_HF_LAYER + r"attention\.(?:attention\.value|v_proj)" + _KIND, r"blocks.\1.attn.v.\2"),
            (_HF_LAYER + r"attention\.(?:output\.dense|o_proj)" + _KIND, r"blocks.\1.attn.proj.\2"),
            (_HF_LAYER + r"(?:intermediate\.dense|mlp\.fc1)" + _KIND, r"blocks.\1.mlp.fc1.\2"),
            (_HF_LAYER + r"(?:output\.dense|mlp\.fc2)" + _KIND, r"blocks.\1.mlp.fc2.\2"),
            (_BASE + r"layernorm" + _KIND, r"norm.\1"),
            (r"classifier" + _KIND, r"head.\1"),
        ),
        {
            _BASE + r"pooler\.dense" + _KIND: "a pooler, which a classifier does not use",
            _BASE + r"embeddings\.mask_token": "a mask token, which a classifier does not use",
        },
    ),
    Scheme(
        "torchvision",
        r"conv_proj\.weight",
        (
            (r"class_token", "cls_token"),
            (r"encoder\.pos_embedding", "pos_embed"),
            (r"conv_proj" + _KIND, r"patch_embed.proj.\1"),
            (_TV_LAYER + r"ln_1" + _KIND, r"blocks.\1.norm1.\2"),
            (_TV_LAYER + r"ln_2" + _KIND, r"blocks.\1.norm2.\2"),
            (_TV_LAYER + r"self_attention\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
            (_TV_LAYER + r"self_attention\.out_proj" + _KIND, r"blocks.\1.attn.proj.\2"),
            (_TV_LAYER + r"mlp\.(?:0|linear_1)" + _KIND, r"blocks.\1.mlp.fc1.\2"),  # the latter in early releases
            (_TV_LAYER + r"mlp\.(?:3|linear_2)" + _KIND, r"blocks.\1.mlp.fc2.\2"),
            (r"encoder\.ln" + _KIND, r"norm.\1"),
            (r"heads\.head" + _KIND, r"head.\1"),
        ),
    ),
)


@dataclass(frozen=True)
class Named:
    """Weights under this ViT's names, whose names they had, what was taken off them, and what is left out and why."""

    tensors: StateDict
    library: str
    taken_off: str
    unused: dict[str, str]


def read_names(tensors: StateDict) -> Named:
    """Find out whose names these are, and turn them into this ViT's.

    Separate maps to queries, keys and values become one. A name that is not of the scheme stays as it is.

    Raises:
        UserError: they are of no ViT that is known.
    """
    originals = {re.sub(r"(^|\.)_orig_mod\.", r"\1", name): name for name in tensors}
    if len(originals) < len(tensors):
        raise UserError("has the same weights with and without _orig_mod.; save the state dict of one model")
    marked, prefix, scheme = _find(list(originals))
    taken_off = originals[marked].removesuffix(marked.removeprefix(prefix))
    if "_orig_mod." not in taken_off and list(originals) != list(tensors):  # of compiled blocks
        taken_off += "_orig_mod."
    renamed, unused = {}, {}
    for plain, original in originals.items():
        name, tensor = plain.removeprefix(prefix), tensors[original]
        if why := scheme.why_unused(name):
            unused[name] = why
        else:
            renamed[scheme.rename(name)] = tensor
    return Named(_merged(renamed), scheme.library, taken_off, unused)


def _find(names: list[str]) -> tuple[str, str, Scheme]:
    """A name that tells the scheme, and what stands before it."""
    for name in names:
        for scheme in _SCHEMES:
            if match := re.fullmatch(rf"((?:.*?\.)??){scheme.mark}", name):
                prefix = match[1]
                if other := next((name for name in names if not name.startswith(prefix)), None):
                    raise UserError(f"some names begin with {prefix}, others do not ({other}): save only those that do")
                return name, prefix, scheme
    raise UserError(
        "not the weights of a ViT in the names of timm, transformers or torchvision "
        "(none ends in patch_embed.proj.weight, patch_embeddings.projection.weight or conv_proj.weight)"
    )


def _merged(tensors: StateDict) -> StateDict:
    """The maps to queries, keys and values one below the other; where one is missing, all stay unchanged."""
    result: StateDict = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(blocks\.\d+\.attn\.)[qkv](\.weight|\.bias)", name)
        parts = [f"{match[1]}{part}{match[2]}" for part in _MAPS] if match else []
        if not (match and tensors.keys() >= set(parts)):
            result[name] = tensor
        elif name == parts[0]:
            result[f"{match[1]}qkv{match[2]}"] = torch.cat([tensors[part] for part in parts])
    return result


_TO_TRANSFORMERS = (
    (r"cls_token", "vit.embeddings.cls_token"),
    (r"pos_embed", "vit.embeddings.position_embeddings"),
    (r"patch_embed\.proj" + _KIND, r"vit.embeddings.patch_embeddings.projection.\1"),
    (r"blocks\.(\d+)\.norm1" + _KIND, r"vit.encoder.layer.\1.layernorm_before.\2"),
    (r"blocks\.(\d+)\.norm2" + _KIND, r"vit.encoder.layer.\1.layernorm_after.\2"),
    (r"blocks\.(\d+)\.attn\.proj" + _KIND, r"vit.encoder.layer.\1.attention.output.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1" + _KIND, r"vit.encoder.layer.\1.intermediate.dense.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2" + _KIND, r"vit.encoder.layer.\1.output.dense.\2"),
    (r"norm" + _KIND, r"vit.layernorm.\1"),
    (r"head" + _KIND, r"classifier.\1"),
)


def to_transformers(state: StateDict) -> StateDict:
    """Weights of a ViT with ``fused`` attention and one class token under the names in files of transformers."""
    scheme = Scheme("transformers", "", _TO_TRANSFORMERS)
    result: StateDict = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv" + _KIND, name):
            for part, of_part in zip(_HF_MAPS, tensor.chunk(3), strict=True):
                result[f"vit.encoder.layer.{match[1]}.attention.attention.{part}.{match[2]}"] = of_part.clone()
        else:
            result[scheme.rename(name)] = tensor
    return result


def standard_to_fused(state: StateDict) -> StateDict:
    """Rewrite a state dict (of a module or a whole model) from ``standard``'s names to ``fused``'s. Lossless."""
    parts: dict[str, dict[tuple[int, int], Tensor]] = {}
    result = {}
    for key, tensor in state.items():
        match = _HEAD_KEY.fullmatch(key)
        if match is None:
            result[key] = tensor
            continue
        place = (_HF_MAPS.index(match["map"]), int(match["head"]))
        parts.setdefault(f"{match['prefix']}qkv.{match['kind']}", {})[place] = tensor
    for key, tensors in parts.items():
        result[key] = torch.cat([tensors[place] for place in sorted(tensors)])
    return result


def fused_to_standard(state: StateDict, num_heads: int) -> StateDict:
    """Rewrite a state dict from ``fused``'s names to ``standard``'s, the inverse of ``standard_to_fused``."""
    result = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"((?:.*\.)?)qkv\.(weight|bias)", key)
        if match is None:
            result[key] = tensor
            continue
        for name, of_all_heads in zip(_HF_MAPS, tensor.chunk(3), strict=True):
            for head, part in enumerate(of_all_heads.chunk(num_heads)):
                result[f"{match[1]}heads.{head}.{name}.{match[2]}"] = part.clone()
    return result


def together(names: Iterable[str]) -> str:
    """Names with all blocks as one: ``blocks.*.attn.E``."""
    return ", ".join(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "blocks.*.", name) for name in names))
