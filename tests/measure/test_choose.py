import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from effvit import ViT, ViTConfig, available_attention
from effvit.errors import UserError
from effvit.measure import choose
from effvit.measure.choose import Candidate, _call, builder, compared, measure_choice, mechanism, verdict
from effvit.measure.execution import Execution
from effvit.model.presets import preset

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
TINY = {"patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SETTINGS = {"batch_size": 2, "precision": "float32", "budget_s": 0.2, "device": CPU}
OPTIONS = {"linformer": {"k": 4}}


def rows_of(attentions, sizes, **changes):
    points = measure_choice(builder(TINY, OPTIONS), attentions, sizes, **(SETTINGS | changes))
    return [row for rows in points for row in rows]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_mechanism_has_a_row_for_each_size_and_scope_with_exact_costs(precision, monkeypatch):
    monkeypatch.setattr(choose, "_SLOWEST", 1e6)
    names = available_attention()
    table = pd.DataFrame(rows_of(names, [16, 24], precision=precision))
    assert len(table) == 2 * 2 * len(names)
    assert set(table["attention"]) == set(names) and set(table["status"]) == {"ok"}
    for row in table.to_dict("records"):
        config = ViTConfig(
            **TINY,
            image_size=row["image_size"],
            attention=row["attention"],
            attention_options=OPTIONS.get(row["attention"], {}),
        )
        model = ViT(config)
        module = model if row["scope"] == "model" else model.attentions()[0]
        assert row["tokens"] == 1 + (row["image_size"] // 4) ** 2
        assert row["macs"] == module.macs()
        assert row["parameters"] == sum(p.numel() for p in module.parameters())
        assert row["memory_bytes"] > 0 and row["q25"] <= row["median"] <= row["q75"]
    fused = table[table["attention"] == "fused"]
    assert (fused[["ratio_to_fused", "ratio_low", "ratio_high"]] == 1).all(axis=None)


def test_times_are_those_of_an_image_and_ratios_are_taken_round_by_round(monkeypatch):
    samples = {"fused": np.array([0.1, 0.2, 0.4] * 4), "linformer": np.array([0.2, 0.2, 0.2] * 4)}
    monkeypatch.setattr(choose, "interleaved", lambda calls, **_: {name: samples[name] for name in calls})
    rows = rows_of(["linformer"], [16])
    (row,) = (row for row in rows if (row["attention"], row["scope"]) == ("linformer", "model"))
    assert row["median"] == pytest.approx(200 / 2)  # ms of one of two images
    assert row["ratio_to_fused"] == pytest.approx(1.0)  # of 2, 1 and 0.5


def test_what_runs_out_of_memory_is_a_result(monkeypatch):
    monkeypatch.setattr(choose, "_SLOWEST", 1e6)

    class Greedy(torch.nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("out of memory")

    build = builder(TINY, OPTIONS)

    def failing(attention, size):
        candidate = build(attention, size)
        if attention == "standard":
            candidate.model.head = Greedy()
            candidate.model.head.weight = torch.zeros(1)
        return candidate

    rows = [row for rows in measure_choice(failing, ["standard", "performer"], [16], **SETTINGS) for row in rows]
    statuses = {(row["attention"], row["scope"]): row["status"] for row in rows}
    assert statuses["standard", "model"] == "out of memory" and statuses["performer", "model"] == "ok"
    assert "standard" not in verdict(rows)


def test_what_runs_out_of_memory_while_it_is_built_is_a_result_too():
    build = builder(TINY, OPTIONS)

    def failing(attention, size):
        candidate = build(attention, size)
        if attention in ("standard", "fused") and not next(candidate.model.parameters()).is_meta:
            raise torch.OutOfMemoryError("out of memory")
        return candidate

    rows = [row for rows in measure_choice(failing, ["standard", "performer"], [16], **SETTINGS) for row in rows]
    statuses = {(row["attention"], row["scope"]): row["status"] for row in rows}
    for scope in ("model", "block"):
        assert statuses["standard", scope] == statuses["fused", scope] == "out of memory"
        assert statuses["performer", scope] == "ok"
    standard = next(row for row in rows if row["attention"] == "standard")
    model = ViT(ViTConfig(**TINY, image_size=16, attention="standard"))
    assert standard["parameters"] == sum(p.numel() for p in model.parameters()) and standard["macs"] == model.macs()
    assert standard["memory_bytes"] is None and "fused is out of memory here" in verdict(rows)


def test_progress_goes_on_within_an_image_size_and_names_each_mechanism():
    told = []
    rows_of(["linformer", "performer"], [16, 24], progress=lambda share, what: told.append((share, what)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[0] == 0 and 0.9 < shares[-1] <= 1
    assert len({share for share in shares if share < 0.5}) > 6
    for name in ("fused", "linformer", "performer"):
        assert {(f"building {name}, 24 px"), (f"trying {name}, block, 24 px")} <= {what for _, what in told}


def test_a_row_says_which_options_its_mechanism_had():
    for row in rows_of(["linformer", "performer"], [16]):
        expected = ViT(ViTConfig(**TINY, image_size=16, attention=row["attention"],
                                 attention_options=OPTIONS.get(row["attention"], {})))  # fmt: skip
        assert json.loads(row["options"]) == expected.attentions()[0].options.model_dump()


@pytest.mark.parametrize(
    ("attentions", "sizes", "changes", "says"),
    [
        (["linformer"], [16, 18], {}, "image_size=18, attention=fused: .*patch_size=4"),
        (["flash"], [16], {}, "attention=flash.*unknown mechanism"),
        (
            ["fused"],
            [16],
            {"precision": "float16"},
            "precision='float16': unknown, expected one of float32, tf32, bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(attentions, sizes, changes, says, monkeypatch):
    monkeypatch.setattr(choose, "interleaved", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UserError, match=says):
        rows_of(attentions, sizes, **changes)


def made(attention, ratio, low, high, memory=100, status="ok", contended=False):
    place = {"image_size": 224, "tokens": 197, "scope": "model", "attention": attention, "status": status}
    return place | {
        "ratio_to_fused": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "memory_bytes": memory,
        "contended": contended,
    }


def test_the_verdict_claims_only_what_intervals_support():
    fused = made("fused", 1.0, 1.0, 1.0)
    assert verdict([fused, made("performer", 0.97, 0.9, 1.02)]) == (
        "224 px, 197 tokens: no mechanism is faster than fused beyond timing noise."
    )
    assert verdict([fused, made("linformer", 0.8, 0.75, 0.85, memory=50), made("performer", 0.7, 0.5, 1.1)]) == (
        "224 px, 197 tokens: linformer is the fastest, 0.80 of fused's time (0.75 to 0.85); "
        "linformer takes least memory, 0.50 of fused's."
    )
    control = made("uniform", 0.5, 0.4, 0.6, memory=1)
    assert verdict([fused, control]) == "224 px, 197 tokens: no mechanism is faster than fused beyond timing noise."
    assert "measure again" in verdict([made("fused", 1.0, 1.0, 1.0, contended=True)])
    unknown = [made("fused", 1.0, 1.0, 1.0, memory=None), made("performer", 0.97, 0.9, 1.02)]
    assert verdict(unknown).endswith("no mechanism is faster than fused beyond timing noise.")
    assert verdict([made("fused", 1.0, 1.0, 1.0, memory=None)]).endswith("beyond timing noise.")
    assert "nothing to compare" in verdict([made("fused", None, None, None, None, "over budget")])


def test_the_command_writes_one_file_named_after_the_machine(effvit, tmp_path):
    flags = ("--model", "tiny", "--image-sizes", "16,32", "--attention", "performer", "--budget-s", "0.3")
    outcome = effvit("choose", *flags, "-o", "performer.num_features=8", "--output", "machines", "--threads", "1")
    assert outcome.code == 0, outcome.err
    (file,) = (tmp_path / "machines").glob("*-1t-float32.csv")
    table = pd.read_csv(file)
    assert list(table["image_size"].unique()) == [16, 32] and set(table["attention"]) == {"fused", "performer"}
    assert "16 px, 17 tokens: " in outcome.out and "32 px, 65 tokens: " in outcome.out


QUICK = ("--attention", "performer", "--budget-s", "0.2", "--threads", "1")


def test_rows_of_other_models_stay_in_the_machines_file_and_the_same_ones_are_replaced(effvit, tmp_path):
    def run(*flags, size="16"):
        outcome = effvit("choose", *QUICK, "--image-sizes", size, *flags, "--output", "machines")
        assert outcome.code == 0, outcome.err
        (file,) = (tmp_path / "machines").iterdir()
        return file.read_text().splitlines()

    heading, *first = run("--model", "tiny")
    again, *both = run("--model", "small", size="32")
    assert again == heading and both[:4] == first and len(both) == 8
    _, *third = run("--model", "tiny", "--batch-size", "2")
    assert third[:8] == both and len(third) == 12
    _, *fourth = run("--model", "tiny", "-o", "performer.num_features=8")
    assert fourth[:8] == third[4:] and len(fourth) == 12 and first[0] not in fourth
    table = pd.read_csv(next((tmp_path / "machines").iterdir()))
    assert [json.loads(each).get("num_features") for each in table["options"]].count(8) == 2


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("notes.txt", "--output notes.txt: .*notes.txt is a file, expected a directory"),
        ("notes.txt/table.csv", "is a file, expected a directory"),
        ("folder.csv/table.csv", "here-1t-float32.csv cannot be written"),
        ("machines", "not a table of `effvit choose`, to which rows could be added; move it away"),
    ],
)
def test_a_path_that_cannot_be_written_is_told_before_anything_is_measured(effvit, tmp_path, monkeypatch, output, says):
    monkeypatch.setattr(choose, "interleaved", lambda *_, **__: pytest.fail("measured"))
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "folder.csv" / "table.csv").mkdir(parents=True)
    monkeypatch.setattr("effvit.device.processor_name", lambda: "here")
    (tmp_path / "machines").mkdir()
    (tmp_path / "machines" / "here-1t-float32.csv").write_text("a,b\n1,2\n")
    (tmp_path / "folder.csv" / "table.csv" / "here-1t-float32.csv").mkdir()
    outcome = effvit("choose", "--model", "tiny", *QUICK, "--image-sizes", "16", "--output", output)
    assert outcome.code == 1 and re.search(says, outcome.err) and outcome.err.count("\n") == 1, outcome.err
    assert (tmp_path / "notes.txt").read_text() == "notes"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("-o", "k=3"), "--option k=3: expected NAME.KEY=VALUE"),
        (("--attention", "flash"), "--attention 'flash': unknown mechanism"),
        (("-o", "linformer.m=3"), "--option linformer.m: unknown option, expected one of k, share"),
        (("--timm", ""), "--timm '': expected the name of a model in timm"),
        (("--timm", "vit_tiny", "--model", "tiny"), "--model tiny --timm vit_tiny: expected one of them"),
    ],
)
def test_wrong_flags_are_told_in_one_line(effvit, flags, says):
    outcome = effvit("choose", *flags)
    assert outcome.code == 1 and outcome.err.startswith(f"error: {says}") and outcome.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--image-sizes", "224,huge"), "'--image-sizes': '224,huge': expected whole numbers"),
        (("--model", "vit_huge"), "'--model': 'vit_huge' is not one of 'tiny', 'small', 'deit_tiny'"),
    ],
)
def test_flags_that_are_no_values_are_told_in_one_line(effvit, flags, says):
    outcome = effvit("choose", *flags)
    assert outcome.code == 2 and says in outcome.err and outcome.err.count("\n") == 1


def test_timms_own_model_is_compared_with_its_attention_swapped(effvit, tmp_path):
    pytest.importorskip("timm", reason="needs timm, of the extra peers", exc_type=ImportError)
    flags = ("--timm", "vit_tiny_patch16_224", "--image-sizes", "64", "--budget-s", "0.3", "--threads", "1")
    outcome = effvit("choose", *flags, "--attention", "performer", "--output", "table.csv")
    assert outcome.code == 0, outcome.err
    table = pd.read_csv(tmp_path / "table.csv").set_index(["scope", "attention"])
    ours = ViT(ViTConfig(image_size=64, num_classes=1000, **preset("deit_tiny")))
    fused = table.loc[("model", "fused")]
    assert (fused["macs"], fused["parameters"]) == (ours.macs(), sum(p.numel() for p in ours.parameters()))
    assert table.loc[("block", "performer"), "tokens"] == 17
    outcome = effvit("choose", "--timm", "vit_none", "--image-sizes", "64")
    assert outcome.code == 1 and "--timm vit_none: timm cannot build it" in outcome.err


def test_on_a_gpu_cudnns_kernel_is_a_second_baseline_in_half_precision():
    cuda = torch.device("cuda", 0)
    assert compared(["linear", "fused"], Execution("bfloat16"), cuda) == ["fused", "fused_cudnn", "linear"]
    assert compared(["linear"], Execution("tf32"), cuda) == compared(["linear"], Execution("bfloat16"), CPU)
    assert [mechanism(name) for name in ("fused_cudnn", "linear")] == ["fused", "linear"]


def test_the_second_baseline_takes_no_other_kernel():
    class Watched(nn.Module):
        def forward(self, x):
            cuda = torch.backends.cuda
            return cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()

    candidate = Candidate(Watched(), nn.Identity(), (3, 8, 8), (5, 8), {})
    kernels = [_call(candidate, "model", 1, Execution(), CPU, cudnn=cudnn)() for cudnn in (True, False)]
    assert kernels == [(True, False, False), (True, True, True)]
