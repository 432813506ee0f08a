import os

import pytest
import torch

from effvit import policy
from effvit.device import this_machine
from effvit.errors import UserError
from effvit.training.loop import Training
from effvit.training.recipe import TrainConfig
from effvit.training.run import train_to

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "32-true"), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_auto_is_bfloat16_on_gpus_that_have_it(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert policy.training_precision("auto", CUDA) == expected
    assert policy.training_precision("auto", CPU) == "32-true"
    assert policy.training_precision("16-mixed", CUDA) == "16-mixed"


def settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.cudnn_sdp_enabled(),
    )


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("tf32", [True, False])
def test_what_is_set_for_a_gpu_is_recorded_and_undone(monkeypatch, deterministic, tf32):
    monkeypatch.setattr("effvit.device._gpu", lambda device: dict.fromkeys(GPU_FIELDS))
    monkeypatch.setattr(policy, "takes_triton", lambda device: True)
    before = settings()
    with policy.kept():
        policy.apply(CUDA, deterministic=deterministic, tf32=tf32)
        assert settings() == (deterministic, False, False, tf32, tf32, False)
        machine = this_machine(CUDA)
        assert (machine.sdpa, machine.tf32) == (
            "flash, mem_efficient, math",
            "products, convolutions" if tf32 else "none",
        )
        assert "Triton" in machine.kernels
        with policy.cudnn_attention():
            assert this_machine(CUDA).sdpa == "cudnn"
        assert this_machine(CUDA).sdpa == "flash, mem_efficient, math"
    assert settings() == before


GPU_FIELDS = ("gpu", "gpu_memory_mib", "gpu_clock_mhz", "compute_capability", "driver", "cuda", "cudnn")


def test_a_cpu_keeps_what_belongs_to_gpus():
    before = settings()
    with policy.kept():
        policy.apply(CPU, deterministic=True)
        assert settings()[3:] == before[3:]


@pytest.mark.parametrize("deterministic", [True, False])
def test_training_is_as_deterministic_as_the_recipe_says_and_leaves_nothing_behind(
    deterministic, digits, tiny_config, tmp_path, monkeypatch
):
    recipe = TrainConfig(epochs=1, batch_size=700, lr=1e-3, device="cpu", deterministic=deterministic)
    seen, step, before = [], Training._take_step, settings()
    monkeypatch.setattr(Training, "_take_step", lambda *args: seen.append(settings()[0]) or step(*args))
    train_to(tmp_path / "a", tmp_path / "b", tiny_config(), digits, recipe, seed=0, horizontal_flip=False)
    assert set(seen) == {deterministic} and settings() == before


def test_the_recipe_records_what_auto_came_to(digits, tiny_config):
    with policy.kept():
        recipe = TrainConfig(epochs=1, batch_size=700, lr=1e-3, device="cpu")
        training = Training(tiny_config(), digits, recipe, seed=0, horizontal_flip=False)
    assert (recipe.precision, training.recipe.precision) == ("auto", "32-true")


def test_off_and_on_of_yaml_are_words():
    recipes = [TrainConfig(epochs=1, batch_size=1, lr=1.0, compile=value) for value in (False, True, "graphs")]
    assert [recipe.compile for recipe in recipes] == ["off", "on", "graphs"]


def test_graphs_need_cuda(digits, tiny_config):
    recipe = TrainConfig(epochs=1, batch_size=700, lr=1e-3, device="cpu", compile="graphs")
    with policy.kept(), pytest.raises(UserError, match="compile=graphs: needs a CUDA device"):
        Training(tiny_config(), digits, recipe, seed=0, horizontal_flip=False)


@pytest.fixture
def newer_interface():
    """Of PyTorch's two for TF32; who used it may not read the older one."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("PyTorch before 2.9 has one")
    backends = torch.backends
    with policy.kept():
        yield backends
    backends.fp32_precision = backends.cudnn.fp32_precision = "none"


@pytest.mark.parametrize("name", ["matmul", "all", "cudnn"])
def test_whichever_interface_set_tf32_it_is_read_and_put_back(newer_interface, name):
    owner = {"matmul": torch.backends.cuda.matmul, "all": torch.backends, "cudnn": torch.backends.cudnn}[name]
    torch.backends.cuda.matmul.fp32_precision = "none"  # so that what is set for all holds for it
    owner.fp32_precision = "ieee" if name == "cudnn" else "tf32"

    def seen():
        newer = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn
        return [backend.fp32_precision for backend in newer]

    before = seen()
    assert policy.rounds_products() == (name != "cudnn")
    for tf32 in (True, False):
        with policy.kept():
            policy.apply(CUDA, deterministic=False, tf32=tf32)
            assert policy.rounds_products() == tf32
            assert [each == "tf32" for each in seen()] == [tf32] * 3
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest"), "which Lightning reads"
        assert seen() == before


@pytest.mark.parametrize("name", ["highest", "high", "medium"])
def test_what_the_older_interface_set_is_put_back_and_can_be_read(newer_interface, name):
    torch.set_float32_matmul_precision(name)
    backends = torch.backends
    every = backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv, backends.cudnn.rnn
    before = [each.fp32_precision for each in every], torch.get_float32_matmul_precision()
    for tf32 in (True, False):
        with policy.kept():
            policy.apply(CUDA, deterministic=False, tf32=tf32)
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert ([each.fp32_precision for each in every], torch.get_float32_matmul_precision()) == before


def test_without_a_compiler_or_pythons_header_triton_is_not_taken(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.platform", "linux")
    assert policy._triton_lacks() is None or policy.TRITON_ON is None
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CC", "cc")
    assert policy._triton_lacks() == "Python.h (python3-dev)"
    monkeypatch.setattr(policy, "_TRITON", True)
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    with policy.kept():
        policy.apply(CPU, deterministic=True)
        assert capsys.readouterr().err == ""
        for _ in range(2):
            policy.apply(CUDA, deterministic=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Triton finds no C compiler: ")


def test_cublas_has_a_workspace_of_fixed_size_where_bytes_shall_be_the_same(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    for deterministic, expected in ((False, None), (True, ":4096:8")):
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        with policy.kept():
            policy.apply(CUDA, deterministic=deterministic)
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == expected
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
