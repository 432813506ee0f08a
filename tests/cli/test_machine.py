import json

import torch


def test_the_record_is_printed_a_field_a_line(effvit):
    outcome = effvit("machine", "--device", "cpu")
    assert outcome.code == 0
    fields = dict(line.split(": ", 1) for line in outcome.out.splitlines())
    assert fields["device"] == "cpu" and fields["gpu"] == "–"
    assert fields["threads"] == str(torch.get_num_threads())


def test_a_record_is_written_once_and_then_left_as_it_is(effvit, tmp_path):
    first = effvit("machine", "--device", "cpu", "--output", "metrics/machine.json")
    assert first.code == 0 and first.out.endswith(": no earlier record, measured stages run\n")
    file = tmp_path / "metrics/machine.json"
    written = file.stat()
    second = effvit("machine", "--device", "cpu", "--output", "metrics/machine.json")
    assert f"cpu, {torch.get_num_threads()} thread" in second.out
    assert second.out.endswith(": as before, measured results are up to date with it\n")
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (written.st_ino, written.st_mtime_ns)


def test_another_machine_is_told_by_what_differs(effvit, tmp_path):
    effvit("machine", "--device", "cpu", "--output", "machine.json")
    record = json.loads((tmp_path / "machine.json").read_text())
    earlier = record | {"device": "cuda", "gpu": "NVIDIA H200"}
    (tmp_path / "machine.json").write_text(json.dumps(earlier))
    outcome = effvit("machine", "--device", "cpu", "--output", "machine.json")
    assert "device was cuda and is cpu, gpu was NVIDIA H200 and is none; measured stages run again" in outcome.out
    assert json.loads((tmp_path / "machine.json").read_text()) == record


def test_a_damaged_record_is_replaced(effvit, tmp_path):
    (tmp_path / "machine.json").write_text('{"device":')
    outcome = effvit("machine", "--device", "cpu", "--output", "machine.json")
    assert outcome.code == 0 and "no earlier record" in outcome.out
    assert json.loads((tmp_path / "machine.json").read_text())["device"] == "cpu"


def test_a_device_that_is_not_there_is_one_line(effvit, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = effvit("machine", "--device", "cuda", "--output", "machine.json")
    assert outcome.code == 1 and outcome.err == "error: --device cuda: not available on this machine; try auto or cpu\n"
    assert not (tmp_path / "machine.json").exists()
