"""Losses of other papers against their text, one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.paper import rivals

LOGITS = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 0.5, 0.0], [0.0, 0.2, 2.0]], dtype=torch.float64)
OTHERS = LOGITS.flip(0) * 0.7
TARGET = torch.tensor([0, 1, 1, 2])
P, Q = LOGITS.softmax(1).tolist(), OTHERS.softmax(1).tolist()


def cross_entropy(soft, p):
    return -sum(t * math.log(value) for t, value in zip(soft, p, strict=True))


def hard(label):
    return [float(c == label) for c in range(3)]


def mixed(share, first, second):
    return [share * a + (1 - share) * b for a, b in zip(first, second, strict=True)]


def test_online_label_smoothing_learns_from_what_was_right():
    criterion = rivals.OnlineLabelSmoothing(0.6, 3).double()
    criterion.begin_epoch(0, 2)
    expected = [cross_entropy(mixed(0.6, hard(y), [1 / 3] * 3), p) for y, p in zip(TARGET.tolist(), P, strict=True)]
    assert criterion(LOGITS, TARGET).item() == pytest.approx(sum(expected) / 4)
    criterion.begin_epoch(1, 2)
    soft = {0: P[0], 1: P[1], 2: P[3]}  # the third row was predicted wrongly
    expected = [cross_entropy(mixed(0.6, hard(y), soft[y]), q) for y, q in zip(TARGET.tolist(), Q, strict=True)]
    assert criterion(OTHERS, TARGET).item() == pytest.approx(sum(expected) / 4)


def test_online_label_smoothing_is_even_for_a_class_that_was_never_right():
    criterion = rivals.OnlineLabelSmoothing(0.5, 3).double()
    criterion.begin_epoch(0, 2)
    criterion(LOGITS[2:3], TARGET[2:3])
    criterion.begin_epoch(1, 2)
    assert criterion.soft.tolist() == [[pytest.approx(1 / 3)] * 3] * 3


def test_progressive_distillation_takes_the_last_epoch():
    criterion = rivals.ProgressiveSelfKnowledgeDistillation(0.8, 6, 3).double()
    index = torch.tensor([5, 0, 3, 1])
    criterion.begin_epoch(0, 4)
    assert criterion(LOGITS, TARGET, index=index).item() == pytest.approx(
        torch.nn.functional.cross_entropy(LOGITS, TARGET).item()
    )
    criterion.begin_epoch(1, 4)  # 0.8 x 2 / 4
    expected = [cross_entropy(mixed(0.6, hard(y), p), q) for y, p, q in zip(TARGET.tolist(), P, Q, strict=True)]
    assert criterion(OTHERS, TARGET, index=index).item() == pytest.approx(sum(expected) / 4)
    never_seen = cross_entropy(hard(0), P[0])
    assert criterion(LOGITS[:1], TARGET[:1], index=torch.tensor([2])).item() == pytest.approx(never_seen)


def test_early_learning_pulls_towards_the_average():
    criterion = rivals.EarlyLearningRegularization(3.0, 6, 3, beta=0.7).double()
    index = torch.tensor([5, 0, 3, 1])
    criterion(LOGITS, TARGET, index=index)
    expected = []
    for y, p, q in zip(TARGET.tolist(), P, Q, strict=True):
        average = [0.7 * 0.3 * a + 0.3 * b for a, b in zip(p, q, strict=True)]
        agreement = sum(a * b for a, b in zip(average, q, strict=True))
        expected.append(cross_entropy(hard(y), q) + 3.0 * math.log(1 - agreement))
    x = OTHERS.clone().requires_grad_()
    loss = criterion(x, TARGET, index=index)
    assert loss.item() == pytest.approx(sum(expected) / 4)
    loss.backward()
    assert x.grad.isfinite().all()
