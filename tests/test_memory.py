import pytest
import torch
from max_rss import max_rss_bytes
from torch import nn
from torch.nn import functional as F

from effvit import ViT, ViTConfig
from effvit.measure.memory import peak_bytes, resident_bytes
from effvit.measure.workload import adamw, training_step
from effvit.memory import is_out_of_memory

pytestmark = pytest.mark.slow

DEVICES = [
    torch.device("cpu"),
    pytest.param(
        torch.device("cuda"), marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
    ),
]
KIB = 1024  # every size below is a multiple of 512 bytes, to which CUDA's allocator rounds


@pytest.fixture(params=DEVICES, ids=str)
def device(request):
    return request.param


def allocate(kib, device):
    return torch.empty(kib * KIB, dtype=torch.uint8, device=device)


def test_what_is_freed_before_the_next_is_allocated_does_not_add_up(device):
    def one_after_the_other():
        a = allocate(100, device)
        del a
        b = allocate(300, device)
        del b
        return allocate(200, device)

    assert peak_bytes(one_after_the_other, device) == 300 * KIB


def test_what_lives_together_adds_up(device):
    def together():
        a = allocate(100, device)
        b = allocate(300, device)
        del a
        c = allocate(50, device)
        return b, c

    assert peak_bytes(together, device) == 400 * KIB


def test_what_was_resident_before_does_not_count(device):
    before = allocate(1000, device)
    assert peak_bytes(lambda: before.zero_(), device) == 0


def test_a_call_that_allocates_nothing_has_no_peak(device):
    assert peak_bytes(lambda: None, device) == 0


def test_a_matrix_product_needs_its_result(device):
    x = torch.ones(128, 128, device=device)
    x @ x  # the first call on CUDA also takes a workspace
    assert peak_bytes(lambda: x @ x, device) == 128 * 128 * 4


def test_the_buffer_inside_an_operator_counts():
    x = torch.ones(2, 8, 64, 32)

    def fused():
        return F.scaled_dot_product_attention(x, x, x)

    # The result and, per row, what the operator keeps of its softmax; its per-thread buffer comes on top.
    assert peak_bytes(fused, torch.device("cpu")) > x.numel() * 4 + 2 * 8 * 64 * 4


def test_backward_of_a_linear_layer_needs_the_gradients_of_its_weights():
    layer, x = nn.Linear(64, 32, bias=False), torch.ones(16, 64)
    gradient = torch.ones(16, 32)

    def step():
        layer(x).backward(gradient)

    # The result (16 x 32) is gone once backward has begun: at the peak it and the weights' gradient may both live.
    weight = 32 * 64 * 4
    assert weight <= peak_bytes(step, torch.device("cpu")) <= weight + 16 * 32 * 4


def test_written_out_attention_needs_its_matrices_and_fused_does_not():
    q = torch.ones(1, 4, 512, 8)
    matrix = 4 * 512 * 512 * 4

    def written_out():
        return (q @ q.transpose(-2, -1)).softmax(-1) @ q

    assert 2 * matrix <= peak_bytes(written_out, torch.device("cpu")) < 2.2 * matrix
    assert peak_bytes(lambda: F.scaled_dot_product_attention(q, q, q), torch.device("cpu")) < matrix


def test_a_call_measured_twice_needs_the_same():
    model = ViT(ViTConfig(image_size=16))
    step = training_step(model, adamw(model), 4, torch.device("cpu"))
    step()
    assert peak_bytes(step, torch.device("cpu")) == peak_bytes(step, torch.device("cpu")) > 0


def test_resident_bytes_count_buffers_and_shared_parameters_once():
    first = nn.Linear(10, 10)
    second = nn.Linear(10, 10, bias=False)
    second.weight = first.weight
    assert resident_bytes(nn.Sequential(first, second, nn.BatchNorm1d(3))) == (100 + 10 + 4 * 3) * 4 + 8


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_running_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected


def test_what_the_allocator_refuses_is_out_of_memory():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50)
    assert is_out_of_memory(error.value)


def test_the_operating_system_sees_about_the_same_peak_in_a_fresh_process():
    config, cpu, batch = ViTConfig(), torch.device("cpu"), 64
    model = ViT(config)
    step = training_step(model, adamw(model), batch, cpu)
    step()
    peak = peak_bytes(step, cpu)
    assert 0.5 * peak < max_rss_bytes(config, batch) < 2 * peak
