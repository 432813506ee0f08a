import copy
import math
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from effvit import Trainer, ViT, evaluate, load_model, predict, save_model, swap_attention
from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.training.loop import DivergedError, Epoch, Training
from effvit.training.recipe import TrainConfig

pytestmark = pytest.mark.slow

MEASURED = ["seconds", "images_per_second", "peak_memory_mib"]


def seeded(config):
    torch.manual_seed(0)
    return ViT(config)


def quadrants(count, seed=0):
    """Images whose class is the quadrant with the bright spot."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 4
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 8 * (label // 2) : 8 * (label // 2) + 8, 8 * (label % 2) : 8 * (label % 2) + 8] += 3
    return TensorDataset(images, labels)


@pytest.fixture
def loaders():
    return DataLoader(quadrants(64), batch_size=16, shuffle=True), DataLoader(quadrants(30, seed=1), batch_size=8)


@pytest.fixture
def vit(tiny_config):
    return seeded(tiny_config(num_classes=4))


class Linear(nn.Module):
    """A classifier that is no ViT; results are an object with ``logits`` where one is wanted."""

    def __init__(self, classes=4, wrap=None):
        super().__init__()
        self.head, self.wrap = nn.Linear(3 * 16 * 16, classes), wrap

    def forward(self, images):
        logits = self.head(images.flatten(1))
        return self.wrap(logits) if self.wrap else logits


def trained(model, *data, **changes):
    return Trainer(model, *data, **({"epochs": 2, "lr": 3e-3, "device": "cpu", "progress": False} | changes))


RECIPE = {"epochs": 2, "batch_size": 256, "lr": 5e-3, "crop_padding": 1, "mixup": 0.2, "optimizer": "muon"}


def test_history_and_weights_are_those_of_the_loop_of_the_pipeline(digits, tiny_config):
    config = tiny_config(attention="performer", attention_options={"num_features": 8, "redraw_every": 3})
    training = Training(config, digits, TrainConfig(**RECIPE, device="cpu"), seed=0, horizontal_flip=True)
    epochs = [event for event in training.run() if isinstance(event, Epoch)]
    model = seeded(config)
    history = trained(model, digits, **RECIPE, horizontal_flip=True).fit()
    for name in set(Epoch.__dataclass_fields__) - set(MEASURED):
        assert history[name].tolist() == [getattr(epoch, name) for epoch in epochs], name
    if history["val_accuracy"].idxmax() == 1:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), training.model.parameters(), strict=True))


def test_the_test_split_is_read_by_evaluate_alone(digits, tiny_config, monkeypatch):
    read = []
    split = PreparedDataset.split
    monkeypatch.setattr(PreparedDataset, "split", lambda self, name: read.append(name) or split(self, name))
    trainer = trained(seeded(tiny_config()), digits, epochs=1)
    trainer.fit()
    assert set(read) == {"train", "validation"}
    scores = trainer.evaluate(digits)
    assert read[-1] == "test" and scores["num_images"] == digits.counts["test"]


def of_timm():
    timm = pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 4}
    return timm.models.vision_transformer.VisionTransformer(**size)


def of_transformers():
    transformers = pytest.importorskip("transformers")
    size = {"image_size": 16, "patch_size": 4, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**size, intermediate_size=48, num_labels=4))


@pytest.mark.parametrize("build", [Linear, of_timm, of_transformers])
def test_steps_are_those_of_a_plain_loop(build):
    torch.manual_seed(0)
    model = build()
    again = copy.deepcopy(model).train()
    train = DataLoader(quadrants(20), batch_size=8)
    history = trained(model, train, epochs=3, weight_decay=0.1, clip_norm=1.0).fit()
    vectors = ("cls_token", "pos_embed", "position_embeddings")
    decayed = [p for name, p in again.named_parameters() if p.ndim > 1 and not name.endswith(vectors)]
    rest = [p for name, p in again.named_parameters() if p.ndim == 1 or name.endswith(vectors)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    losses = []
    for step, (images, labels) in enumerate(batch for _ in range(3) for batch in train):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 + math.cos(math.pi * step / 9)) / 2
        logits = again(images)
        loss = nn.functional.cross_entropy(getattr(logits, "logits", logits), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(again.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item() * len(labels) / 20)
    assert history["train_loss"].tolist() == pytest.approx([sum(losses[i : i + 3]) for i in (0, 3, 6)], rel=1e-4)
    assert losses[0] != pytest.approx(losses[3], rel=1e-3), "steps matter"


@pytest.mark.parametrize("build", [of_timm, of_transformers])
def test_a_swapped_model_is_trained_as_before(build, loaders):
    """By Muon as well, which finds the same matrices of heads in both: with `fused` it is the same function."""
    histories = []
    for swapped in (False, True):
        torch.manual_seed(0)
        model = build()
        if swapped:
            swap_attention(model, "fused")
        histories.append(trained(model, *loaders, optimizer="muon", epochs=3).fit()["train_loss"].tolist())
    assert histories[1] == pytest.approx(histories[0], rel=1e-3)


@pytest.mark.parametrize("build", [of_timm, of_transformers])
def test_a_swapped_model_keeps_its_classes_and_normalisation_and_travels(build, digits, tmp_path):
    def untrained():
        model = build()
        head = nn.Linear(24, len(digits.classes))
        setattr(model, "head" if hasattr(model, "head") else "classifier", head)
        return model

    model = untrained()
    swap_attention(model, "performer")
    trainer = trained(model, digits, epochs=1)
    trainer.fit()
    again = nn.DataParallel(untrained())
    trained(again, digits, epochs=1).fit()
    assert model.trained_on == again.trained_on == again.module.trained_on
    assert model.trained_on.known() == {
        "classes": list(digits.classes),
        "mean": list(digits.mean),
        "std": list(digits.std),
    }
    save_model(model, tmp_path / "model")
    back = load_model(tmp_path / "model", into=untrained())
    assert evaluate(back, digits) == trainer.evaluate(digits)
    images, _ = digits.split("test")
    assert predict(back, images[:9])["class"].tolist() == predict(model, images[:9], digits)["class"].tolist()
    assert set(predict(back, images[:9])["class"]) <= set(digits.classes)


def test_a_crop_as_wide_as_the_images_is_told_by_its_name(digits, tiny_config):
    with pytest.raises(UserError, match=r"^crop_padding=16: must be less than 16, the images' size$"):
        trained(seeded(tiny_config()), digits, crop_padding=16)


def test_a_model_that_is_frozen_is_told_in_one_line(loaders):
    with pytest.raises(UserError, match=r"^model: all of its parameters are frozen"):
        trained(Linear().requires_grad_(False), *loaders)


def test_what_is_frozen_stays_while_the_rest_learns(loaders):
    model = of_timm()
    swap_attention(model, "linformer", k=4)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained(model, *loaders, epochs=1).fit()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.weight", "head.bias"}


def test_loaders_of_ones_own_are_learnt_from(vit, loaders):
    trainer = trained(vit, *loaders, epochs=8, lr=1e-2)
    history = trainer.fit()
    assert history["epoch"].tolist() == list(range(1, 9))
    assert history["train_loss"].iloc[-1] < 0.5 * history["train_loss"].iloc[0]
    scores = trainer.evaluate(loaders[1])
    assert scores["top1"] == pytest.approx(history["val_accuracy"].max()) and scores["num_images"] == 30
    assert not vit.training


def test_the_same_seed_gives_the_same_history_with_loaders(tiny_config, loaders):
    def losses(seed):
        torch.randn(seed + 1)  # whatever was drawn before
        return trained(seeded(tiny_config(num_classes=4)), *loaders, seed=seed).fit()["train_loss"].tolist()

    assert losses(0) == losses(0) != losses(1)


def test_best_weights_by_validation_accuracy_are_left_in_the_model(loaders):
    """The learning rate is so high that the last epoch is not the best."""
    torch.manual_seed(0)
    model = Linear()
    seen = {}
    trainer = trained(model, *loaders, epochs=6, lr=0.5)
    trainer.fit()
    history = trainer.history
    best = history.sort_values(["val_accuracy", "val_loss"], ascending=[False, True], kind="stable").iloc[0]
    scores = trainer.evaluate(loaders[1])
    seen = {"val_loss": scores["loss"], "val_accuracy": scores["top1"]}
    assert seen == pytest.approx(best[list(seen)].to_dict(), rel=1e-5)
    assert best["epoch"] < 6, "otherwise this shows nothing"


def test_without_validation_the_last_weights_stay_and_history_says_nothing_of_it(vit, loaders):
    trainer = trained(vit, loaders[0])
    history = trainer.fit()
    assert len(history) == 2 and not {"val_loss", "val_accuracy"} & set(history.columns)
    assert not history.isna().any(axis=None)


def test_averaged_weights_are_left_where_the_recipe_averages(loaders, monkeypatch):
    averaged = []
    end = Training._end_epoch
    monkeypatch.setattr(
        Training, "_end_epoch", lambda self: averaged.append(self.weights.head.weight.clone()) or end(self)
    )
    model = Linear()
    trained(model, loaders[0], ema_decay=0.9).fit()
    assert torch.equal(model.head.weight, averaged[-1])


@pytest.mark.parametrize("wrap", [lambda x: {"logits": x}, lambda x: type("Output", (), {"logits": x})()])
def test_a_model_may_return_its_logits_in_an_object(loaders, wrap):
    histories = []
    for each in (None, wrap):
        torch.manual_seed(0)
        histories.append(trained(Linear(wrap=each), *loaders).fit().drop(columns=MEASURED))
    assert histories[0].equals(histories[1])


class Breaking(TensorDataset):
    """Raises on the first read after so many."""

    def __init__(self, dataset, reads, error):
        super().__init__(*dataset.tensors)
        self.reads, self.error = reads, error

    def __getitem__(self, index):
        self.reads -= 1
        if self.reads < 0:
            raise self.error
        return super().__getitem__(index)


def test_an_interruption_leaves_history_and_best_weights_so_far(loaders):
    model = Linear()
    train = DataLoader(Breaking(quadrants(64), 16 + 2 * 64 + 20, KeyboardInterrupt()), batch_size=16)
    trainer = trained(model, train, loaders[1], epochs=9)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.history["epoch"].tolist() == [1, 2]
    scores = evaluate(model, loaders[1])
    assert scores["top1"] == pytest.approx(trainer.history["val_accuracy"].max()) and not model.training
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_divergence_is_one_line_and_leaves_the_best_weights_so_far(loaders):
    model = Linear()
    trainer = trained(model, *loaders, lr=1e38, warmup_epochs=1.0)
    with pytest.raises(DivergedError, match="learning rate"):
        trainer.fit()
    assert trainer.history.empty


def test_settings_of_the_process_are_as_before(vit, loaders):
    torch.use_deterministic_algorithms(False)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    trained(vit, *loaders, epochs=1).fit()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill


def test_progress_is_told_on_stderr(vit, loaders, capsys):
    trained(vit, *loaders, progress=True).fit()
    out, err = capsys.readouterr()
    assert out == "" and "epoch   1/2" in err and "validation" in err
    trained(vit, *loaders).fit()
    assert capsys.readouterr() == ("", "")


class NoLength(IterableDataset):
    def __iter__(self):
        return iter(quadrants(16))


def loader(images, labels, size=4):
    return DataLoader(TensorDataset(images, labels), batch_size=size)


IMAGES, LABELS = quadrants(8).tensors


@pytest.mark.parametrize(
    ("train", "line"),
    [
        (loader(IMAGES, LABELS + 1), "batch 1 has label 4, expected labels from 0 to 3, the model's classes"),
        (loader(IMAGES, LABELS - 1), "batch 1 has label -1, expected labels from 0"),
        (loader(IMAGES, LABELS.float()), r"train: batch 1 has labels float32 \(4,\), expected int64 \(4,\)"),
        (loader(IMAGES, LABELS[:, None]), r"train: batch 1 has labels int64 \(4, 1\), expected int64 \(4,\)"),
        (
            loader(IMAGES.byte(), LABELS),
            r"train: batch 1 has images uint8 \(4, 3, 16, 16\), expected normalised floats",
        ),
        (loader(IMAGES[:, 0], LABELS), r"images float32 \(4, 16, 16\), expected normalised floats"),
        (loader(IMAGES[:, :, :8], LABELS), r"images of shape \(1, 3, 8, 16\): expected \(batch, 3, 16, 16\)"),
        (DataLoader(IMAGES, batch_size=4), "train: batch 1 is float32"),
        (DataLoader(TensorDataset(IMAGES[:0], LABELS[:0])), "train: the loader has no batches"),
        (DataLoader(NoLength()), "train: got DataLoader, which has no length; expected"),
        (DataLoader(quadrants(3), batch_size=4, drop_last=True), "train: the loader has no batches"),
        (None, "train: got NoneType"),
    ],
)
def test_wrong_training_data_are_told_in_one_line(vit, train, line):
    with pytest.raises(UserError, match=line) as caught:
        trained(vit, train).fit()
    assert "\n" not in str(caught.value)


def test_a_wrong_batch_that_comes_late_is_told_too(vit):
    labels = LABELS.clone()
    labels[-1] = 7
    with pytest.raises(UserError, match="train: batch 2 has label 7"):
        trained(vit, loader(IMAGES, labels)).fit()


class Short(DataLoader):
    def __len__(self):
        return super().__len__() + 1


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (nn.Identity(), r"the model returns \(1, 3, 16, 16\) for one image, expected logits \(1, classes\)"),
        (Linear(wrap=lambda x: [x]), "the model returns list: expected logits"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(5, 4)),
            r"the model does not take images of shape \(1, 3, 16, 16\): mat1",
        ),
        ("vit_tiny", "model: got str, expected a torch.nn.Module"),
    ],
)
def test_a_model_that_is_no_image_classifier_is_told_in_one_line(model, line, loaders):
    with pytest.raises(UserError, match=line) as caught:
        trained(model, *loaders)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"epochs": 0}, "epochs=0: input should be greater than or equal to 1"),
        ({"lr": math.nan}, "lr=nan: input should be a finite number"),
        ({"optimizer": "sgd"}, "optimizer='sgd': input should be 'adamw' or 'muon'"),
        ({"learning_rate": 1.0}, "learning_rate: unknown option"),
        ({"mixup": 0.2, "batch_size": 8}, "batch_size, mixup: of prepared data sets"),
        ({"devices": 2}, "devices: of `effvit train`"),
        ({"seed": 2**70}, "seed=1180591620717411303424: expected a whole number from 0 to 4294967295"),
        ({"seed": -1}, "seed=-1: expected a whole number from 0"),
        ({"optimizer": "muon"}, "optimizer=muon: no blocks with attention are known in Linear"),
    ],
)
def test_wrong_options_are_told_in_one_line(loaders, changes, line):
    with pytest.raises(UserError, match=line) as caught:
        trained(Linear(), *loaders, **changes)
    assert "\n" not in str(caught.value)


def test_data_that_do_not_go_together_are_told_in_one_line(digits, loaders, vit):
    with pytest.raises(UserError, match="the model has 4 classes, digits has 10"):
        trained(vit, digits)
    with pytest.raises(UserError, match="validation: leave it out with a prepared data set"):
        trained(vit, digits, loaders[1])
    with pytest.raises(UserError, match="validation: got PreparedDataset"):
        trained(vit, loaders[0], digits)
    with pytest.raises(UserError, match=r"validation: images of shape \(3, 8, 8\)"):
        trained(vit, loaders[0], loader(IMAGES[:, :, :8, :8], LABELS))
    with pytest.raises(UserError, match="train: the loader gave 2 batches, its length is 3"):
        trained(vit, Short(TensorDataset(IMAGES, LABELS), batch_size=4)).fit()
    with pytest.raises(UserError, match="data: has label 7, the model has 4 classes"):
        evaluate(vit, loader(IMAGES, LABELS + 4))
    with pytest.raises(UserError, match="data: got NoneType, expected a prepared data set or a DataLoader"):
        evaluate(vit, None)


def test_epochs_are_required(vit, loaders):
    with pytest.raises(UserError, match=r"^epochs: missing; expected a number of passes"):
        Trainer(vit, *loaders)
