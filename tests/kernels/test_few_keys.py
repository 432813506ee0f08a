import pytest
import torch
from fake_cuda import OnCuda
from torch.nn import functional as F

from effvit.kernels import dispatch, softmax_attention


@pytest.mark.parametrize(
    ("rows", "columns", "trained", "expected"),
    [
        (8192, 128, True, "written out"),
        (8192, 128, False, "PyTorch's kernel"),
        (8192, 129, True, "PyTorch's kernel"),
        (197, 64, True, "PyTorch's kernel"),
    ],
)
def test_on_a_gpu_few_keys_of_a_long_sequence_are_written_out_in_training(
    rows, columns, trained, expected, monkeypatch
):
    def written_out(*args):
        return "written out"

    monkeypatch.setattr(softmax_attention, "reference", written_out)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args, **kwargs: "PyTorch's kernel")
    q, k = (OnCuda(torch.empty(1, 1, n, 4, device="meta")).requires_grad_(trained) for n in (rows, columns))
    assert dispatch.softmax_attention(q, k, k) == expected
