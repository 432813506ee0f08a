import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from effvit.study.jobs import _gpus, devices, run_all, usual_count


def python(code):
    return [sys.executable, "-c", textwrap.dedent(code)]


@pytest.mark.parametrize(
    ("count", "gpus", "threads", "expected"),
    [
        (1, [], "8", [{"OMP_NUM_THREADS": "8"}]),
        (3, [], "1", [{"OMP_NUM_THREADS": "1"}] * 3),
        (
            3,
            ["0", "GPU-b"],
            "2",
            [{"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "GPU-b", "0")],
        ),
    ],
)
def test_each_job_has_its_gpu_and_its_threads(count, gpus, threads, expected):
    assert devices(count, gpus, threads) == expected


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [(None, 2, ["0", "1"]), ("1,GPU-b", 2, ["1", "GPU-b"]), ("0,-1,1", 1, ["0"]), ("0,7", 1, ["0"]), ("", 0, [])],
)
def test_gpus_are_those_that_cuda_counts(monkeypatch, visible, count, expected):
    """CUDA counts the devices of the list up to the first that is not there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _gpus() == expected


@pytest.mark.parametrize(
    ("device", "gpus", "cores", "expected"),
    [("auto", 4, 64, 4), ("cuda", 1, 64, 1), ("cpu", 4, 64, 2), ("auto", 0, 64, 2), ("auto", 0, 1, 1)],
)
def test_usually_each_gpu_has_a_job_or_the_cpu_two(monkeypatch, device, gpus, cores, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("effvit.study.jobs.cores", lambda: cores)
    assert usual_count(device) == expected


def test_as_many_run_at_a_time_as_there_are_places_each_in_its_own(tmp_path):
    """Each notes who else is running when it starts; the first two wait for one another."""
    code = f"""
    import os, pathlib, time
    here = pathlib.Path({str(tmp_path)!r})
    mine = here / os.environ["NAME"]
    mine.touch()
    print(sorted(path.name for path in here.iterdir()))
    deadline = time.monotonic() + 60
    while not (here / "met").exists() and sum(1 for _ in here.iterdir()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    (here / "met").touch()
    mine.unlink()
    """
    lines = []
    failed = run_all({f"job{n}": python(code) for n in range(5)}, [{"NAME": "one"}, {"NAME": "two"}], lines.append)
    assert failed == {}
    seen = [line.partition("] ")[2] for line in lines if line.startswith("[job")]
    assert len(seen) == 5 and "['one', 'two']" in {line.replace("'met', ", "") for line in seen}
    ended = [line.split(":")[0] for line in lines if line.endswith("done")]
    assert [line.split(",")[0] for line in ended] == [f"{n} of 5 cells ended" for n in range(1, 6)]
    for n, line in enumerate(ended, 1):  # one that ended may be counted before its place is taken again
        running, waiting = (int(part.split()[0]) for part in line.split(", ")[1:])
        assert running <= 2 and n + running + waiting == 5


def test_lines_are_said_one_at_a_time():
    inside, met = threading.Lock(), []

    def say(line):
        met.append(not inside.acquire(blocking=False))
        time.sleep(0.001)
        inside.release()

    run_all({f"job{n}": python("for n in range(50): print(n)") for n in range(3)}, [{}] * 3, say)
    assert met == [False] * 153


def test_a_job_that_fails_is_named_with_what_it_said_and_the_others_finish():
    lines = []
    commands = {"good": python("print('fine')"), "bad": python("print('what went wrong'); raise SystemExit(3)")}
    commands |= {"killed": python("import os; os.kill(os.getpid(), 9)"), "last": python("print('fine too')")}
    failed = run_all(commands, [{}], lines.append)
    assert failed == {"bad": (3, ["what went wrong"]), "killed": (-9, [])}
    assert "[good] fine" in lines and "[last] fine too" in lines
    assert lines[-1] == "4 of 4 cells ended, 2 failed, 0 running, 0 waiting: last done"


@pytest.mark.parametrize(
    ("number", "before", "job", "status"),
    [
        (signal.SIGINT, "", "", 130),
        (signal.SIGHUP, "", "", 129),
        (signal.SIGTERM, "signal.signal(signal.SIGINT, signal.SIG_IGN)", "", 143),
        (signal.SIGTERM, "jobs._GRACE_S = 0.2", "signal.signal(signal.SIGINT, signal.SIG_IGN)", 143),
    ],
    ids=["Ctrl-C", "a terminal that closes", "kill, started with &", "kill, a job that ignores Ctrl-C"],
)
@pytest.mark.slow
def test_what_ends_it_ends_all_that_run_and_starts_no_more(tmp_path, number, before, job, status):
    """What a job started is ended as well: the file of one that was not would grow."""
    child = "import pathlib, sys, time\nwhile True:\n  pathlib.Path(sys.argv[1]).touch(); time.sleep(0.05)"
    parent = f"import signal, subprocess, sys\n{job}\nsubprocess.run([sys.executable, '-c', {child!r}, sys.argv[1]])"
    code = f"""
    import signal, sys
    from effvit.errors import one_line_errors
    from effvit.study import jobs
    {before}
    commands = {{str(n): [sys.executable, "-c", {parent!r}, {str(tmp_path)!r} + f"/{{n}}"] for n in range(4)}}
    with one_line_errors():
        jobs.run_all(commands, [{{}}, {{}}], print)
    """
    process = subprocess.Popen(python(code), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(timeout=60) == status
    before = {path.name: path.stat().st_mtime for path in tmp_path.iterdir()}
    time.sleep(0.3)
    assert {path.name: path.stat().st_mtime for path in tmp_path.iterdir()} == before and len(before) == 2


def test_ctrl_c_reaches_the_others_while_the_terminal_is_stopped(tmp_path):
    started, told, order = tmp_path / "started", tmp_path / "told", []

    def wait(path):
        deadline = time.monotonic() + 60
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.02)

    def say(line):
        if line.startswith("1 of 2"):
            os.kill(os.getpid(), signal.SIGINT)
            wait(told)
            order.append(told.exists())

    waits = f"""
    import pathlib, time
    try:
        pathlib.Path({str(started)!r}).touch()
        time.sleep(60)
    except KeyboardInterrupt:
        pathlib.Path({str(told)!r}).touch()
    """
    ends = f"import pathlib, time\nwhile not pathlib.Path({str(started)!r}).exists(): time.sleep(0.02)"
    with pytest.raises(KeyboardInterrupt):
        run_all({"waits": python(waits), "ends": python(ends)}, [{}, {}], say, harmless(order))
    assert order == ["asked", True]


@contextmanager
def harmless(order):
    order.append("asked")
    yield


def test_what_a_killed_job_started_ends_with_it(tmp_path):
    """It would write a file after the time that its job is waited for, and has the job's output open until then."""
    late = f"import pathlib, time\ntime.sleep(30)\npathlib.Path({str(tmp_path / 'late')!r}).touch()"
    job = f"""
    import os, subprocess, sys
    subprocess.Popen([sys.executable, "-c", {late!r}])
    os.kill(os.getpid(), 9)
    """
    assert run_all({"job": python(job)}, [{}], lambda line: None) == {"job": (-9, [])}
    assert not (tmp_path / "late").exists()
