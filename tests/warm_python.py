"""A ``python`` for scratch repositories whose stages start with the slow libraries loaded: seconds less for each.

A server imports what stages need of others, nothing of effvit, and forks for every ``python -m stages.NAME``. The child
has the caller's directory, environment, standard streams and process group, and is killed where the caller ends first;
the caller has its exit status. All other commands run as usual, and so do all where a process has no file descriptor.
"""

import atexit
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path

SLOW = (
    "torch",
    "torch._dynamo",
    "lightning_fabric",
    "pandas",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "scipy.stats",
    "sklearn.datasets",
    "ptflops",
    "onnxruntime",
    "onnxscript",
    "pydantic",
    "typer",
    "rich.progress",
)
_COLD = ("stages.jobs",)  # starts DVCs of its own, and is what signals are sent to

_CALLER = """#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1:2] != ["-m"] or not sys.argv[2].startswith("stages.") or sys.argv[2] in {cold!r}:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    said = json.dumps([sys.argv[2:], os.getcwd(), os.getpgrp(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(said).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(said)
    status = int(server.recv(8) or b"1")
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""


def directory() -> Path | None:
    """Where that ``python`` is, with its server running until this process ends; None where there cannot be one."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        return None
    if not _started:
        _started.append(_start())
    return _started[0]


_started: list[Path] = []


def _start() -> Path:
    place = Path(tempfile.mkdtemp(prefix="warm-"))
    caller = place / "python"
    caller.write_text(_CALLER.format(python=sys.executable, cold=_COLD, address=str(place / "socket")))
    caller.chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # read when the libraries are loaded
    command = [sys.executable, __file__, str(place / "socket")]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == b"ready\n"
    atexit.register(shutil.rmtree, place)
    atexit.register(server.kill)
    return place


def _serve(address: str) -> None:
    for name in SLOW:
        __import__(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how those that wait for stages ended
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(64)
        print("ready", flush=True)
        while True:
            caller, _ = server.accept()
            if not os.fork():
                server.close()
                _run_for(caller)
            caller.close()


def _run_for(caller: socket.socket) -> None:
    """Run a stage in a child, say how it ended, and end it where its caller ends first."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(caller, 8, 3)
    said = b""
    while len(said) < int.from_bytes(length, "big"):
        said += caller.recv(2**20)
    stage = os.fork()
    if not stage:
        caller.close()
        _become(streams, *json.loads(said))
    ended = os.pidfd_open(stage)
    ready, _, _ = select.select([ended, caller], [], [])
    if ended not in ready:
        os.kill(stage, signal.SIGKILL)
    _, status = os.waitpid(stage, 0)
    if ended in ready:
        caller.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(streams: list[int], arguments: list[str], cwd: str, group: int, environment: dict[str, str]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    with suppress(PermissionError):  # of another session, as in DVC's queue
        os.setpgid(0, group)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, cwd
    status = 0
    try:
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if isinstance(exit_.code, str):
            print(exit_.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter does when it ends
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
