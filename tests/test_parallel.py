import pytest
import torch

from effvit.errors import UserError
from effvit.parallel import make_fabric


def test_device_that_is_not_there_is_a_user_error():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="device=cuda"):
            make_fabric("cuda")
        with pytest.raises(UserError, match="precision=16-mixed"):
            make_fabric("cpu", precision="16-mixed")
    assert make_fabric("cpu").device.type == "cpu"
