"""Where any model looks whose attention is one of the mechanisms here."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from effvit.attention import Attention, available_attention
from effvit.errors import UserError
from effvit.evaluation.score import attention_rollout
from effvit.model.logits import logits_of
from effvit.notebook.inputs import evaluating

_POOLED_FROM_CLASS_TOKEN = ("token", "")


@torch.inference_mode()
def rollout(model: nn.Module, inputs: Tensor) -> tuple[Tensor, np.ndarray]:
    """Classify normalised images ``(n, channels, H, W)``, and find what that rests on.

    Returns:
        Logits ``(n, classes)`` on the CPU, and attention rollout ``(n, gh, gw)`` over the patches.

    Raises:
        UserError: not every block has a mechanism that implies a matrix, or its patches are no grid.
    """
    blocks = _blocks(model)
    with evaluating(model), _inputs_of(blocks) as tokens:
        logits = logits_of(model(inputs)).float().cpu()
        # As a mechanism has it, whatever the signature that a library calls it by.
        maps = [Attention.forward(block, tokens[block], True)[1].cpu() for block in blocks]
    first = blocks[0]
    grid = _grid(maps[0].shape[-1] - first.prefix_tokens, first.grid_size, inputs.shape[-2:])
    shares = attention_rollout(maps, first.prefix_tokens, class_token=_has_class_token(model))
    return logits, shares.view(-1, *grid).numpy()


def mechanisms_of(model: nn.Module) -> str:
    """Names of a model's mechanisms."""
    return ", ".join(dict.fromkeys(_name(block) for block in _blocks(model)))


def _name(block: Attention) -> str:
    modules = (cls.__module__.rpartition(".")[-1] for cls in type(block).__mro__)
    return next((module for module in modules if module in available_attention()), type(block).__name__)


def _blocks(model: nn.Module) -> list[Attention]:
    """The attention of each block, first block first."""
    found = [module for module in model.modules() if isinstance(module, Attention)]
    if not found:
        raise UserError(
            f"{type(model).__name__}: no attention map to draw; swap_attention(model, 'fused') gives it one "
            "and leaves the function as it is"
        )
    if without := [block for block in found if not block.has_map]:
        raise UserError(f"{type(without[0]).__name__}: implies no attention map to draw")
    found.sort(key=lambda block: block.layer)
    layers, depth = [block.layer for block in found], found[0].depth
    if layers != list(range(depth)):
        raise UserError(
            f"{type(model).__name__}: blocks {', '.join(map(str, layers))} of {depth} have a mechanism; "
            "rollout goes through all"
        )
    return found


@contextmanager
def _inputs_of(blocks: list[Attention]) -> Iterator[dict[Attention, Tensor]]:
    """Yield a dictionary that fills with the tokens that each block's attention is given."""
    seen: dict[Attention, Tensor] = {}

    def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen[module] = arguments[0] if arguments else next(iter(named.values()))

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        yield seen


def _grid(patches: int, built: tuple[int, int], pixels: torch.Size) -> tuple[int, int]:
    """Rows and columns of patches: as built, or for images of another size by the ratio of their sides."""
    if built[0] * built[1] == patches:
        return built
    height, width = pixels
    rows = round((patches * height / width) ** 0.5)
    if rows == 0 or patches % rows or rows * width != patches // rows * height:
        raise UserError(f"no grid of {patches} patches fits images of {height} x {width} pixels")
    return rows, patches // rows


def _has_class_token(model: nn.Module) -> bool:
    """Whether the output is made from the first of the prefix tokens; timm's models may have other ones, or pool."""
    for module in model.modules():
        if isinstance(pool := getattr(module, "global_pool", None), str):
            return pool in _POOLED_FROM_CLASS_TOKEN and bool(getattr(module, "has_class_token", True))
    return True
