import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, log_loss, recall_score, top_k_accuracy_score
from torch import nn

from effvit.evaluation.score import (
    attention_rollout,
    calibration_error,
    confusion,
    per_class,
    predict_logits,
    summarise,
    top_k_accuracy,
    worst_mistakes,
)

CLASSES = tuple("abcdefghijkl")


@pytest.fixture
def scored():
    """Logits that are right about half of the time, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(len(CLASSES), (500,), generator=generator)
    logits = torch.randn(500, len(CLASSES), generator=generator)
    logits[torch.arange(500), labels] += 1.5
    return logits, labels


@pytest.mark.parametrize("k", [1, 2, 5, 11])
def test_top_k_is_scikit_learns(scored, k):
    logits, labels = scored
    expected = top_k_accuracy_score(labels, logits.numpy(), k=k, labels=range(len(CLASSES)))
    assert top_k_accuracy(logits, labels, k) == pytest.approx(expected)


def test_top_5_of_fewer_than_5_classes_is_one():
    assert top_k_accuracy(torch.randn(20, 3), torch.randint(3, (20,)), 5) == 1


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_is_the_sum_over_bins_done_by_hand(scored, bins):
    logits, labels = scored
    shifted = np.exp(logits.double().numpy())
    probabilities = shifted / shifted.sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    total = 0.0
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            total += inside.sum() / len(labels) * abs(right[inside].mean() - confidence[inside].mean())
    assert calibration_error(logits, labels, bins) == pytest.approx(total, abs=1e-6)


def test_calibration_error_at_its_limits():
    labels = torch.zeros(10, dtype=torch.long)
    sure = torch.tensor([[100.0, 0.0]]).expand(10, 2)
    assert calibration_error(sure, labels) == 0
    assert calibration_error(sure, labels + 1) == 1
    half = torch.arange(10) % 2
    assert calibration_error(torch.tensor([[1e-4, 0.0]]).expand(10, 2), half) == pytest.approx(0, abs=1e-3)


def test_summary_is_scikit_learns(scored):
    logits, labels = scored
    summary = summarise(logits, labels)
    probabilities = logits.double().softmax(1).numpy()
    assert summary["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(len(CLASSES))), rel=1e-5)
    assert summary["num_images"] == 500 and summary["top1"] <= summary["top5"]


def test_per_class_accuracy_is_scikit_learns_recall(scored):
    logits, labels = scored
    table = per_class(logits, labels, CLASSES)
    recall = recall_score(labels, logits.argmax(1), labels=range(len(CLASSES)), average=None)
    assert np.allclose(table["top1"].astype(float), recall)
    assert table["class"].tolist() == list(CLASSES)
    assert table["num_images"].tolist() == np.bincount(labels.numpy(), minlength=len(CLASSES)).tolist()


def test_class_without_images_has_no_accuracy():
    table = per_class(torch.eye(3), torch.tensor([0, 1, 1]), ("x", "y", "z"))
    assert table["num_images"].tolist() == [1, 2, 0]
    assert table["top1"].isna().tolist() == [False, False, True]


def test_confusion_is_scikit_learns(scored):
    logits, labels = scored
    table = confusion(logits, labels, CLASSES)
    matrix = np.zeros((len(CLASSES), len(CLASSES)), dtype=int)
    for row in table.itertuples():
        matrix[CLASSES.index(row.actual), CLASSES.index(row.predicted)] = row.count
    assert np.array_equal(matrix, confusion_matrix(labels, logits.argmax(1), labels=range(len(CLASSES))))
    assert (table["count"] > 0).all()


@pytest.mark.parametrize("most", [0, 1, 20, 10_000])
def test_worst_mistakes_are_those_of_brute_force(scored, most):
    logits, labels = scored
    probabilities = logits.double().softmax(1).numpy()
    wrong = [row for row in range(len(labels)) if probabilities[row].argmax() != labels[row]]
    expected = sorted(wrong, key=lambda row: -probabilities[row].max())[:most]
    rows, confidence = worst_mistakes(logits, labels, most)
    assert rows.tolist() == expected
    assert np.allclose(confidence, probabilities[expected].max(1))


def test_rollout_is_the_product_of_normalised_maps(scored):
    blocks, batch, heads, tokens = 4, 3, 2, 10
    rng = np.random.default_rng(0)
    maps = rng.random((blocks, batch, heads, tokens, tokens))
    maps /= maps.sum(-1, keepdims=True)
    expected = np.empty((batch, tokens - 1))
    for sample in range(batch):
        product = np.eye(tokens)
        for block in range(blocks):
            mixed = maps[block, sample].mean(0)
            product = (mixed / 2 + np.eye(tokens) / 2) @ product
        expected[sample] = product[0, 1:] / product[0, 1:].sum()
    rolled = attention_rollout([torch.from_numpy(block) for block in maps])
    assert np.allclose(rolled.numpy(), expected, atol=1e-6)
    assert np.allclose(rolled.sum(1).numpy(), 1, atol=1e-6)


def test_rollout_through_blocks_that_mix_nothing_but_the_last_is_the_lasts_attention():
    tokens = 6
    identity = torch.eye(tokens).expand(1, 2, tokens, tokens)
    last = torch.rand(1, 1, tokens, tokens).expand(1, 2, tokens, tokens)
    rolled = attention_rollout([identity, identity, last])
    assert torch.allclose(rolled[0], last[0, 0, 0, 1:] / last[0, 0, 0, 1:].sum())


def test_rollout_of_signed_maps_is_a_distribution():
    maps = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    rolled = attention_rollout(maps)
    assert (rolled >= 0).all() and torch.allclose(rolled.sum(1), torch.ones(2))


@pytest.mark.parametrize("batch_size", [1, 7, 20, 100])
def test_logits_do_not_depend_on_the_batch(batch_size):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(-1, 1, 48).view(48, 1) * torch.tensor([[1.0, 2.0]]))

        def forward(self, images):
            return images.flatten(1) @ self.weight

    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    logits = predict_logits(Flat(), images, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), batch_size)
    plain = ((images / 255 - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]).transpose(0, 3, 1, 2).reshape(20, -1)
    expected = plain @ (np.linspace(-1, 1, 48)[:, None] * [[1.0, 2.0]])
    assert np.allclose(logits.numpy(), expected, atol=1e-4) and not logits.requires_grad
