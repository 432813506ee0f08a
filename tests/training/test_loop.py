import json
import math
import shutil
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from effvit import policy
from effvit.attention.performer import PerformerAttention
from effvit.data.loading.prepared import PreparedDataset
from effvit.errors import UserError
from effvit.evaluation.score import predict_logits
from effvit.model.checkpoint import load_model
from effvit.model.vit import ViT
from effvit.training.loop import DivergedError, Epoch, Step, Training
from effvit.training.optimizer import schedule
from effvit.training.recipe import TrainConfig
from effvit.training.run import Best, train_to

pytestmark = pytest.mark.slow

RECIPE = {"epochs": 2, "batch_size": 128, "lr": 3e-3, "crop_padding": 1, "device": "cpu"}


@pytest.fixture
def run(tmp_path, digits, tiny_config):
    """Train into tmp_path/<name> and tmp_path/<name>-log; keywords are of the recipe or the model."""

    def start(name="run", seed=0, dataset=digits, flip=False, **changes):
        recipe = {key: changes.pop(key) for key in list(changes) if key in TrainConfig.model_fields}
        train_to(
            tmp_path / name,
            tmp_path / f"{name}-log",
            tiny_config(**changes),
            dataset,
            TrainConfig(**(RECIPE | recipe)),
            seed=seed,
            horizontal_flip=flip,
        )
        return tmp_path / name

    return start


def steps_of(config, dataset, recipe, seed=0):
    """Each step of a training."""
    training = Training(config, dataset, recipe, seed=seed, horizontal_flip=False)
    return [event for event in training.run() if isinstance(event, Step)]


def visible(directory):
    return sorted(path.name for path in directory.iterdir())


MECHANISMS = [
    {"attention": "linformer", "attention_options": {"k": 4}, "hidden_dropout_prob": 0.1},
    {"attention": "performer", "attention_options": {"num_features": 8, "redraw_every": 3}},
]


@pytest.mark.parametrize("mechanism", MECHANISMS, ids=lambda m: m["attention"])
def test_training_again_gives_the_same_bytes_and_another_seed_others(run, tmp_path, mechanism):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        run(name, seed=seed, flip=True, label_smoothing=0.1, clip_norm=1.0, **mechanism)
    for path in ("{}/model.safetensors", "{}/config.json", "{}-log/history.csv"):
        one, two, other = (tmp_path.joinpath(path.format(name)).read_bytes() for name in ("one", "two", "other"))
        assert one == two
        assert (one == other) == path.endswith("config.json")


def test_random_features_are_redrawn_while_training(digits, tiny_config, monkeypatch):
    omegas = []
    config = tiny_config(attention="performer", attention_options={"num_features": 8, "redraw_every": 3})
    training = Training(config, digits, TrainConfig(**RECIPE), seed=0, horizontal_flip=False)
    told, after_step = [], PerformerAttention.after_step
    note = lambda self, step, generator, steps: (told.append((step, steps)), after_step(self, step, generator, steps))  # noqa: E731
    monkeypatch.setattr(PerformerAttention, "after_step", note)
    for event in training.run():
        if isinstance(event, Epoch):
            omegas.append(training.weights.attentions()[0].omega.clone())
    assert not torch.equal(*omegas)
    assert {steps for _, steps in told} == {max(step for step, _ in told)}  # of the whole run


@pytest.mark.parametrize("micro_batch_size", [0, 100])
def test_a_small_last_batch_is_filled_up_where_shapes_are_compiled_and_counts_no_more(
    digits, tiny_config, micro_batch_size, monkeypatch
):
    seen, losses = [], []
    for fills_up in (False, True):
        recipe = TrainConfig(**RECIPE | {"batch_size": 200, "micro_batch_size": micro_batch_size})
        training = Training(tiny_config(), digits, recipe, seed=0, horizontal_flip=False)
        training._fills_up = fills_up
        training.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
        seen.clear()
        losses.append([(e.train_loss, e.val_loss) for e in training.run() if isinstance(e, Epoch)])
    assert digits.counts["train"] % 200 and set(seen) == {micro_batch_size or 200}
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_run_taken_up_at_a_small_last_batch_fills_it_up_as_it_would_have(digits, tiny_config):
    recipe = TrainConfig(**RECIPE | {"batch_size": 200})
    first, second = (Training(tiny_config(), digits, recipe, seed=0, horizontal_flip=False) for _ in range(2))
    events = first.run()
    while first.step < first.steps_per_epoch - 1:
        next(events)
    second.restore(*first.state())
    seen = []
    second._fills_up = True
    second.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    event = next(second.run())
    assert (event.images, seen) == (digits.counts["train"] % 200, [200])


class WatchedRows(np.ndarray):
    """Images that note which rows are read."""

    def __getitem__(self, index):
        if isinstance(index, np.ndarray):
            self.seen.append(index.copy())
        return super().__getitem__(index)


def test_only_training_rows_are_trained_on_and_the_test_split_is_never_read(digits, tiny_config):
    class NoTestSplit(PreparedDataset):
        def split(self, name):
            assert name != "test", "the test split was read"
            return super().split(name)

    # Validation images all white and test arrays gone: neither may change what is learnt.
    arrays = {name: array for name, array in digits.arrays.items() if not name.startswith("test")}
    white = digits.images["train"].copy()
    white[arrays["validation_indices"]] = 255
    fields = {key: value for key, value in vars(digits).items() if key not in ("arrays", "images")}
    histories = []
    for images in (digits.images["train"], white):
        watched = images.view(WatchedRows)
        watched.seen = []
        dataset = NoTestSplit(**fields, arrays=arrays, images={"train": watched})
        steps = steps_of(tiny_config(), dataset, TrainConfig(**RECIPE))
        histories.append([step.loss for step in steps])
        per_epoch = len(steps) // 2
        first_epoch = np.concatenate(watched.seen[:per_epoch])
        assert np.array_equal(np.sort(first_epoch), np.sort(arrays["train_indices"])), "each training row once an epoch"
        assert sum(step.images for step in steps) == 2 * digits.counts["train"]
    assert histories[0] == histories[1]


def test_saved_model_is_the_best_by_validation(trained, digits):
    history = pd.read_csv(trained / "run-log" / "history.csv")
    images, labels = digits.split("validation")

    def accuracy(directory):
        logits = predict_logits(load_model(directory), images, digits.mean, digits.std, 50)
        return float((logits.argmax(1).numpy() == labels).mean())

    assert accuracy(trained / "run") == pytest.approx(history["val_accuracy"].max())
    for epoch, expected in zip(history["epoch"], history["val_accuracy"], strict=True):
        assert accuracy(trained / "run" / f"epoch-{epoch:03d}") == pytest.approx(expected)
    assert history["train_loss"].is_monotonic_decreasing, "it learns"


def epoch_of(accuracy, loss):
    return Epoch(1, 0.1, 1.0, 0.5, loss, accuracy, 1.0, 1.0, 1.0)


def test_best_is_the_first_of_the_most_accurate_and_of_those_the_surest(tiny_config):
    best, model = Best(), ViT(tiny_config())
    offers = [(0.5, 1.0), (0.6, 2.0), (0.6, 1.5), (0.6, 1.5), (0.4, 0.1), (0.6, 1.9)]
    assert [best.offer(epoch_of(*offer), model) for offer in offers] == [True, True, True, False, False, False]


def test_best_is_a_copy_that_later_steps_do_not_change(tiny_config):
    best, model = Best(), ViT(tiny_config())
    best.offer(epoch_of(0.5, 1.0), model)
    before = model.head.weight.detach().clone()
    nn.init.zeros_(model.head.weight)
    assert torch.equal(best.weights["head.weight"], before)


def test_log_has_a_row_an_epoch_and_measured_columns_apart(trained):
    history = pd.read_csv(trained / "run-log" / "history.csv")
    timing = pd.read_csv(trained / "run-log" / "timing.csv")
    names = ["epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy"]
    assert list(history.columns) == names and history["epoch"].tolist() == [1, 2, 3]
    assert (
        list(timing.columns) == ["epoch", "seconds", "images_per_second", "peak_memory_mib"]
        and (timing["seconds"] > 0).all()
    )
    assert visible(trained / "run-log") == ["history.csv", "provenance.json", "timing.csv"]


def test_save_every_keeps_the_epochs_it_names(run):
    assert visible(run(epochs=3, save_every=2)) == ["README.md", "config.json", "epoch-002", "model.safetensors"]


def test_logged_learning_rate_is_that_of_the_epochs_last_step(trained, digits):
    steps = math.ceil(digits.counts["train"] / 64)
    recipe = TrainConfig(epochs=3, batch_size=64, lr=5e-3, warmup_epochs=0.5)
    expected = [5e-3 * schedule(epoch * steps - 1, steps, recipe) for epoch in (1, 2, 3)]
    assert np.allclose(pd.read_csv(trained / "run-log" / "history.csv")["lr"], expected)


def test_divergence_in_the_first_epoch_is_told_and_leaves_nothing(run, tmp_path):
    with pytest.raises(DivergedError) as caught:
        run(lr=1e30)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("loss became", "epoch 1", "step 2 of 11", "learning rate", "e+29", "train.lr"):
        assert part in message
    assert visible(tmp_path) == []


def break_after(monkeypatch, steps):
    """Weights that stop being numbers at an optimiser step, as too high a learning rate makes them."""
    step, done = torch.optim.AdamW.step, []

    def breaking(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        done.append(1)
        if len(done) == steps:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)


def test_divergence_later_keeps_the_best_model_so_far_aside(run, tmp_path, digits, monkeypatch):
    run("good", epochs=2, save_every=1)
    break_after(monkeypatch, 15)
    with pytest.raises(DivergedError, match="epoch 2, step 5 of 11"):
        run("bad", epochs=2)
    assert visible(tmp_path) == ["bad.diverged", "good", "good-log"]
    kept, same_epoch = load_model(tmp_path / "bad.diverged"), load_model(tmp_path / "good" / "epoch-001")
    for name, tensor in kept.state_dict().items():
        assert torch.equal(tensor, same_epoch.state_dict()[name])


def test_divergence_at_the_very_last_step_is_not_taken_for_success(run, tmp_path, monkeypatch):
    break_after(monkeypatch, 22)
    with pytest.raises(DivergedError, match="validation loss became nan at epoch 2, step 11 of 11"):
        run(epochs=2)
    assert visible(tmp_path) == ["run.diverged"]


def test_earlier_model_survives_a_run_that_fails(run, tmp_path, monkeypatch):
    before = (run() / "model.safetensors").read_bytes()
    break_after(monkeypatch, 1)
    with pytest.raises(DivergedError):
        run()
    assert visible(tmp_path) == ["run", "run-log"]
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_batch_larger_than_the_data_set_is_one_step(digits, tiny_config):
    steps = steps_of(tiny_config(), digits, TrainConfig(**(RECIPE | {"batch_size": 5000, "epochs": 1})))
    assert [step.images for step in steps] == [digits.counts["train"]]


def test_losses_are_those_of_plain_cross_entropy(digits, tiny_config):
    """One step over all rows: the logged training loss is the untrained model's."""
    recipe = TrainConfig(epochs=1, batch_size=5000, lr=1e-9, weight_decay=0.0, device="cpu")
    training = Training(tiny_config(), digits, recipe, seed=0, horizontal_flip=False)
    *_, epoch = training.run()
    for split, loss, accuracy in (
        ("train", epoch.train_loss, epoch.train_accuracy),
        ("validation", epoch.val_loss, epoch.val_accuracy),
    ):
        images, labels = digits.split(split)
        logits = predict_logits(training.weights, images, digits.mean, digits.std, 100).double().numpy()
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        assert loss == pytest.approx(-log_p[np.arange(len(labels)), labels].mean(), rel=1e-4)
        assert accuracy == pytest.approx((logits.argmax(1) == labels).mean(), abs=2e-3)


def start_long_run(digits_dir, output_dir):
    code = "from effvit.cli.app import main; main()"
    command = [sys.executable, "-c", code, "train", "--dataset-dir", digits_dir, "--output-dir", output_dir]
    command += ["--epochs", "100000", "--save-every", "1", "--hidden-size", "16", "--num-hidden-layers", "1"]
    process = subprocess.Popen(
        [*map(str, command), "--device", "cpu"],
        stderr=subprocess.PIPE,
        text=True,
        # a test run in the background may ignore the signal, which its children would inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stderr:
        if line.startswith("epoch   2/"):
            return process
    raise AssertionError("it never came to its second epoch")


def test_killed_run_leaves_no_output_and_the_next_one_works(run, tmp_path, digits_dir):
    process = start_long_run(digits_dir, tmp_path / "run")
    process.kill()
    process.communicate()
    left = visible(tmp_path)
    assert all(name.startswith(".") for name in left)
    run(epochs=1)
    assert visible(tmp_path) == sorted([*left, "run", "run-log"])
    load_model(tmp_path / "run")


def test_interrupted_run_says_so_and_leaves_nothing(tmp_path, digits_dir):
    process = start_long_run(digits_dir, tmp_path / "run")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped at epoch" in err and "Traceback" not in err
    assert visible(tmp_path) == []


def test_recipe_is_recorded_beside_the_log(run, tmp_path):
    run(seed=3, epochs=1)
    config = json.loads((tmp_path / "run-log" / "provenance.json").read_text())["config"]
    assert config["seed"] == 3 and config["train"]["epochs"] == 1 and config["dataset"] == "digits"
    assert config["model"] == load_model(tmp_path / "run").config.model_dump()


def epochs_of(config, dataset, report=print, **changes):
    """The epochs of a training, and the training."""
    recipe = TrainConfig(**(RECIPE | changes))
    training = Training(config, dataset, recipe, seed=0, horizontal_flip=False, report=report)
    return [event for event in training.run() if isinstance(event, Epoch)], training


def assert_same_results(epochs, others):
    for epoch, other in zip(epochs, others, strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert getattr(epoch, name) == pytest.approx(getattr(other, name), rel=1e-5), name


@pytest.mark.parametrize("size", [10, 50, 64, 127])
def test_gradient_of_micro_batches_is_that_of_the_whole_batch(digits, tiny_config, size):
    changes = {"label_smoothing": 0.1, "clip_norm": 0.5, "mixup": 0.5, "epochs": 1}
    whole, _ = epochs_of(tiny_config(), digits, **changes)
    parts, _ = epochs_of(tiny_config(), digits, micro_batch_size=size, **changes)
    assert_same_results(parts, whole)


def test_step_is_done_again_with_half_as_many_images_where_memory_runs_out(digits, tiny_config, monkeypatch):
    whole, _ = epochs_of(tiny_config(), digits)
    forward, lines, sizes = ViT.forward, [], []

    def limited(self, images):
        sizes.append(len(images))
        if self.training and len(images) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(ViT, "forward", limited)
    parts, training = epochs_of(tiny_config(), digits, report=lines.append)
    assert_same_results(parts, whole)
    assert training.micro_batch_size == 32 and sizes[:3] == [128, 64, 32]
    assert len(lines) == 2 and "128 images" in lines[0] and "32" in lines[1]
    assert not any("\n" in line for line in lines)


def test_memory_that_does_not_hold_one_image_is_a_user_error(digits, tiny_config, monkeypatch):
    def full(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ViT, "forward", full)
    with pytest.raises(UserError, match="one image at a time"):
        epochs_of(tiny_config(), digits)


def test_averaged_weights_are_the_running_mean_and_are_validated(digits, tiny_config):
    decay = 0.8
    training = Training(tiny_config(), digits, TrainConfig(**RECIPE, ema_decay=decay), seed=0, horizontal_flip=False)
    mean = None
    for event in training.run():
        now = {name: p.detach().clone() for name, p in training.model.named_parameters()}
        if isinstance(event, Step):
            mean = now if mean is None else {n: decay * mean[n] + (1 - decay) * now[n] for n in now}
    for name, parameter in training.weights.named_parameters():
        torch.testing.assert_close(parameter.detach(), mean[name], rtol=1e-5, atol=1e-6)
    images, labels = digits.split("validation")
    logits = predict_logits(training.weights, images, digits.mean, digits.std, 128)
    assert event.val_accuracy == pytest.approx((logits.argmax(1).numpy() == labels).mean())


def test_bfloat16_keeps_weights_in_float32_and_learns(digits, tiny_config):
    exact, _ = epochs_of(tiny_config(), digits, epochs=3)
    mixed, training = epochs_of(tiny_config(), digits, epochs=3, precision="bf16-mixed")
    assert {p.dtype for p in training.model.parameters()} == {torch.float32}
    assert mixed[-1].train_loss != exact[-1].train_loss
    assert mixed[-1].train_loss == pytest.approx(exact[-1].train_loss, rel=0.02)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler here")
def test_compiled_model_has_the_losses_of_the_eager_one(digits, tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = tiny_config(num_hidden_layers=1)
    one_shape = {"epochs": 2, "batch_size": 5000}
    eager, _ = epochs_of(config, digits, **one_shape)
    compiled, training = epochs_of(config, digits, **one_shape, compile="on")
    for ours, expected in zip(compiled, eager, strict=True):
        assert ours.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
        assert ours.val_loss == pytest.approx(expected.val_loss, rel=1e-4)
    assert all(not name.startswith("_orig_mod") for name in training.weights.state_dict())


def test_dropout_of_a_step_does_not_depend_on_how_it_was_reached(digits, tiny_config):
    """A run that goes on from a state in memory has the losses of one that never stopped."""
    config, recipe = tiny_config(hidden_dropout_prob=0.2), TrainConfig(**RECIPE)
    whole = [step.loss for step in steps_of(config, digits, recipe)]
    first = Training(config, digits, recipe, seed=0, horizontal_flip=False)
    events = first.run()
    begun = [next(events).loss for _ in range(5)]
    second = Training(config, digits, recipe, seed=0, horizontal_flip=False)
    second.restore(*first.state())
    rest = [event.loss for event in second.run() if isinstance(event, Step)]
    assert begun + rest == whole


@pytest.mark.parametrize(("threads", "expected"), [(0, 3), (2, 2)])
def test_threads_are_the_recipes_or_as_they_were(digits, tiny_config, threads, expected):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with policy.kept():
            recipe = TrainConfig(**RECIPE | {"threads": threads})
            training = Training(tiny_config(), digits, recipe, seed=0, horizontal_flip=False)
            next(training.run())
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
