"""`torch.compile` of a model's blocks, in place: equal blocks share their code, and names of weights stay."""

import torch
from torch import nn

from effvit.errors import UserError
from effvit.training.optimizer import attention_maps, blocks_of

_MOST_VARIANTS = 64  # of a block: which heads, shapes and modes; PyTorch's own limit of 8 falls back to eager, silently


def compile_blocks(model: nn.Module, how: str, device: torch.device) -> None:
    """Compile the blocks around the attention of a model, or the model itself where no blocks are known.

    For each shape by itself: with shapes left open, the code would depend on the order in which they come.

    Raises:
        UserError: CUDA graphs without CUDA.
    """
    if how == "off":
        return
    if how == "graphs" and device.type != "cuda":
        raise UserError("compile=graphs: needs a CUDA device; try on")
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled())  # and so does generated code
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _MOST_VARIANTS)
    mode = "reduce-overhead" if how == "graphs" else "default"
    for block in dict.fromkeys(blocks_of(model, attention_maps(model))) or (model,):
        block.compile(dynamic=False, mode=mode)
