import hashlib
import pickle
import re
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from effvit.errors import UserError
from effvit.model.weights import read_weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.zeros(2)}


def refused(path):
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_a_torch_file_is_read_with_or_without_its_wrapper(tmp_path, suffix, wrap):
    path = tmp_path / f"file{suffix}"
    torch.save(wrap(STATE), path)
    weights = read_weights(path)
    assert weights.tensors.keys() == STATE.keys() and weights.config is None
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in STATE.items())


def test_safetensors_are_read_and_known_by_their_content(tmp_path):
    path = tmp_path / "file.safetensors"
    save_file(STATE, path)
    weights = read_weights(path)
    assert all(torch.equal(weights.tensors[name], tensor) for name, tensor in STATE.items())
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_directory_and_its_file_bring_the_configuration(trained):
    weights = read_weights(trained / "run")
    assert weights.config.hidden_size == 16
    assert read_weights(trained / "run" / "model.safetensors").config == weights.config


def test_a_configuration_of_another_library_is_none_of_ours(trained, tmp_path):
    copy = shutil.copytree(trained / "run", tmp_path / "model")
    (copy / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    assert read_weights(copy).config is None


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_file_is_refused_and_never_run(tmp_path, suffix, legacy):
    path, mark = tmp_path / f"evil{suffix}", tmp_path / "ran"
    torch.save(STATE | {"model": Evil(mark)}, path, _use_new_zipfile_serialization=not legacy)
    assert "safetensors" in refused(path)
    path.write_bytes(pickle.dumps(Evil(mark)))
    assert "safetensors" in refused(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the file was harmless, and the test says nothing"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_refused(tmp_path, suffix, keep):
    path = tmp_path / f"file{suffix}"
    state = STATE | {"b": torch.zeros(10**4)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "holds list"),
        ({"a": 3}, "a is int"),
        ({"model": STATE | {"n": torch.ones(2, dtype=torch.long)}}, "n is of torch.strided and torch.int64"),
        ({"a": torch.eye(2).to_sparse()}, "torch.sparse"),
        ({3: torch.ones(2)}, "3 is Tensor"),
        ({"a": torch.ones(1).expand(10**13)}, "a is not stored in full"),
        ({"a": torch.ones(2, device="meta")}, "a is not stored in full"),
        ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn, expected dense floating point of 16 bits"),
    ],
)
def test_anything_but_floating_point_tensors_is_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "file.pth")
    assert says in refused(tmp_path / "file.pth")


@pytest.mark.parametrize(
    ("dtype", "wrong"), [(torch.float32, torch.inf), (torch.bfloat16, -torch.inf), (torch.float64, torch.nan)]
)
def test_numbers_that_are_not_finite_are_refused(tmp_path, dtype, wrong):
    torch.save({"a": torch.ones(2).to(dtype), "b": torch.ones(2).to(dtype)}, tmp_path / "file.pth")
    assert set(read_weights(tmp_path / "file.pth").tensors) == {"a", "b"}
    torch.save({"a": torch.ones(2).to(dtype), "b": torch.tensor([1.0, wrong]).to(dtype)}, tmp_path / "file.pth")
    assert "b has numbers that are not finite" in refused(tmp_path / "file.pth")


def pretend_small_members(path):
    """Put before the end record a second directory, where Python looks for it, in which all members are of a byte."""
    content = path.read_bytes()
    end = content.rindex(b"PK\5\6")
    size, offset = struct.unpack("<II", content[end + 12 : end + 20])
    decoy = bytearray(content[offset : offset + size])
    for at in (match.start() for match in re.finditer(b"PK\1\2", bytes(decoy))):
        decoy[at + 24 : at + 28] = struct.pack("<I", 1)
    path.write_bytes(content[:end] + decoy + content[end:])
    with zipfile.ZipFile(path) as archive:
        assert {member.file_size for member in archive.infolist()} == {1}


def test_a_torch_file_that_unpacks_to_more_than_it_is_is_refused_before_it_does(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "file.pth", "w") as bomb:
        for member in plain.namelist():
            bomb.writestr(member, plain.read(member), zipfile.ZIP_DEFLATED)
    assert torch.load(tmp_path / "file.pth", weights_only=True)["a"].numel() == 10**6, "torch itself unpacks it"
    assert "not a torch file" in refused(tmp_path / "file.pth")
    pretend_small_members(tmp_path / "file.pth")
    assert "not a torch file" in refused(tmp_path / "file.pth")
    assert read_weights(tmp_path / "plain.pth").tensors["a"].numel() == 10**6
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "file.pth", "w") as bomb:
        for member in plain.namelist():  # the pickle alone, which says what tensors there are
            padding = bytes(10**8) if member.endswith("data.pkl") else b""
            bomb.writestr(member, plain.read(member) + padding, zipfile.ZIP_DEFLATED if padding else None)
    assert torch.load(tmp_path / "file.pth", weights_only=True)["a"].numel() == 10**6, "torch itself unpacks it"
    assert "not a torch file" in refused(tmp_path / "file.pth")
    pretend_small_members(tmp_path / "file.pth")
    assert "not a torch file" in refused(tmp_path / "file.pth")


def test_a_file_that_is_not_there_or_of_another_kind_is_named(tmp_path):
    assert "no such file" in refused(tmp_path / "none.pth")
    assert "model.safetensors: no such file" in refused(tmp_path)
    (tmp_path / "weights.npz").touch()
    assert "expected a name that ends in" in refused(tmp_path / "weights.npz")
