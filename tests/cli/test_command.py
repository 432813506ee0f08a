"""What all commands share: help that can be read, names that complete, flags named as they are typed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from effvit.attention import available_attention
from effvit.cli import options
from effvit.cli.app import COMMANDS, GROUPS, app
from effvit.cli.command import as_typed
from effvit.data.sources import available_datasets
from effvit.model.presets import available_presets

SCRIPT = Path(sys.executable).with_name("effvit")
COMMAND = typer.main.get_command(app).commands


def shell(*arguments, **environment):
    """The console script in a process of its own."""
    code = "from effvit.cli import main; import sys; sys.argv[0] = 'effvit'; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 80])
def test_help_is_as_wide_as_the_terminal_and_cuts_nothing_off(width):
    for arguments in ([], *([name.replace("_", "-")] for name in ("train", "scaling", "choose"))):
        text = shell(*arguments, "-h", COLUMNS=str(width)).stdout
        flags = [line for line in text.splitlines() if len(line) > width and not line.lstrip().startswith("-")]
        assert flags == [] and "…" not in text and "..." not in text.replace("[ARGS]...", "").replace(",...", "")


@pytest.mark.slow
def test_help_is_in_groups():
    text = shell("--help").stdout
    titles = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert titles == [*GROUPS, "Options"]
    titles = re.findall(r"^(\S.*):$", shell("train", "-h").stdout, re.MULTILINE)
    assert titles[:5] == ["Input and output", "Model", "Attention", "Recipe", "Augmentation"]
    assert titles[5:] == ["Device", "Logs and checkpoints", "Other options"]


def test_every_option_has_a_group_a_default_or_a_mark_and_one_plain_sentence():
    assert COMMAND.keys() == {name.replace("_", "-") for name in COMMANDS}
    for name, command in COMMAND.items():
        for parameter in command.params:
            text = parameter.help
            assert text and text[-1] == "." and not re.search(r"\b(beside|goes on|is told|foretold)\b", text), name
    assert all(p.rich_help_panel in options.TITLES for p in COMMAND["train"].params)


def test_what_the_help_lists_is_what_there_is():
    assert options.mechanism_names() == sorted(available_attention())
    assert list(options.Size.__args__) == list(available_presets())
    (dataset,) = (p for p in COMMAND["prepare"].params if p.name == "dataset")
    assert all(name in dataset.help for name in available_datasets())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("train --attention lin", {"linear", "linformer"}),
        ("choose --attention fused,lin", {"fused,linear", "fused,linformer"}),
        ("prepare --dataset cif", {"cifar10", "cifar100"}),
        ("train --device c", {"cpu", "cuda"}),
        ("bench", {"benchmark", "bench-peers", "bench-data"}),
        ("train --warm", {"--warmup-epochs"}),
    ],
)
def test_names_complete_in_a_shell(typed, expected):
    words = ["effvit", *typed.split()]
    given = {"COMP_WORDS": " ".join(words), "COMP_CWORD": str(len(words) - 1), "_EFFVIT_COMPLETE": "complete_bash"}
    assert set(shell(**given).stdout.split()) == expected


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT.exists(), reason="needs the installed script")
def test_completion_is_installed_for_the_shell_it_is_asked_from(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = ["bash", "-c", f"{SCRIPT} --install-completion; exit"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "not" in result.stderr.lower() and "shell" in result.stderr.lower():
        pytest.skip("the shell cannot be found out here")
    assert result.returncode == 0, result.stderr
    assert "effvit" in (tmp_path / ".bashrc").read_text()


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("train.precision='x': no", "--precision 'x': no"),
        ("precision=16-mixed: needs CUDA", "--precision 16-mixed: needs CUDA"),
        ("loss became nan: lower train.lr", "loss became nan: lower --lr"),
        ("num_attention_heads=3: must divide hidden_size=16", "--num-attention-heads 3: must divide --hidden-size 16"),
        ("attention.linformer.k=0: too small", "--option k=0: too small"),
        ("attention.linformer.m: unknown option", "--option m: unknown option"),
        ("attention='lin': unknown", "--attention 'lin': unknown"),
        ("patch_size=5: must divide image_size=16", "--patch-size 5: must divide image_size=16"),
        ("weights.pt: hidden_size=16, here 32", "weights.pt: hidden_size=16, here 32"),
        ("data/model=lr=1/x.json: no such file", "data/model=lr=1/x.json: no such file"),
        ("the model, its epochs and lr", "the model, its epochs and lr"),
    ],
)
def test_an_argument_is_named_by_its_flag_and_nothing_else_is_changed(message, typed):
    assert as_typed(message, COMMAND["train"].params) == typed


def test_an_option_of_one_of_several_mechanisms_is_named_with_it():
    assert as_typed("attention.linformer.k=0: no", COMMAND["choose"].params) == "--option linformer.k=0: no"


@pytest.mark.parametrize(
    ("given", "expected"),
    [(["--tokens", "197,577"], [197, 577]), (["--tokens", "197", "--tokens", "577,65"], [197, 577, 65])],
)
def test_a_list_of_numbers_is_repeated_or_in_commas(monkeypatch, given, expected):
    arguments = ["--attention", "fused", "--output-dir", "o", *given]
    assert COMMAND["scaling"].make_context("scaling", list(arguments)).params["tokens"] == expected


@pytest.mark.parametrize(
    ("command", "arguments", "name", "expected"),
    [
        ("choose", ["--attention", "fused,linformer"], "attention", ["fused", "linformer"]),
        ("choose", ["--image-sizes", "224", "--image-sizes", "384"], "image_sizes", [224, 384]),
        ("choose", [], "attention", None),
        ("bench-peers", ["--output-dir", "o", "--width", "192x3,384x6"], "width", ["192x3", "384x6"]),
    ],
)
def test_a_list_of_names_is_repeated_or_in_commas(command, arguments, name, expected):
    assert COMMAND[command].make_context(command, list(arguments)).params[name] == expected
