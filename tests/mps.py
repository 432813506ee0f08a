"""What of Apple's MPS can be tested elsewhere: tensors that say they are there, and have no float64."""

import torch
from torch.overrides import TorchFunctionMode


class OnMps(torch.Tensor):
    """A tensor of the CPU in disguise; what is computed from it is on MPS as well, until it is moved by `cpu`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("mps")
        result = super().__torch_function__(function, types, args, kwargs or {})
        if function is torch.Tensor.cpu:
            return result.as_subclass(torch.Tensor)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result


def on_mps(tensor):
    return tensor.as_subclass(OnMps)


class NoFloat64(TorchFunctionMode):
    """While it is entered, the device ``meta`` has no float64 either."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta and result.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return result
