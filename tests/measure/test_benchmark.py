import json

import pandas as pd
import pytest
import torch

from effvit import ViT, ViTConfig, available_attention
from effvit.cli.benchmark import benchmark
from effvit.errors import UserError
from effvit.measure import benchmark as module
from effvit.measure import compare, latency
from effvit.measure.benchmark import COST_STEPS, largest_batch, measure_cost, model_size
from effvit.measure.compare import peak_or_none
from effvit.measure.memory import resident_bytes
from effvit.measure.workload import adamw, inference, training_step

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MIB = 2**20
NUMBERS = ["median", "q25", "q75", "p90", "n", "fused_median", "ratio_to_fused"]
SMALL = ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Make every call, but let it take 10 ms, or what ``clock`` says for it: statuses must not hang on real time."""
    seconds = {}

    def stopwatch_for(device):
        def measure(call, repeats):
            call()
            return seconds.get(call, 0.01) * repeats

        return measure

    monkeypatch.setattr(compare, "stopwatch_for", stopwatch_for)
    monkeypatch.setattr(latency, "stopwatch_for", stopwatch_for)
    return seconds


def measure(config=SMALL, batch_size=4, memory_mib=4.0, budget_s=0.02):
    steps = list(measure_cost(config, batch_size=batch_size, memory_mib=memory_mib, budget_s=budget_s, device=CPU))
    assert len(steps) == COST_STEPS
    return pd.DataFrame([row for rows in steps for row in rows])


@pytest.mark.parametrize("attention", available_attention())
def test_every_quantity_is_measured_relative(attention):
    options = {"k": 3} if attention == "linformer" else {"window_size": 2} if attention == "hybrid" else {}
    table = measure(SMALL.model_copy(update={"attention": attention, "attention_options": options}))
    assert (table["status"] == "ok").all() and (table[NUMBERS] > 0).all().all()
    batches = table.groupby("quantity")["batch_size"].agg(list)
    assert batches["latency"] == [1, 4] and batches["throughput"][0] == 4 < batches["throughput"][1]
    for quantity in ("train_step", "train_throughput", "inference_memory", "train_memory"):
        assert batches[quantity] == [4]
    units = dict(zip(table["quantity"], table["unit"], strict=True))
    assert {units[q] for q in ("inference_memory", "train_memory")} == {"bytes"}
    assert {units[q] for q in ("throughput", "train_throughput")} == {"images/s"}


def test_a_timed_ratio_has_an_interval_whatever_the_budget_and_a_single_number_has_none():
    table = measure(budget_s=5e-3)
    ends = table[["ratio_low", "ratio_high"]]
    timed = ~table["unit"].eq("bytes")
    assert (table.loc[timed, "n"] >= 6).all() and ends[~timed].isna().all(axis=None)
    assert (ends.loc[timed, "ratio_low"] <= table.loc[timed, "ratio_to_fused"]).all()
    assert (table.loc[timed, "ratio_to_fused"] <= ends.loc[timed, "ratio_high"]).all()


def test_latency_is_per_image_and_throughput_its_inverse():
    table = measure().set_index(["quantity", "batch_size"])
    latency, throughput = table.loc[("latency", 4)], table.loc[("throughput", 4)]
    assert throughput["q25"] <= 1e3 / latency["median"] <= throughput["q75"]
    step, images = table.loc[("train_step", 4)], table.loc[("train_throughput", 4)]
    assert images["q25"] <= 4e3 / step["median"] <= images["q75"]


@pytest.mark.parametrize("attention", available_attention())
def test_size_and_macs_are_the_models_own(attention):
    config = ViTConfig(attention=attention)
    model, size = ViT(config), model_size(config)
    assert size["parameters"] == size["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert size["macs"] == size["macs_closed_form"] == model.macs()
    assert size["attention_macs"] == model.blocks[0].attn.macs() and size["tokens"] == 65


def test_a_projection_shared_by_all_layers_is_counted_once():
    shared, own = (
        model_size(ViTConfig(attention="linformer", attention_options={"k": 8, "share": share}))["parameters"]
        for share in ("layers", "kv")
    )
    assert own - shared == (4 - 1) * 8 * 65


def test_the_largest_batch_fits_and_a_slightly_larger_one_does_not():
    model, limit = ViT(SMALL), 2.0
    batch = largest_batch(model, limit, CPU)

    def total(size):
        return resident_bytes(model) + peak_or_none(lambda: lambda: inference(model, size, CPU)(), CPU)

    assert total(batch) <= limit * MIB < total(int(batch * 1.1) + 1)


def test_no_batch_fits_into_less_than_the_weights():
    model = ViT(SMALL)
    assert largest_batch(model, resident_bytes(model) / MIB, CPU) == 0
    table = measure(memory_mib=1e-3).set_index("quantity")
    (row,) = [row for _, row in table.loc["throughput"].iterrows() if row["status"] != "ok"]
    assert row["status"] == "out of memory" and row[["batch_size", *NUMBERS]].isna().all()


def test_running_out_of_memory_is_a_row_of_every_quantity_it_concerns(monkeypatch):
    def refuse(model, optimiser, batch_size, device, how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "training_step", refuse)
    monkeypatch.setattr(module, "energy_of", lambda *_: 1.0)
    table = measure().set_index("quantity")
    training = ["train_step", "train_throughput", "train_memory"]
    assert (table.loc[training, "status"] == "out of memory").all()
    assert table.loc[training, NUMBERS].isna().all().all()
    assert (table.drop(training)["status"] == "ok").all()


def test_a_call_over_the_time_budget_is_a_row_and_its_memory_is_known_all_the_same(monkeypatch):
    monkeypatch.setattr(compare, "stopwatch_for", lambda device: lambda call, repeats: 5.0)
    table = measure(budget_s=1.0).set_index("quantity")
    timed = ["latency", "throughput", "train_step", "train_throughput"]
    assert (table.loc[timed, "status"] == "over budget").all()
    assert (table.drop(timed)["status"] == "ok").all()


def test_only_a_second_slow_call_is_over_budget(monkeypatch):
    seconds = iter([100.0, 0.01])
    monkeypatch.setattr(compare, "stopwatch_for", lambda device: lambda call, repeats: next(seconds))
    assert compare.try_out(lambda: lambda: None, 1.0, CPU)[0] == "ok"


def test_a_training_step_leaves_no_gradient_and_the_weights_as_they_were():
    model = ViT(SMALL)
    before = [p.clone() for p in model.parameters()]
    step = training_step(model, adamw(model), 2, CPU)
    for _ in range(2):
        step()
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.parameters(), before, strict=True))


def test_inference_keeps_no_graph():
    assert not inference(ViT(SMALL).train(), 2, CPU)().requires_grad


def test_the_command_writes_the_same_model_json_each_time_apart_from_what_is_measured(tmp_path):
    arguments = {"image_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    arguments |= {"batch_size": 2, "memory_mib": 4, "budget_s": 0.01, "device": "cpu"}
    for name in ("first", "second"):
        benchmark(attention="performer", output_dir=tmp_path / name, option=["num_features=4"], **arguments)
    first, second = tmp_path / "first", tmp_path / "second"
    assert {path.name for path in first.iterdir()} == {"model.json", "cost.csv", "provenance.json"}
    assert (first / "model.json").read_bytes() == (second / "model.json").read_bytes()
    columns = ["precision", "execution", "quantity", "batch_size", "unit", *NUMBERS, "ratio_low", "ratio_high"]
    columns += ["status", "busy", "launch_bound"]
    assert list(pd.read_csv(first / "cost.csv").columns) == columns
    provenance = json.loads((first / "provenance.json").read_text())
    assert provenance["config"]["model"]["attention_options"] == {"num_features": 4}
    assert provenance["machine"]["threads"] == torch.get_num_threads() and provenance["config"]["dtype"] == "float32"


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"attention": "quadratic"}, "attention='quadratic'"),
        ({"attention": "linformer", "option": ["k=0"]}, "attention.linformer.k=0"),
        ({"attention": "linformer", "option": ["k=66"]}, "attention.linformer.k=66"),
        ({"option": ["k"]}, "--option k"),
        ({"patch_size": 5}, "patch_size=5"),
        ({"num_attention_heads": 7}, "num_attention_heads=7"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"budget_s": 0.0}, "budget_s=0.0"),
        ({"memory_mib": -1}, "memory_mib=-1"),
        ({"threads": -2}, "threads=-2"),
        ({"device": "tpu"}, "device='tpu'"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured_or_written(tmp_path, monkeypatch, bad, message):
    monkeypatch.setattr(module, "measure_cost", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UserError, match=message) as error:
        benchmark(**({"attention": "standard", "output_dir": tmp_path / "out", "device": "cpu"} | bad))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
