import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from effvit.measure import alone
from effvit.measure.alone import Load, measuring_alone

HOLD = """
import sys, time
from effvit.measure.alone import measuring_alone
with measuring_alone():
    print("measuring", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start processes that measure until their standard input ends, each with a TMPDIR of its own."""
    monkeypatch.setenv("EFFVIT_LOCK", str(tmp_path / "lock"))
    processes = []

    def begin():
        directory = tmp_path / f"tmp{len(processes)}"
        directory.mkdir()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"TMPDIR": str(directory)}
        processes.append(subprocess.Popen([sys.executable, "-c", HOLD], env=environment, **pipes))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


@pytest.mark.parametrize("end", ["killed", "done"])
@pytest.mark.slow
def test_a_second_process_says_that_it_waits_and_measures_when_the_first_is_done_or_killed(start, end):
    first = start()
    assert first.stdout.readline() == "measuring\n"
    second = start()
    assert second.stderr.readline().startswith("waiting for another measurement on this machine to end")
    assert second.poll() is None
    first.send_signal(signal.SIGKILL) if end == "killed" else first.stdin.close()
    assert second.stdout.readline() == "measuring\n"


def test_the_lock_is_the_machines_and_readable_by_all_users_whatever_the_mask(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(alone, "_open", lambda path, real=alone._open: opened.append(path) or real(tmp_path / "lock"))
    monkeypatch.delenv("EFFVIT_LOCK", raising=False)
    mask = os.umask(0o077)
    try:
        for directory in ("a", "b"):
            monkeypatch.setenv("TMPDIR", str(tmp_path / directory))
            with measuring_alone():
                pass
    finally:
        os.umask(mask)
    assert len(set(opened)) == 1
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o644


def test_each_gpu_has_a_lock_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFVIT_LOCK", str(tmp_path / "lock"))
    monkeypatch.setattr(alone, "gpu_uuid", lambda device: f"GPU-{device.index}")
    with measuring_alone(), measuring_alone(torch.device("cuda", 0)), measuring_alone(torch.device("cuda", 1)):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "lock-GPU-0", "lock-GPU-1"]


@pytest.fixture
def clocks(monkeypatch):
    """Wall, machine's and own processor seconds, to be set."""
    now = {"wall": 100.0, "busy": 50.0, "own": 7.0}
    monkeypatch.setattr(alone, "_clocks", lambda: (now["wall"], now["busy"], now["own"]))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return now


@pytest.mark.parametrize(
    ("busy", "own", "share", "contended"),
    [
        (0.0, 0.0, 0.0, False),
        (20.0, 20.0, 0.0, False),  # ours alone
        (20.0, 18.5, 0.0375, False),
        (20.0, 16.0, 0.1, True),
        (40.0, 0.0, 1.0, True),
        (20.0, 20.5, 0.0, False),  # clocks that disagree by a little
    ],
)
def test_the_load_is_what_the_machine_did_but_for_this_process(clocks, busy, own, share, contended):
    load = Load()
    clocks["wall"] += 10.0
    clocks["busy"] += busy
    clocks["own"] += own
    assert load.other_load() == pytest.approx(share)
    assert load.contended() is contended


def test_a_tick_of_the_kernels_clock_is_no_contention(clocks):
    load = Load()
    clocks["wall"] += 0.01
    clocks["busy"] += 0.02
    assert not load.contended()


def test_a_busy_process_beside_this_one_is_seen():
    enough = 1 + os.cpu_count() // 8  # more than an eighth of the machine
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(enough)]
    try:
        load = Load()
        time.sleep(0.6)
        assert load.contended() and load.other_load() > 0.1 / os.cpu_count()
    finally:
        for process in busy:
            process.kill()
            process.wait()
