"""One pass of the same images through models that differ in attention: what `representations` defines, for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from effvit.analysis.representations import (
    LinearCKA,
    attention_distance,
    attention_entropy,
    in_float64,
    of_uniform_attention,
    patch_distances,
)
from effvit.attention.hybrid import HybridAttention
from effvit.data.loading.prepared import PreparedDataset
from effvit.evaluation.probe import normalised, recorded
from effvit.model.vit import ViT

EXACT = ("standard", "fused")  # whose attention matrix is what they compute; that of others is implied
Rows = list[dict[str, object]]


@dataclass(frozen=True)
class Survey:
    """Tidy tables, one row per pair of layers, per head, and per branch of a hybrid's gate; layers count from 1."""

    cka: pd.DataFrame
    heads: pd.DataFrame
    gates: pd.DataFrame


@torch.inference_mode()
def survey(models: Mapping[str, ViT], images: np.ndarray, dataset: PreparedDataset, batch_size: int) -> Survey:
    """Look into models of one size by mechanism; uint8 images ``(n, H, W, 3)`` pass through all of them.

    Features of a layer are its block's output tokens, averaged over tokens.
    """
    layers = [(attention, layer) for attention, model in models.items() for layer in range(1, len(model.blocks) + 1)]
    config = next(iter(models.values())).config
    distances = patch_distances(config.grid_size, config.patch_size)
    cka = LinearCKA([config.hidden_size] * len(layers))
    heads = torch.zeros(len(layers), config.num_attention_heads, 2, dtype=torch.float64)
    gates: dict[str, Tensor] = {}
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        features, looks = [], []
        for attention, model in models.items():
            outputs, inputs, maps = _look_into(model, batch, dataset)
            features += [tokens.mean(dim=1) for tokens in outputs]
            for each in maps:
                looks.append(torch.stack([attention_distance(each, distances), attention_entropy(each)], -1).sum(0))
            if (shares := summed_gate_shares(model, inputs)) is not None:
                gates[attention] = gates.get(attention, 0) + shares
        cka.update(features)
        heads += torch.stack(looks).cpu()
    n = len(images)
    uniform = dict(zip(("uniform_distance_px", "uniform_entropy_nats"), of_uniform_attention(distances), strict=True))
    rows: Rows = []
    for (attention, layer), of_layer in zip(layers, (heads / n).tolist(), strict=True):
        for head, (distance, entropy) in enumerate(of_layer, 1):
            key = {"attention": attention, "layer": layer, "head": head}
            looks_at = {"distance_px": distance, "entropy_nats": entropy, "n_images": n}
            rows.append(key | looks_at | uniform | {"implied": attention not in EXACT})
    return Survey(
        _cka_table(layers, cka), pd.DataFrame(rows), _gate_table(models, {a: s / n for a, s in gates.items()})
    )


def _look_into(
    model: ViT, images: np.ndarray, dataset: PreparedDataset
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each block the output tokens, the tokens that its attention sees, and its attention matrix."""
    with recorded(outputs_of=list(model.blocks)) as outputs, recorded(inputs_of=model.attentions()) as inputs:
        _, maps = model(normalised(model, images, dataset), output_attentions=True)
    return outputs, inputs, maps


def summed_gate_shares(model: ViT, inputs: Sequence[Tensor]) -> Tensor | None:
    """Sum over images of each branch's mean share over patches, ``(gates, branches)``; None without a gate."""
    shares = [
        in_float64(attention.gate_shares(inputs[layer - 1])).mean(dim=1).sum(dim=0).cpu()
        for layer, attention in _gated(model)
    ]
    return torch.stack(shares) if shares else None


def gate_rows(model: ViT, shares: Tensor) -> Rows:
    """``layer`` (from 1), ``branch``, ``share``: a row for each of ``shares`` ``(gates, branches)``."""
    return [
        {"layer": layer, "branch": branch, "share": share}
        for (layer, attention), of_layer in zip(_gated(model), shares.tolist(), strict=True)
        for branch, share in zip(attention.branch_names, of_layer, strict=True)
    ]


def _gated(model: ViT) -> list[tuple[int, HybridAttention]]:
    """Blocks whose attention has a gate, by their number from 1."""
    attentions = enumerate(model.attentions(), 1)
    return [(i, a) for i, a in attentions if isinstance(a, HybridAttention) and a.gate is not None]


def _cka_table(layers: Sequence[tuple[str, int]], cka: LinearCKA) -> pd.DataFrame:
    pairs = pd.DataFrame(
        [(*a, *b) for a, b in product(layers, layers)], columns=["attention_a", "layer_a", "attention_b", "layer_b"]
    )
    return pairs.assign(cka=cka.matrix().flatten().numpy(), n_images=cka.n)


def _gate_table(models: Mapping[str, ViT], gates: Mapping[str, Tensor]) -> pd.DataFrame:
    rows = [{"attention": a} | row for a, shares in gates.items() for row in gate_rows(models[a], shares)]
    return pd.DataFrame(rows, columns=["attention", "layer", "branch", "share"])
