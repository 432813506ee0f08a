import pytest
import torch
from mps import NoFloat64
from torch import nn

from effvit.notebook.inputs import as_inputs


def test_numpys_floats_reach_a_device_that_has_no_float64():
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    with NoFloat64():
        with pytest.raises(TypeError, match="float64"):
            images.to("meta")
        found = as_inputs(images, nn.Linear(1, 1, device="meta"), None)
    assert (found.device.type, found.dtype, found.shape) == ("meta", torch.float32, images.shape)
