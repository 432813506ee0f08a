"""Logits of any image classifier."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from effvit.errors import UserError


def logits_of(output: Any) -> Tensor:
    """Take the logits ``(B, classes)`` out of what a model returns.

    Args:
        output: the logits, or a mapping or object that has them as ``logits``, as in Hugging Face's transformers.

    Raises:
        UserError: it is neither.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise UserError(
        f"the model returns {type(output).__name__}: expected logits (batch, classes) or an object with them"
    )
