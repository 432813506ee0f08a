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


GPU_FIELDS = ("gpu", "gpu_memory_mib", "compute_capability", "driver", "cuda", "cudnn")


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
