"""A training step on CUDA: the host sends a batch, launches everything, and waits for nothing."""

from contextlib import suppress

import pytest
import torch
from fake_cuda import fake_cuda
from mechanisms import FIRST

from effvit.data.loading import randaugment_by_tables, transforms
from effvit.data.loading.batches import pack, unpack
from effvit.measure.without_gpu import moved
from effvit.model.vit import ViT
from effvit.training.loop import Training
from effvit.training.recipe import TrainConfig

EVERYTHING = {
    "precision": "32-true",
    "optimizer": "muon",
    "clip_norm": 1.0,
    "label_smoothing": 0.1,
    "ema_decay": 0.9,
    "crop_padding": 2,
    "randaugment": 9,
    "random_erasing": 0.5,
    "mixup": 0.8,
}


@pytest.fixture
def nothing_kept():
    """What is kept on a device is made anew."""
    kept = (transforms._normalisation, randaugment_by_tables.tables, randaugment_by_tables.stretched)
    for each in kept:
        each.cache_clear()
    yield
    for each in kept:
        each.cache_clear()


def training_on_cuda(config, dataset, **changes):
    recipe = TrainConfig(**({"epochs": 2, "batch_size": 8, "lr": 1e-3} | EVERYTHING | changes))
    return Training(moved(ViT(config)), dataset, recipe, seed=0, horizontal_flip=True)


@pytest.mark.parametrize("memory", [0, 2**40], ids=["images from the host", "images on the GPU"])
@pytest.mark.parametrize(("name", "options"), FIRST, ids=[name for name, _ in FIRST])
def test_a_step_has_one_upload_and_one_download(name, options, memory, tiny_config, digits, monkeypatch, nothing_kept):
    config = tiny_config(attention=name, attention_options=options, num_hidden_layers=1)
    with fake_cuda(monkeypatch, memory) as traffic:
        training = training_on_cuda(config, digits)
        batches = training._training_batches()
        next(batches)  # makes what is kept: tables
        traffic.reset()
        training._take_step(next(batches), 1e-3)
    assert (len(traffic.uploads), len(traffic.downloads), traffic.reads) == (1, 1, [])
    assert traffic.launches > 300, "that the step is seen"


def test_cutmix_and_micro_batches_do_not_wait_either(tiny_config, digits, monkeypatch, nothing_kept):
    with fake_cuda(monkeypatch) as traffic:
        training = training_on_cuda(tiny_config(), digits, mixup=0.0, cutmix=1.0, optimizer="adamw", micro_batch_size=3)
        batches = training._training_batches()
        next(batches)
        traffic.reset()
        training._take_step(next(batches), 1e-3)
    assert (len(traffic.uploads), len(traffic.downloads), traffic.reads) == (1, 1, [])


def test_with_graphs_each_pass_begins_anew_and_gradients_stay_in_their_place(
    tiny_config, digits, monkeypatch, nothing_kept
):
    """All compiled blocks of a model are one pass; what one leaves in memory of its own, the next one overwrites."""
    began = []
    monkeypatch.setattr("effvit.training.loop.compile_blocks", lambda *_: None)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: began.append(1))
    with fake_cuda(monkeypatch) as traffic:
        training = training_on_cuda(tiny_config(), digits, compile="graphs", micro_batch_size=3, randaugment=0)
        places = [parameter.grad for parameter in training.model.parameters()]
        batches = training._training_batches()
        next(batches)
        traffic.reset()
        training._take_step(next(batches), 1e-3)
        assert len(began) == 3, "of eight images, three at a time"
        assert [parameter.grad for parameter in training.model.parameters()] == places
        with torch.no_grad():
            Training.validate.__wrapped__(training)
    assert (len(traffic.uploads), traffic.reads) == (1 + -(-digits.counts["validation"] // 8), [])
    assert len(began) > 3


def test_validation_reads_its_sums_once(tiny_config, digits, monkeypatch, nothing_kept):
    with fake_cuda(monkeypatch) as traffic:
        training = training_on_cuda(tiny_config(), digits, batch_size=40)
        traffic.reset()
        with torch.no_grad():  # these tensors have no inference mode
            Training.validate.__wrapped__(training)
    batches = -(-digits.counts["validation"] // 40)
    assert (len(traffic.uploads), len(traffic.downloads), traffic.reads) == (batches + 2, 1, []), "two for mean and std"


@pytest.mark.parametrize("count", [3, 64])
def test_randaugment_launches_the_same_for_any_batch(count, monkeypatch, nothing_kept):
    with fake_cuda(monkeypatch) as traffic:
        images = torch.empty(count, 3, 16, 16, dtype=torch.uint8, device="cuda:0")
        choices = torch.empty(2, count, dtype=torch.int64, device="cuda:0")
        randaugment_by_tables.by_tables(images, choices, 9)  # makes what is kept
        traffic.reset()
        randaugment_by_tables.by_tables(images, choices, 9)
    assert traffic.launches == 93, "as docs/gpu.md says"
    assert (traffic.uploads, traffic.downloads, traffic.reads) == ([], [], [])


def test_what_is_uploaded_together_arrives_as_it_was():
    parts = [torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8), torch.arange(3), torch.rand(2, 3)[:, 1:]]
    parts += [torch.tensor([True, False, True]), torch.empty(4, 0, dtype=torch.int64)]
    for sent, arrived in zip(parts, unpack(pack(parts), parts), strict=True):
        assert arrived.dtype == sent.dtype and torch.equal(arrived, sent)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.tensor([1.0], device="cuda:0"),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: float(x[0]) > 0,
        lambda x: x.nonzero(),
    ],
)
def test_whatever_waits_is_seen(wait, monkeypatch):
    with fake_cuda(monkeypatch) as traffic:
        x = torch.empty(3, device="cuda:0")
        with suppress(NotImplementedError, RuntimeError):  # of numbers that are not there
            wait(x)
    assert traffic.uploads or traffic.downloads or traffic.reads
