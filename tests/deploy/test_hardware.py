import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from effvit import load_model
from effvit.deploy import export, files, hardware
from effvit.deploy.footprint import peak_rss_bytes
from effvit.device import this_machine
from effvit.errors import UserError
from effvit.study import cells

pytestmark = pytest.mark.slow

MIB = 2**20


@pytest.fixture
def of_performer(exported, monkeypatch):
    """The directory of a model whose graph is there already: making one takes seconds."""
    directory = exported["performer"]
    monkeypatch.setattr(export, "_graph", lambda model: onnx.load(directory / "model.onnx"))
    return directory


@pytest.fixture
def deployed(effvit, of_performer, digits12_dir, tmp_path):
    """A directory that `effvit deploy` wrote, with its log next to it."""
    outcome = effvit("deploy", "--model-dir", of_performer, "--dataset-dir", digits12_dir, "--output-dir", "deployed")
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.out.splitlines() if "onnxruntime" in line]
    return tmp_path / "deployed"


def test_deploying_writes_every_runtimes_files_and_compares_them(effvit, deployed, of_performer, digits12_dir):
    log = deployed.with_name("deployed-log")
    assert {file.name for file in log.iterdir()} == {"deployment.json", "provenance.json"}
    assert {file.name for file in deployed.iterdir()} == {"model.safetensors", "config.json", "onnx.onnx", "int8.onnx"}
    for name, original in (("model.safetensors", "model.safetensors"), ("onnx.onnx", "model.onnx")):
        assert (deployed / name).read_bytes() == (of_performer / original).read_bytes()
    found = cells.deployment(log)
    assert found["onnx_status"] == found["int8_status"] == "ok"
    sizes = [found[f"{runtime}_bytes"] for runtime in ("model", "onnx", "int8")]
    names = ("model.safetensors", "onnx.onnx", "int8.onnx")
    assert sizes == [(deployed / name).stat().st_size for name in names]
    arguments = ("--model-dir", of_performer, "--dataset-dir", digits12_dir, "--output-dir", "again")
    assert effvit("deploy", *arguments, "--log-dir", "log").code == 0
    for name in names:
        assert (deployed.with_name("again") / name).read_bytes() == (deployed / name).read_bytes()
    assert (deployed.with_name("log") / "deployment.json").read_bytes() == (log / "deployment.json").read_bytes()


def test_every_runtime_is_measured_next_to_the_others(effvit, deployed, of_performer, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "peak_rss_bytes", lambda models: [300 * MIB, 60 * MIB, 50 * MIB])
    # Whatever threads there are for other work, these times are of one.
    monkeypatch.setattr("effvit.device.this_machine", lambda device: replace(this_machine(device), threads=2))
    outcome = effvit("hardware", "--deployed-dir", deployed, "--output-dir", "out", "--budget-s", 0.05)
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.out.splitlines() if "onnxruntime" in line]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"hardware.json", "provenance.json"}
    assert cells.measured_on(tmp_path / "out", "hardware")["threads"] == 1
    found = cells.hardware(tmp_path / "out")
    for prefix in ("", "onnx_", "int8_"):
        low, ratio, high = (found[f"{prefix}ratio_{end}"] for end in ("low", "to_fused", "high"))
        assert 0 < low <= ratio <= high
        assert 0 < found[f"{prefix}latency_q25"] <= found[f"{prefix}latency_ms"] <= found[f"{prefix}latency_q75"]
        if prefix:
            assert 0 < found[f"{prefix}speedup_low"] <= found[f"{prefix}speedup"] <= found[f"{prefix}speedup_high"]
    assert found["n_rounds"] >= 6
    model = load_model(of_performer)
    assert found["weight_bytes"] == 4 * sum(tensor.numel() for tensor in model.state_dict().values())
    assert found["peak_memory_bytes"] >= 4 * model.config.num_tokens * model.config.hidden_size
    assert (found["peak_rss_bytes"], found["int8_peak_rss_bytes"]) == (300 * MIB, 50 * MIB)


def test_a_runtime_that_is_not_supported_leaves_its_figures_empty(
    effvit, of_performer, digits12_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(hardware, "peak_rss_bytes", lambda models: [None if model is None else MIB for model in models])
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    arguments = ("--model-dir", of_performer, "--dataset-dir", digits12_dir, "--output-dir", "deployed")
    outcome = effvit("deploy", *arguments)
    assert outcome.code == 0, outcome.err
    assert {file.name for file in (tmp_path / "deployed").iterdir()} == {"model.safetensors", "config.json"}
    outcome = effvit("hardware", "--deployed-dir", "deployed", "--output-dir", "out", "--budget-s", 0.01)
    assert outcome.code == 0, outcome.err
    found = cells.deployment(tmp_path / "deployed-log") | cells.hardware(tmp_path / "out")
    assert found["onnx_status"].startswith("not supported: performer: onnxruntime's logits differ from PyTorch's by ")
    assert found["int8_status"] == found["onnx_status"]
    empty = [key for key in found if key.startswith(("onnx_", "int8_")) and not key.endswith("status")]
    assert len(empty) == 2 * 12 + 3 and all(found[key] is None for key in empty)
    assert found["latency_ms"] > 0 and found["peak_rss_bytes"] == MIB


def test_what_could_not_be_made_in_int8_leaves_no_part_of_a_file(of_performer, digits12, tmp_path, monkeypatch):
    def fails_halfway(source, target):
        target.write_bytes(source.read_bytes()[:100])
        raise UserError("no such operator")

    monkeypatch.setattr(files, "quantize", fails_halfway)
    figures = files.write_files(load_model(of_performer), of_performer, digits12, tmp_path)
    assert (figures["onnx_status"], figures["int8_status"]) == ("ok", "not supported: no such operator")
    assert list(files.files_of(tmp_path)) == ["onnx"]


def test_a_budget_of_nothing_and_a_missing_model_are_one_line(effvit, exported, digits12_dir, tmp_path):
    hardware_of, deploy = ("hardware", "--output-dir", "out", "--deployed-dir"), ("deploy", "--output-dir", "out")
    for arguments, message in (
        ((*hardware_of, exported["fused"], "--budget-s", 0), "--budget-s 0.0: must be a number above 0"),
        ((*hardware_of, "nowhere"), "nowhere/model.safetensors: no such file"),
        ((*deploy, "--dataset-dir", digits12_dir, "--model-dir", "nowhere"), "nowhere/model.safetensors: no such file"),
    ):
        outcome = effvit(*arguments)
        assert outcome.code == 1 and outcome.err.count("\n") == 1 and message in outcome.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-log").exists()


def test_memory_of_a_process_holds_the_weights_that_it_loads(tmp_path):
    files = []
    for width in (16, 4096):  # 1 KiB and 64 MiB
        weight = numpy_helper.from_array(np.ones((width, width), np.float32), "w")
        ends = [
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", width])
            for name in ("images", "logits")
        ]
        node = onnx.helper.make_node("MatMul", ["images", "w"], ["logits"])
        graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
        files.append(tmp_path / f"{width}.onnx")
        onnx.save(model, files[-1])
    small, nothing, large = peak_rss_bytes([files[0], None, files[1]])
    assert nothing is None
    assert 64 * MIB <= large - small <= 64 * MIB * 4  # the file, the weights, and onnxruntime's packed copy


def test_pytorch_and_its_model_are_resident_in_a_process_of_their_own(exported):
    (found,) = peak_rss_bytes([exported["fused"]])
    assert found > 50 * MIB


def test_the_documented_lines_run_an_exported_model_with_onnxruntime_alone(exported, digits12, tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs/hardware.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert "torch" not in block
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes((exported["linformer"] / "model.onnx").read_bytes())
    from effvit.evaluation.score import predict_logits

    images, _ = digits12.split("validation")
    expected = predict_logits(load_model(exported["linformer"]), images, digits12.mean, digits12.std, 64).argmax(dim=1)
    assert len(set(expected[:20].tolist())) > 1
    for image, label in zip(images[np.arange(20)], expected[:20].tolist(), strict=True):
        Image.fromarray(image).save("image.png")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(block, "docs/hardware.md", "exec"), {})
        assert said.getvalue().strip() == digits12.classes[label]


@pytest.mark.parametrize(
    ("stage", "file", "gone"),
    [("deploy", "deployment.json", "int8_lost"), ("hardware", "hardware.json", "onnx_ratio_low")],
)
def test_a_figure_that_is_missing_is_named(tmp_path, stage, file, gone):
    from synthetic_study import write_study

    path = write_study(tmp_path, attentions=["fused"]) / "cells/digits/fused" / stage / file
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in content.items() if key != gone}))
    read = {"deploy": cells.deployment, "hardware": cells.hardware}[stage]
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: expected {gone}; `dvc repro -f {stage}`"):
        read(path.parent)
