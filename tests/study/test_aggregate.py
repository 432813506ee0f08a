import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import typer
from scipy import stats
from synthetic_study import ATTENTIONS, write_study
from typer.testing import CliRunner

from effvit.cli.aggregate import aggregate as command
from effvit.errors import UserError
from effvit.study.aggregate import aggregate, collect, summarise

pytestmark = pytest.mark.slow

TABLES = {"curves.csv", "accuracy.csv", "cost.csv", "tradeoff.csv", "scaling.csv", "confusion.csv", "provenance.csv"}
TABLES |= {"efficiency.csv", "paired.csv", "hardware.csv"}
TABLES |= {"fidelity.csv", "replaced.csv", "cka.csv", "heads.csv", "gates.csv"}
FEW = ("fused", "linformer")
STAGE_OF = {
    "cells/digits/linformer/seed0/train/history.csv": "train",
    "cells/digits/linformer/seed0/evaluate/evaluation.json": "evaluate",
    "cells/digits/linformer/seed0/evaluate/confusion.csv": "evaluate",
    "cells/digits/linformer/seed0/evaluate/predictions.csv": "evaluate",
    "cells/digits/linformer/benchmark/model.json": "benchmark",
    "cells/digits/linformer/benchmark/cost.csv": "benchmark",
    "cells/digits/linformer/deploy/deployment.json": "deploy",
    "cells/digits/linformer/hardware/hardware.json": "hardware",
    "scaling/linformer/scaling.csv": "scaling",
    "scaling/linformer/macs.csv": "scaling",
    "cells/digits/linformer/seed0/evaluate/provenance.json": "evaluate",
    "scaling/linformer/provenance.json": "scaling",
    "analysis/digits/fidelity/fidelity.csv": "fidelity",
    "analysis/digits/fidelity/replaced.csv": "fidelity",
    "analysis/digits/representations/cka.csv": "representations",
    "analysis/digits/representations/heads.csv": "representations",
    "analysis/digits/representations/gates.csv": "representations",
    "analysis/digits/representations/provenance.json": "representations",
}
MAY_BE_EMPTY = ("analysis/digits/fidelity/replaced.csv", "analysis/digits/representations/gates.csv")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Three seeds of two data sets, read only."""
    return write_study(tmp_path_factory.mktemp("study"), datasets=("digits", "cifar10"), seeds=(0, 1, 2))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One data set, two mechanisms, one seed, read only."""
    return write_study(tmp_path_factory.mktemp("whole"), attentions=FEW, lengths=(65, 577, 4097))


@pytest.fixture
def small(whole, tmp_path):
    """A copy of `whole`, to be spoilt."""
    return shutil.copytree(whole, tmp_path / "metrics")


def evaluations(study, dataset, attention):
    files = [study / "cells" / dataset / attention / f"seed{s}" / "evaluate" / "evaluation.json" for s in (0, 1, 2)]
    return [json.loads(file.read_text())["top1"] for file in files]


def test_interval_is_students_t_over_seeds(study):
    tables = collect(study, ["digits", "cifar10"], ATTENTIONS, [0, 1, 2])
    for row in tables.accuracy.itertuples():
        top1 = evaluations(study, row.dataset, row.attention)
        expected = stats.ttest_1samp(top1, 0).confidence_interval(0.95)
        assert row.top1 == pytest.approx(np.mean(top1))
        assert (row.top1_low, row.top1_high) == pytest.approx((expected.low, expected.high))
        assert row.n_seeds == 3
        summary = summarise(tables)
        assert summary[row.dataset][row.attention] == pytest.approx(np.mean(top1), rel=1e-4)
        spread = summary["spread"][row.dataset][row.attention]
        assert spread == {"n": 3, "ci95": pytest.approx((expected.high - expected.low) / 2, rel=1e-4)}


def test_every_result_has_its_provenance(study):
    table = collect(study, ["digits", "cifar10"], FEW, [0, 2]).provenance
    stages = table.groupby("stage").size().to_dict()
    assert stages == {
        "train": 2 * 2 * 2,
        "evaluate": 2 * 2 * 2,
        "benchmark": 2 * 2,
        "deploy": 2 * 2,
        "hardware": 2 * 2,
        "scaling": 2,
    } | {
        "fidelity": 2,
        "representations": 2,
    }
    record = json.loads((study / "cells/digits/linformer/seed2/train/provenance.json").read_text())
    row = table.query("dataset == 'digits' and attention == 'linformer' and seed == 2 and stage == 'train'")
    machine = record["machine"]
    assert row[["time", "threads", "processor"]].values.tolist() == [
        [record["time"], machine["threads"], machine["processor"]]
    ]
    assert row["torch"].tolist() == [record["packages"]["torch"]]


def on_a_gpu(root, *places):
    """Let what was measured in these places be of a GPU."""
    for place in places:
        file = root / place / "provenance.json"
        record = json.loads(file.read_text())
        record["machine"] |= {"device": "cuda", "gpu": "NVIDIA H200"}
        file.write_text(json.dumps(record))


def test_what_is_measured_carries_its_machine_and_on_a_gpu_no_threads(tmp_path):
    root = write_study(tmp_path / "metrics", attentions=FEW)
    on_a_gpu(
        root, *(f"{place}/{a}{end}" for a in FEW for place, end in (("cells/digits", "/benchmark"), ("scaling", "")))
    )
    aggregate(root, tmp_path / "data", ["digits"], FEW, [0])
    tables = {
        name: pd.read_csv(tmp_path / f"data/{name}.csv") for name in ("cost", "scaling", "hardware", "provenance")
    }
    for name in ("cost", "scaling"):
        assert (tables[name][["machine", "dtype"]] == ["NVIDIA H200", "float32"]).all(axis=None), name
        assert tables[name]["threads"].isna().all(), name
    assert (tables["hardware"][["machine", "threads"]] == ["made up", 1]).all(axis=None)
    rows = tables["provenance"].set_index(["stage", "attention"])
    assert rows.loc[("benchmark", "fused"), ["device", "gpu"]].tolist() == ["cuda", "NVIDIA H200"]
    assert rows.loc[("train", "linformer"), "device"] == "cpu"


@pytest.mark.parametrize(
    ("place", "other", "stage"),
    [
        ("cells/digits/linformer/benchmark", "cells/digits/fused/benchmark", "benchmark"),
        ("cells/digits/linformer/hardware", "cells/digits/fused/hardware", "hardware"),
        ("scaling/linformer", "scaling/fused", "scaling"),
    ],
)
def test_times_of_two_machines_are_not_put_into_one_table(tmp_path, place, other, stage):
    root = write_study(tmp_path / "metrics", attentions=["fused", "linformer"])
    on_a_gpu(root, place)
    problem = f"{root / place}: measured on another machine (NVIDIA H200, float32) than {root / other} (made up, "
    with pytest.raises(UserError, match=re.escape(problem) + f".*`dvc repro -f {stage}` measures all on this one"):
        aggregate(root, tmp_path / "data", ["digits"], ["fused", "linformer"], [0])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("lacks", ["machine", "config"])
def test_provenance_without_the_machine_or_the_numbers_names_its_file_and_its_stage(tmp_path, lacks):
    root = write_study(tmp_path / "metrics", attentions=FEW)
    file = root / "scaling/fused/provenance.json"
    record = json.loads(file.read_text())
    del record[lacks]
    file.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"fused/provenance.json: expected .*`dvc repro -f scaling` makes it anew"):
        collect(root, ["digits"], FEW, [0])


def test_one_seed_has_no_interval(study):
    tables = collect(study, ["digits"], FEW, [1])
    assert tables.accuracy[["top1_low", "top1_high"]].isna().all(axis=None)
    summary = summarise(tables)
    assert set(summary) == {"digits", "cost"}
    assert set(summary["cost"]["digits"]["fused"]) == {"gmacs", "latency_ratio", "memory_mib"}


def test_differences_to_fused_are_paired_by_seed(study):
    paired = collect(study, ["digits", "cifar10"], ATTENTIONS, [0, 1, 2]).paired
    assert len(paired) == 2 * (len(ATTENTIONS) - 1) and "fused" not in set(paired["attention"])
    for row in paired.itertuples():
        test = stats.ttest_rel(evaluations(study, row.dataset, row.attention), evaluations(study, row.dataset, "fused"))
        interval = test.confidence_interval(0.95)
        assert (row.difference_low, row.difference_high) == pytest.approx((interval.low, interval.high))


def test_one_seed_has_the_interval_of_its_test_images_and_several_have_that_of_seeds(study):
    one = collect(study, ["digits"], ["hybrid"], [1]).tradeoff.iloc[0]
    n, p, z = 360, one["top1"], stats.norm.ppf(0.975)
    centre, half = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    ends = (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)
    assert (one["top1_images_low"], one["top1_images_high"]) == pytest.approx(ends)
    several = collect(study, ["digits"], ["hybrid"], [0, 1]).tradeoff
    assert several[["top1_images_low", "top1_images_high"]].isna().all(axis=None)


def test_only_selected_cells_enter_whatever_else_is_on_disk(study, tmp_path):
    tables = collect(study, ["cifar10"], ["linformer"], [2])
    assert tables.paired.empty
    for table in vars(tables).values():
        for column in table.columns[table.columns.str.startswith("attention")]:
            assert set(table[column].dropna()) <= {"linformer"}
        assert "dataset" not in table or set(table["dataset"].dropna()) <= {"cifar10"}
    assert set(tables.curves["seed"]) == {2}
    summary = summarise(tables)
    assert list(summary["cifar10"]) == list(summary["cost"]["cifar10"]) == ["linformer"]


def test_without_fused_ratios_come_from_the_cells_own_measurements(study):
    alone = collect(study, ["digits"], ["linformer"], [0])
    together = collect(study, ["digits"], FEW, [0])
    assert alone.tradeoff["latency_ratio"].notna().all()
    of_linformer = [
        (summary["digits"]["linformer"], summary["cost"]["digits"]["linformer"])
        for summary in map(summarise, (alone, together))
    ]
    assert of_linformer[0] == of_linformer[1]
    assert alone.accuracy["parameters_differ"].isna().all()


def test_more_than_a_tenth_of_other_parameters_is_marked(small):
    for parameters, differs in ((132_000, False), (132_001, True), (108_000, False), (107_999, True)):
        file = small / "cells/digits/linformer/benchmark/model.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"parameters": parameters}))
        marked = collect(small, ["digits"], FEW, [0]).accuracy.set_index("attention")["parameters_differ"]
        assert marked.to_dict() == {"fused": False, "linformer": differs}


def test_latency_is_that_of_the_benchmark_batch_and_memory_in_mib(small):
    file = small / "cells/digits/linformer/benchmark/cost.csv"
    written = pd.read_csv(file)
    at_64 = (written["quantity"] == "latency") & (written["batch_size"] == 64)
    written.loc[at_64, ["ratio_to_fused", "ratio_low", "ratio_high"]] = [10, 9, 11]
    written.to_csv(file, index=False)
    tables = collect(small, ["digits"], FEW, [0])
    cost = tables.cost[tables.cost["attention"] == "linformer"].set_index(["quantity", "batch_size"])
    row = tables.tradeoff.set_index("attention").loc["linformer"]
    assert row["batch_size"] == 64
    ends = ["ratio_to_fused", "ratio_low", "ratio_high"]
    shown = row[["latency_ratio", "latency_ratio_low", "latency_ratio_high"]].tolist()
    assert shown == [10, 9, 11] == cost.loc[("latency", 64), ends].tolist()
    assert row["train_memory_mib"] * 1024 * 1024 == pytest.approx(cost.loc[("train_memory", 64), "median"])


def test_fused_is_its_own_measure_and_what_was_measured_of_it_stays_in_the_costs(small):
    file = small / "cells/digits/fused/benchmark/cost.csv"
    cost = pd.read_csv(file)
    cost.loc[cost["quantity"] == "latency", ["ratio_to_fused", "ratio_low", "ratio_high"]] = [0.87, 0.8, 0.9]
    cost.to_csv(file, index=False)
    tables = collect(small, ["digits"], FEW, [0])
    row = tables.tradeoff.set_index("attention").loc["fused"]
    assert row[["latency_ratio", "latency_ratio_low", "latency_ratio_high"]].tolist() == [1, 1, 1]
    assert summarise(tables)["cost"]["digits"]["fused"]["latency_ratio"] == 1
    measured = tables.cost.query("attention == 'fused' and quantity == 'latency'")
    assert (measured[["ratio_to_fused", "ratio_low", "ratio_high"]] == [0.87, 0.8, 0.9]).all(axis=None)


def test_what_could_not_be_measured_is_left_out_of_the_summary(small):
    file = small / "cells/digits/linformer/benchmark/cost.csv"
    cost = pd.read_csv(file)
    cost.loc[cost["quantity"] == "train_memory", ["median", "ratio_to_fused"]] = np.nan
    cost.to_csv(file, index=False)
    cost = summarise(collect(small, ["digits"], FEW, [0]))["cost"]["digits"]
    assert "memory_mib" in cost["fused"] and "memory_mib" not in cost["linformer"]


def test_confusion_counts_every_test_image_of_every_seed(study):
    confusion = collect(study, ["digits"], ["hybrid"], [0, 1, 2]).confusion
    assert confusion["count"].sum() == 3 * 360
    assert not confusion.duplicated(["actual", "predicted"]).any()
    right = confusion.loc[confusion["actual"] == confusion["predicted"], "count"].sum()
    assert right / (3 * 360) == pytest.approx(np.mean(evaluations(study, "digits", "hybrid")))


def test_classes_may_be_called_like_missing_values(small):
    file = small / "cells/digits/fused/seed0/evaluate/confusion.csv"
    file.write_text("actual,predicted,count\nnan,null,3\nNA,nan,1\n")
    confusion = collect(small, ["digits"], ["fused"], [0]).confusion
    assert confusion["actual"].tolist() == ["nan", "NA"]


def test_scaling_keeps_stopped_points_and_adds_exact_macs(study):
    scaling = collect(study, ["digits"], ["standard"], [0]).scaling
    stopped = scaling[scaling["status"] == "out of memory"]
    assert len(stopped) and stopped["median"].isna().all() and stopped["macs"].notna().all()


def test_what_a_runtime_does_not_support_stays_in_the_table(study):
    table = collect(study, ["digits"], ATTENTIONS, [0]).hardware.set_index("attention")
    assert table.loc["hybrid", "onnx_status"].startswith("not supported: ")
    assert table.loc["hybrid", ["onnx_latency_ms", "onnx_bytes", "int8_top1"]].isna().all()
    assert table.loc["performer", "int8_status"] != "ok" and table.loc["performer", "onnx_speedup"] == 2.5
    assert (table["latency_ms"] > 0).all() and table.loc["fused", "int8_bytes"] == 180_000


def test_files_are_the_same_bytes_at_each_run_and_the_summary_holds_numbers_only(study, tmp_path):
    written = []
    for name in ("a", "b"):
        aggregate(study, tmp_path / name, ["digits", "cifar10"], ATTENTIONS, [0, 1, 2])
        files = [*sorted((tmp_path / name).iterdir()), study / "summary.json"]
        written.append({file.name: file.read_bytes() for file in files})
    assert written[0] == written[1]
    assert set(written[0]) == TABLES | {"summary.json"}
    summary = json.loads(written[0]["summary.json"])
    waiting, leaves = [summary], []
    while waiting:
        for value in waiting.pop().values():
            (waiting if isinstance(value, dict) else leaves).append(value)
    assert len(leaves) == 2 * len(ATTENTIONS) * 6
    assert all(isinstance(x, (int, float)) for x in leaves)
    assert list(summary) == ["digits", "cifar10", "cost", "spread"] and list(summary["digits"]) == list(ATTENTIONS)


@pytest.mark.parametrize("file", STAGE_OF)
def test_a_missing_file_is_named_with_the_stage_that_makes_it(small, tmp_path, file):
    (small / file).unlink()
    with pytest.raises(UserError, match=re.escape(f"{small / file}: missing; `dvc repro {STAGE_OF[file]}` makes it")):
        aggregate(small, tmp_path / "data", ["digits"], FEW, [0])
    assert not (tmp_path / "data").exists() and not (small / "summary.json").exists()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"a,b\n1,2\n", b"\xff\xfe\x00", b'{"top1": "much", "macs": null}']
)
@pytest.mark.parametrize("file", STAGE_OF)
def test_a_malformed_file_is_named_with_the_stage_that_makes_it(small, tmp_path, file, content):
    (small / file).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{small / file}: ")) as caught:
        aggregate(small, tmp_path / "data", ["digits"], FEW, [0])
    assert f"`dvc repro -f {STAGE_OF[file]}`" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists() and not (small / "summary.json").exists()


@pytest.mark.parametrize("file", [f for f in STAGE_OF if f.endswith(".csv") and f not in MAY_BE_EMPTY])
def test_a_table_without_rows_or_with_words_for_numbers_is_malformed(small, file):
    lines = (small / file).read_text().splitlines()
    for rows in ([], [re.sub(r"\d+(\.\d+)?", "many", line) for line in lines[1:]]):
        (small / file).write_text("\n".join([lines[0], *rows]) + "\n")
        with pytest.raises(UserError, match=re.escape(f"{small / file}: ")):
            collect(small, ["digits"], FEW, [0])


def test_an_analysis_of_other_mechanisms_than_the_selected_is_told(small):
    for stage, file in (("fidelity", "fidelity.csv"), ("representations", "heads.csv")):
        path = small / "analysis/digits" / stage / file
        whole = path.read_text()
        path.write_text("".join(line for line in whole.splitlines(keepends=True) if "linformer" not in line))
        with pytest.raises(UserError, match=f"{stage}: nothing with linformer; `dvc repro -f {stage}`"):
            collect(small, ["digits"], FEW, [0])
        path.write_text(whole)


def test_without_fused_or_a_gate_there_are_no_rows_about_them(tmp_path):
    write_study(tmp_path, attentions=["linformer"])
    tables = collect(tmp_path, ["digits"], ["linformer"], [0])
    assert tables.replaced.empty and tables.gates.empty and len(tables.fidelity)


@pytest.mark.parametrize("quantity", ["latency", "train_memory"])
def test_a_cost_table_without_a_needed_quantity_is_malformed(small, quantity):
    file = small / "cells/digits/fused/benchmark/cost.csv"
    cost = pd.read_csv(file)
    cost[cost["quantity"] != quantity].to_csv(file, index=False)
    with pytest.raises(UserError, match=f"no row for {quantity}; `dvc repro -f benchmark`"):
        collect(small, ["digits"], FEW, [0])


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (([], FEW, [0]), "dataset: expected one or more, each once, got none"),
        ((["digits"], ["fused", "fused"], [0]), "attention: expected one or more, each once, got fused, fused"),
        ((["digits"], FEW, [0, 0]), "seed: expected one or more, each once, got 0, 0"),
    ],
)
def test_an_empty_selection_or_a_duplicate_is_refused(small, selection, message):
    with pytest.raises(UserError, match=message):
        collect(small, *selection)


def test_tables_and_summary_are_written_together_or_not_at_all(small, tmp_path, monkeypatch):
    aggregate(small, tmp_path / "data", ["digits"], FEW, [0])
    before = {file: file.read_bytes() for file in [*(tmp_path / "data").iterdir(), small / "summary.json"]}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effvit.study.aggregate.write_json", full)
    with pytest.raises(OSError):
        aggregate(small, tmp_path / "data", ["digits"], ["fused"], [0])
    assert {file: file.read_bytes() for file in [*(tmp_path / "data").iterdir(), small / "summary.json"]} == before


def test_command_gathers_the_named_cells(small, tmp_path):
    app = typer.Typer()
    app.command()(command)
    arguments = ["--metrics-dir", str(small), "--plots-data-dir", str(tmp_path / "data")]
    result = CliRunner().invoke(app, [*arguments, "--dataset", "digits", "--attention", "linformer", "--seed", "0"])
    assert result.exit_code == 0, result.output
    assert {file.name for file in (tmp_path / "data").iterdir()} == TABLES
    assert list(json.loads((small / "summary.json").read_text())["digits"]) == ["linformer"]


def test_tables_are_of_the_first_precision_execution_and_width(small):
    before = collect(small, ["digits"], FEW, [0])
    for file in ("cells/digits/linformer/benchmark/cost.csv", "scaling/linformer/scaling.csv"):
        table = pd.read_csv(small / file)
        others = [table.assign(execution="compiled"), table.assign(precision="bfloat16")]
        if "hidden_size" in table:
            others.append(table[table["scope"] == "block"].assign(hidden_size=384))
        pd.concat([table, *others]).assign(median=1.0).to_csv(small / file, index=False)
    after = collect(small, ["digits"], FEW, [0])
    for name in ("cost", "scaling"):
        assert len(getattr(after, name)) == len(getattr(before, name))


def test_points_at_which_a_gpu_waits_are_no_finding(small):
    for attention in FEW:
        for file in (f"cells/digits/{attention}/benchmark/cost.csv", f"scaling/{attention}/scaling.csv"):
            table = pd.read_csv(small / file)
            in_time = table["unit"] != "bytes"
            table.assign(launch_bound=in_time).to_csv(small / file, index=False)
    tables = collect(small, ["digits"], FEW, [0])
    assert set(tables.efficiency["quantity"]) == {"memory"}
    others = tables.tradeoff[tables.tradeoff["attention"] != "fused"]
    assert others["latency_ratio"].isna().all() and others["train_memory_mib"].notna().all()
