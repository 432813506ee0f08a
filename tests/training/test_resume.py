import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY, TINY_FLAGS
from PIL import Image
from processes import finished, read_until
from safetensors.torch import save

from effvit import policy
from effvit.data.preparing import prepare
from effvit.device import this_machine
from effvit.training import resume
from effvit.training import run as run_module
from effvit.training.loop import Training
from effvit.training.recipe import TrainConfig
from effvit.training.resume import Store, fingerprint, open_store
from effvit.training.run import train_to

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RECIPE = {"epochs": 3, "batch_size": 128, "lr": 3e-3, "crop_padding": 1, "device": "cpu", "checkpoint_s": 0.0}

MACHINE = this_machine(torch.device("cpu"))
ANOTHER = replace(MACHINE, device="cuda", gpu="NVIDIA H200")

# Everything that has a state of its own, or chance: two optimisers, averages, features redrawn, dropout, mixing.
EVERYTHING = {
    "epochs": 6,
    "batch_size": 64,
    "optimizer": "muon",
    "lr": 3e-3,
    "clip_norm": 1.0,
    "crop_padding": 1,
    "randaugment": 9,
    "random_erasing": 0.2,
    "mixup": 0.8,
    "cutmix": 1.0,
    "ema_decay": 0.9,
    "save_every": 2,
    "device": "cpu",
}

# Trains in a child of a process that has the slow libraries already; kills it at random moments, twenty times. By turns
# the state is saved after each step, and after epochs alone, so that a kill falls several steps later, which are then
# done again.
KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from effvit.training.recipe import TrainConfig
from effvit.data.loading.prepared import PreparedDataset
from effvit.training.run import train_to
from effvit.training.loop import Training
from effvit.model.vit import ViTConfig

job = json.loads(sys.argv[1])
dataset = PreparedDataset.load(Path(job["dataset"]))

take_step = Training._take_step

def start(name, checkpoint_s=0.0, most=None):
    child = os.fork()
    if not child:
        os.environ["EFFVIT_STATE"] = name + "-state"
        log = os.open(name + "-steps", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

        def counted(self, *args):
            nonlocal most
            if most == 0:
                time.sleep(600)  # the kill is late: without it the run could be over before
            most = most and most - 1
            os.write(log, b"%d\\n" % (self.epoch * self.steps_per_epoch + self.step))
            return take_step(self, *args)

        Training._take_step = counted
        config, recipe = ViTConfig(**job["model"]), TrainConfig(**job["recipe"], checkpoint_s=checkpoint_s)
        train_to(Path(name), Path(name + "-log"), config, dataset, recipe, seed=0, horizontal_flip=True)
        os._exit(0)
    return child

def end(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def steps(name):
    log = Path(name + "-steps")
    return len(log.read_text().split()) if log.exists() else 0

began = time.monotonic()
assert end(start("whole")) == 0
step = (time.monotonic() - began) / steps("whole")
moments = random.Random(0)
for killed in range(10):
    wanted = moments.randrange(10)  # by steps, so that the run is not over however fast it gets
    until = steps("killed") + wanted
    child = start("killed", checkpoint_s=1e9 if killed % 2 else 0.0, most=wanted + 2)
    while steps("killed") < until and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(step / 20)
    time.sleep(moments.uniform(0, step))
    os.kill(child, signal.SIGKILL)
    code = end(child)
    assert code == -signal.SIGKILL, f"it ended with {code} after {killed} kills"
state = list(Path("killed-state/runs").glob("*/state"))
assert len(state) == 1 and not Path("killed").exists()
assert end(start("killed")) == 0
"""


def files(directory):
    """Every file below a directory that must be the same at every run, with its bytes."""
    paths = [*directory.rglob("*.safetensors"), *directory.rglob("history.csv"), *directory.rglob("config.json")]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def test_ten_kills_change_no_byte(tmp_path, digits_dir):
    model = {"image_size": 16, "attention": "performer", "attention_options": {"num_features": 8, "redraw_every": 7}}
    model |= TINY | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    job = json.dumps({"dataset": str(digits_dir), "model": model, "recipe": EVERYTHING})
    result = subprocess.run(
        [sys.executable, "-c", KILLS, job], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for part in ("", "-log"):
        whole, killed = files(tmp_path / f"whole{part}"), files(tmp_path / f"killed{part}")
        assert whole and whole.keys() == killed.keys()
        assert [name for name in whole if whole[name] != killed[name]] == []
    assert "resuming at" in result.stderr
    steps = [int(step) for step in (tmp_path / "killed-steps").read_text().split()]
    again = [last - first + 1 for last, first in itertools.pairwise(steps)]
    assert max(again) >= 3, "some kills fall several steps after the state was saved"
    assert list((tmp_path / "killed-state" / "runs").iterdir()) == [], "it is removed when the run is over"


@pytest.fixture
def run(tmp_path, digits, tiny_config, monkeypatch):
    """Train into tmp_path/<name>; ``stop`` sends this process a signal in the step of that number."""
    monkeypatch.setenv("EFFVIT_STATE", str(tmp_path / "state"))

    def start(name="run", *, stop=None, sent=signal.SIGTERM, dataset=digits, **changes):
        steps = []
        take_step = Training._take_step

        def counted(self, *args):
            steps.append(1)
            if len(steps) == stop:
                os.kill(os.getpid(), sent)
            return take_step(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(Training, "_take_step", counted)
            recipe = TrainConfig(**(RECIPE | changes))
            place = tmp_path / name, tmp_path / f"{name}-log"
            train_to(*place, tiny_config(), dataset, recipe, seed=0, horizontal_flip=False)
        return files(tmp_path / name), files(tmp_path / f"{name}-log"), len(steps)

    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits, tiny_config):
    """What `run` makes when nobody stops it: files of the model and of the log, and the number of steps."""
    directory = tmp_path_factory.mktemp("whole")
    place = directory / "run", directory / "run-log"
    train_to(*place, tiny_config(), digits, TrainConfig(**RECIPE), seed=0, horizontal_flip=False)
    return *map(files, place), RECIPE["epochs"] * -(-digits.counts["train"] // RECIPE["batch_size"])


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_asked_to_stop_ends_after_its_step_and_goes_on_there(run, whole, tmp_path, capsys, sent, status):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    # The state is written because of the signal, not because it was time to.
    with pytest.raises(SystemExit) as caught:
        run("stopped", stop=15, sent=sent, checkpoint_s=1000.0)
    assert caught.value.code == status
    assert "stopped at epoch 2, step 5 of 11" in capsys.readouterr().err
    assert not (tmp_path / "stopped").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    *continued, rest = run("stopped")
    assert (*continued, rest + 15) == whole


def test_a_run_that_is_asked_to_stop_while_it_validates_takes_one_more_step_or_is_over(run, whole, monkeypatch, capsys):
    validate = Training.validate

    def asked(self):
        if self.epoch + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(self)

    monkeypatch.setattr(Training, "validate", asked)
    at = 1
    with pytest.raises(SystemExit) as caught:
        run("stopped")
    assert caught.value.code == 143 and "stopped at epoch 2, step 2 of 11" in capsys.readouterr().err
    at = 3
    assert run("last")[:2] == whole[:2]


def brightened(digits):
    """The digits with one training image a little lighter."""
    images = digits.images["train"].copy()
    images[digits.arrays["train_indices"][3], 0, 0, 0] ^= 1
    return type(digits)(**(vars(digits) | {"images": {**digits.images, "train": images}}))


@pytest.mark.parametrize("change", ["recipe", "pixel", "machine"])
def test_a_state_of_another_run_is_not_gone_on_from(run, digits, change, monkeypatch):
    changed = {"recipe": {"lr": 2e-3}, "pixel": {"dataset": brightened(digits)}}.get(change, {})
    with pytest.raises(SystemExit):
        run("stopped", stop=15)
    with monkeypatch.context() as patch:
        if change == "machine":
            patch.setattr(run_module, "this_machine", lambda device: ANOTHER)
        *_, steps = run("changed", **changed)
    assert steps == 33
    assert run("stopped")[2] == 33 - 15, "the one that is stopped still has its own"


def sealed(content):
    return content + resume._checksum(content)


DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "all but a byte": lambda content: content[:-1],
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(4),
    "no numbers": lambda content: sealed(save({"a": torch.ones(2)})),
    "numbers that are none": lambda content: sealed(save({}, {"numbers": "{"})),
    "a bit flipped": lambda content: content[:-900] + bytes([content[-900] ^ 1]) + content[-899:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_state_is_told_in_one_line_and_ignored(run, whole, tmp_path, capsys, damage):
    with pytest.raises(SystemExit):
        run("stopped", stop=2)
    (state,) = (tmp_path / "state" / "runs").glob("*/state")
    state.write_bytes(DAMAGES[damage](state.read_bytes()))
    capsys.readouterr()
    assert run("stopped") == whole
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": damaged" in line]
    assert str(state) in line


@pytest.mark.skipif(os.name != "posix", reason="directories of POSIX")
def test_outputs_are_on_the_disk_before_the_state_is_gone(run, tmp_path, monkeypatch):
    synced, checked = set(), []
    fsync, remove = os.fsync, Store.remove

    def noted(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def checking(store):
        outputs = [path for name in ("run", "run-log") for path in (tmp_path / name, *(tmp_path / name).rglob("*"))]
        checked.extend(outputs)
        assert [path for path in (tmp_path, *outputs) if path.stat().st_ino not in synced] == []
        remove(store)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Store, "remove", checking)
    run(epochs=2, save_every=1)
    assert tmp_path / "run" / "epoch-001" / "model.safetensors" in checked


def test_a_write_that_fails_leaves_the_state_before(tmp_path, monkeypatch):
    store = Store(tmp_path, print)
    store.save({"a": torch.ones(2)}, {"step": 1, "loss": 0.1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        store.save({"a": torch.zeros(2)}, {"step": 2})
    assert caught.value.filename == str(tmp_path / "state")
    tensors, numbers = store.load()
    assert torch.equal(tensors["a"], torch.ones(2)) and numbers == {"step": 1, "loss": 0.1}


def test_two_processes_with_the_same_run_do_not_share_a_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFVIT_STATE", str(tmp_path))
    with open_store("name", print) as one, open_store("name", print) as two:
        assert one.directory != two.directory
    with open_store("name", print) as again:
        assert again.directory == one.directory


@pytest.mark.parametrize("other", ["removed", "empty", "damaged"])
def test_of_two_processes_with_the_same_run_the_one_that_is_killed_finds_its_state(tmp_path, monkeypatch, other):
    monkeypatch.setenv("EFFVIT_STATE", str(tmp_path))
    with open_store("name", print) as one, open_store("name", print) as two:
        two.save({"a": torch.ones(2)}, {"step": 1})
        if other == "damaged":
            (one.directory / "state").write_bytes(b"half")
    if other == "removed":
        one.remove()
    with open_store("name", print) as again:
        assert again.directory == two.directory and again.load()
        with open_store("name", print) as new:
            assert new.directory == one.directory


def test_runs_that_nobody_went_on_with_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFVIT_STATE", str(tmp_path))
    old, old_stateless, new, new_stateless, other = (digit * 32 for digit in "01234")
    for name, stateless, age in ((old, old_stateless, resume._FORGOTTEN_S + 60), (new, new_stateless, 60)):
        with open_store(name, print) as store:
            store.save({}, {})
        make_older(store.directory / "state", age)
        make_older(store.directory, age)
        with open_store(stateless, print) as store:
            pass
        make_older(store.directory, age)
    for stranger in ("thesis", f"{old}-7"):
        (tmp_path / "runs" / stranger).mkdir()
        (tmp_path / "runs" / stranger / "model.bin").touch()
        make_older(tmp_path / "runs" / stranger, resume._FORGOTTEN_S + 60)
    with open_store(other, print):
        left = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert left == [f"{old}-7", f"{new}-0", f"{new_stateless}-0", f"{other}-0", "thesis"]


def make_older(path, seconds):
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def test_the_name_of_a_run_changes_with_what_moves_its_result_and_with_nothing_else(digits, tiny_config, monkeypatch):
    def name(dataset=digits, model=None, machine=MACHINE, seed=0, flip=False, start=None, **changes):
        config, recipe = tiny_config(**(model or {})), TrainConfig(**(RECIPE | changes))
        return fingerprint(config, dataset, recipe, machine, seed=seed, horizontal_flip=flip, start=start)

    base = name()
    test_images = {**digits.images, "test": digits.images["test"] // 2}
    same = type(digits)(**(vars(digits) | {"images": test_images}))
    assert base == name() == name(checkpoint_s=5.0) == name(devices=2) == name(workers=3) == name(dataset=same)
    assert base == name(machine=replace(MACHINE, threads=7)), "threads change with the number of processes"
    others = [name(lr=1e-3), name(seed=1), name(flip=True), name(model={"hidden_size": 32}), name(mixup=0.1)]
    others += [name(dataset=brightened(digits)), name(epochs=4), name(precision="bf16-mixed")]
    others += [name(machine=ANOTHER), name(machine=replace(MACHINE, processor="another"))]
    monkeypatch.setattr(policy, "ONLY_REFERENCE", not policy.ONLY_REFERENCE)  # what EFFVIT_KERNELS=reference sets
    others += [name(machine=this_machine(torch.device("cpu")))]
    others += [name(start="of these weights"), name(start="of those")]
    code = resume._code
    monkeypatch.setattr(resume, "_code", lambda attention: list(code(attention))[1:])
    others.append(name())
    assert len({base, *others}) == 1 + len(others)


@pytest.mark.parametrize("package", ["torch", "numpy", "torchvision", "pillow", "lightning-fabric"])
def test_the_version_of_a_package_is_in_the_name_of_a_run(digits, tiny_config, monkeypatch, package):
    def name():
        return fingerprint(tiny_config(), digits, TrainConfig(**RECIPE), MACHINE, seed=0, horizontal_flip=False)

    base, version = name(), resume.version_of
    monkeypatch.setattr(resume, "version_of", lambda asked: version(asked) + ".1" * (asked == package))
    assert name() != base


def test_code_that_the_stage_depends_on_is_in_the_name_of_a_run():
    deps = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["train"]["deps"]
    deps = {dep.replace("${item.attention}", "linformer") for dep in deps}
    known = {str(path.relative_to(ROOT)) for path in resume._code("linformer")}
    paths = [ROOT / dep for dep in deps if dep.startswith("effvit/") and dep != "effvit/cli/train.py"]
    files = {file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])}
    assert {str(file.relative_to(ROOT)) for file in files} <= known
    assert "effvit/attention/performer.py" not in known


# A step lasts where SLOW is set, so that a signal comes before the last one, however late.
MAIN = """
import os, time
from effvit.training.loop import Training
take_step = Training._take_step

def slowly(self, *args):
    if self.epoch:
        time.sleep(float(os.environ.get("SLOW", 0)))
    return take_step(self, *args)

Training._take_step = slowly
from effvit.cli.app import main
main()
"""


def test_a_terminated_command_says_where_it_goes_on_and_does(tmp_path, digits_dir):
    command = [sys.executable, "-c", MAIN, "train", "--dataset-dir", digits_dir, "--output-dir", tmp_path / "run"]
    command = [*map(str, command), *TINY_FLAGS, "--epochs", "4", "--batch-size", "128", "--device", "cpu"]
    env = os.environ | {"EFFVIT_STATE": str(tmp_path / "state")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env | {"SLOW": "0.2"}) as process:
        read_until(process, "epoch   1/")
        process.terminate()
        _, error = process.communicate()
    assert process.returncode == 143, error
    assert error.splitlines()[-1].startswith("stopped at epoch") and "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    assert finished(*command, env=env).stderr.startswith("resuming at epoch")
    assert (tmp_path / "run" / "model.safetensors").exists()


forks = pytest.mark.skipif(sys.platform != "linux", reason="workers are not forked here")


@pytest.fixture
def train_with_workers(tmp_path):
    """Command that trains on JPEG files, decoded by workers, and its environment."""
    for split, name, number in itertools.product(("train", "test"), ("a", "b"), range(40)):
        path = tmp_path / "images" / split / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96, 96), (number, 6 * number, 99)).save(path)
    prepare("folder", tmp_path / "images", 96, tmp_path / "prepared")
    flags = ["--dataset-dir", tmp_path / "prepared", "--output-dir", tmp_path / "run", *TINY_FLAGS, "--device", "cpu"]
    flags += ["--workers", 2, "--min-crop-area", 0.3, "--epochs", 4, "--batch-size", 36, "--patch-size", 16]
    return ["train", *map(str, flags)], os.environ | {"EFFVIT_STATE": str(tmp_path / "state")}


@forks
@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_run_whose_group_is_terminated_is_saved_though_workers_decode_for_it(train_with_workers, tmp_path, method):
    flags, env = train_with_workers
    start = f"import multiprocessing; multiprocessing.set_start_method({method!r})"  # Python's default by version
    command, slow = [sys.executable, "-c", start + MAIN, *flags], env | {"SLOW": "0.3"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=slow, start_new_session=True) as process:
        read_until(process, "epoch   1/")
        time.sleep(0.2)  # the next epoch has begun
        os.killpg(process.pid, signal.SIGTERM)  # as torchrun, Slurm and systemd do
        _, error = process.communicate()
    assert process.returncode == 143, error
    assert error.splitlines()[-1].startswith("stopped at epoch") and "Traceback" not in error
    with pytest.raises(ProcessLookupError):  # no worker outlives it
        os.killpg(process.pid, 0)
    (state,) = (tmp_path / "state" / "runs").glob("*/state")
    assert Store(state.parent, print).load(), "what the next process goes on from, as with the command above"


@forks
def test_workers_are_never_ended_by_sigterm_of_others_not_even_while_they_start(train_with_workers):
    """Signals fall where PyTorch has set its handler and the worker has not begun."""
    flags, env = train_with_workers
    command = [sys.executable, "-c", TERMINATED_AT_ONCE, *flags]
    assert "epoch   4/4" in finished(*command, env=env).stderr


TERMINATED_AT_ONCE = """
import os, signal, subprocess
from torch.utils.data import _utils
set_handlers = _utils.signal_handling._set_worker_signal_handlers

def set_handlers_and_be_terminated(*args):
    set_handlers(*args)
    subprocess.run(["kill", "-TERM", str(os.getpid())], check=True)

_utils.signal_handling._set_worker_signal_handlers = set_handlers_and_be_terminated
from effvit.cli.app import main
main()
"""


@forks
def test_a_killed_worker_is_told_in_one_line(train_with_workers):
    flags, env = train_with_workers
    command = [sys.executable, "-c", MAIN, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env | {"SLOW": "0.5"}) as process:
        read_until(process, "epoch   1/")
        workers = []
        while not workers and process.poll() is None:
            workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.3)  # the threads that feed them have started: one whose start is broken off speaks for itself
        os.kill(int(workers[0]), signal.SIGKILL)
        _, error = process.communicate()
    assert process.returncode == 1, error
    assert error.splitlines()[-1].startswith("error: a worker that decodes images was killed")
    assert "Traceback" not in error


FAILS = """
from effvit.training.loop import Training
take_step = Training._take_step

def fail_later(self, *args):
    if self.epoch:
        raise ZeroDivisionError("as a bug would")
    return take_step(self, *args)

Training._take_step = fail_later
from effvit.cli.app import main
main()
"""


def test_a_run_that_fails_ends_though_workers_decode_for_it(train_with_workers):
    flags, env = train_with_workers
    command = [sys.executable, "-c", FAILS, *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True) as process:
        _, error = process.communicate(timeout=300)
    assert process.returncode == 1, error
    assert error.splitlines()[-1] == "ZeroDivisionError: as a bug would"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_run_is_finished_where_and_as_it_was_written_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("EFFVIT_STATE", str(tmp_path / "state"))
    outputs = tmp_path / "run", tmp_path / "run-log"
    for directory in outputs:
        directory.mkdir()
        (directory / "file").write_text("content")
    assert not resume.is_finished("a", *outputs)
    resume.record_finished("a", *outputs)
    assert resume.is_finished("a", *outputs)
    assert not resume.is_finished("b", *outputs) and not resume.is_finished("a", *reversed(outputs))
    (outputs[1] / "file").write_text("changed")
    assert not resume.is_finished("a", *outputs)
    resume.record_finished("b", *outputs)
    assert resume.is_finished("b", *outputs)
    assert len(list((tmp_path / "state" / "finished").iterdir())) == 1, "of what was there before nothing is kept"
