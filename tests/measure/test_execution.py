import math

import pandas as pd
import pytest
import torch
from torch import nn

from effvit.attention import build_attention
from effvit.errors import UserError
from effvit.measure import scaling as scaling_module
from effvit.measure.benchmark import measure_cost
from effvit.measure.execution import EAGER, Execution, executions, launch_bound
from effvit.measure.scaling import measure_scaling
from effvit.measure.subject import Block, Model
from effvit.model.vit import ViT, ViTConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = ViTConfig(
    image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)


def test_all_pairs_are_measured_the_first_of_both_lists_first():
    assert executions(["float32", "bfloat16", "float32"], ["eager", "compiled"], CPU) == [
        ("float32", "eager"),
        ("float32", "compiled"),
        ("bfloat16", "eager"),
        ("bfloat16", "compiled"),
    ]
    assert executions(["tf32"], ["graphs"], CUDA) == [("tf32", "graphs")]


@pytest.mark.parametrize(
    ("precisions", "modes", "message"),
    [
        (["half"], ["eager"], "precision='half': unknown, expected one of float32, tf32, bfloat16"),
        (["float32"], ["fast"], "execution='fast': unknown, expected one of eager, compiled, graphs"),
        (["tf32"], ["eager"], "precision=tf32: needs a CUDA device"),
        (["float32"], ["graphs"], "execution=graphs: needs a CUDA device"),
    ],
)
def test_what_the_device_does_not_have_is_an_error(precisions, modes, message):
    with pytest.raises(UserError, match=message):
        executions(precisions, modes, CPU)


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("subject", [Block("fused", {}, 8, 2), Model(SMALL)], ids=["block", "model"])
def test_what_is_measured_runs_in_its_precision(subject, mode, monkeypatch):
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: seen.append((y := linear(x, w, b)).dtype) or y
    )
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        seen.clear()
        subject.call(mode, 5, 2, CPU, Execution(precision))()
        assert set(seen) == {dtype}


def test_rows_say_how_they_ran():
    how = Execution("bfloat16")
    points = measure_scaling(
        Block("fused", {}, 8, 2), [5], tokens_per_batch=1, memory_mib=100, budget_s=0.1, device=CPU, how=how
    )
    rows = [row for of_count in points for row in of_count]
    assert {(row["precision"], row["execution"], row["hidden_size"]) for row in rows} == {("bfloat16", "eager", 8)}
    assert {(row["busy"], row["launch_bound"]) for row in rows} == {(None, False)}, "a matter of GPUs"


def test_a_point_at_which_the_gpu_waits_is_marked(monkeypatch):
    monkeypatch.setattr(scaling_module, "_busy", lambda *_: 0.5)
    points = measure_scaling(
        Block("fused", {}, 8, 2), [5], tokens_per_batch=1, memory_mib=100, budget_s=0.1, device=CPU
    )
    table = pd.DataFrame([row for of_count in points for row in of_count]).set_index("quantity")
    assert table.loc["time", "launch_bound"].all() and not table.loc["memory", "launch_bound"].any()
    assert [launch_bound(share) for share in (None, 0.79, 0.8, 1.0)] == [False, True, False, False]


@pytest.mark.parametrize(("mode", "how"), [("compiled", "default"), ("graphs", "reduce-overhead")])
def test_blocks_are_compiled_each_by_itself(mode, how, monkeypatch):
    seen = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **settings: seen.append((self, settings)))
    model, block = ViT(SMALL.model_copy(update={"num_hidden_layers": 2})), build_attention("fused", 8, 2, (2, 2))
    for module in (model, block):
        Execution("float32", mode).prepare(module, CUDA)
        EAGER.prepare(module, CUDA)
    assert [module for module, _ in seen] == [*model.blocks, block]
    assert all(settings == {"dynamic": False, "mode": how} for _, settings in seen)


def test_energy_of_an_image_is_a_row_where_something_counts_it(monkeypatch):
    settings = {"batch_size": 4, "memory_mib": 4.0, "budget_s": 0.1, "device": CPU, "how": EAGER}

    def quantities():
        return {row["quantity"]: row for rows in measure_cost(SMALL, **settings) for row in rows}

    monkeypatch.setattr("effvit.measure.benchmark.energy_of", lambda *_: None)
    assert not {"energy", "train_energy"} & quantities().keys()
    monkeypatch.setattr("effvit.measure.benchmark.energy_of", lambda *_: 8.0)
    energy = quantities()["energy"]
    assert (energy["median"], energy["unit"], energy["ratio_to_fused"]) == (2.0, "J", 1.0)
    assert math.isnan(energy["ratio_low"] or math.nan)
