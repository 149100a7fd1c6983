"""Scores that order a batch."""

from __future__ import annotations

import torch

from softlabels.ranking import PredictionHistory, log_odds


def test_log_odds_are_those_of_the_confidence():
    logits = 3 * torch.randn(2, 5, 4, dtype=torch.float64)
    target = torch.randint(5, (2, 4))
    p = logits.softmax(1)
    torch.testing.assert_close(log_odds(logits, target, "max"), torch.logit(p.amax(1)))
    of_label = p.gather(1, target.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(log_odds(logits, target, "true_class"), torch.logit(of_label))
    soft = torch.rand(2, 5, 4, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(log_odds(logits, soft, "true_class"), torch.logit((soft * p).sum(1)))


def test_saturated_confidences_still_differ():
    """Three predictions whose float32 confidence is exactly 1."""
    logits = torch.tensor([[40.0, 0.0], [60.0, 0.0], [50.0, 0.0]])
    assert logits.softmax(1).amax(1).eq(1).all()
    assert log_odds(logits, torch.zeros(3, dtype=torch.long), "max").argsort().tolist() == [0, 2, 1]
    assert log_odds(logits, torch.ones(3, dtype=torch.long), "true_class").argsort().tolist() == [1, 2, 0]


def test_ignored_labels_and_half_precision_are_valid():
    logits = torch.randn(3, 4).half()
    score = log_odds(logits, torch.tensor([-100, 255, 1]), "true_class")
    assert score.dtype == torch.float32
    assert score.isfinite().all()


def test_history_is_an_even_mean_of_visits():
    history = PredictionHistory(4)
    index, kept = torch.tensor([2, 0]), torch.tensor([True, True])
    first, second = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
    assert torch.equal(history.rank_and_update(index, first, kept), first)  # not seen: the current prediction
    torch.testing.assert_close(history.rank_and_update(index, second, kept), first)
    doubt = (torch.sigmoid(-first) + torch.sigmoid(-second)) / 2
    torch.testing.assert_close(history.rank_and_update(index, first, kept), -torch.logit(doubt))
    third = (2 * doubt + torch.sigmoid(-first)) / 3
    torch.testing.assert_close(history.doubt[index], third)
    assert history.doubt.isnan().tolist() == [False, True, False, True]
    assert history.visits.tolist() == [3, 0, 3, 0]


def test_rows_of_one_id_are_visits_of_one_sample():
    history = PredictionHistory(2)
    log_odds = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    kept = torch.tensor([[True, True], [False, True]])
    history.rank_and_update(torch.zeros(2, 2, dtype=torch.int64), log_odds, kept)
    torch.testing.assert_close(history.doubt[0], torch.sigmoid(-log_odds[kept]).mean())
    assert history.visits.tolist() == [3, 0]


def test_history_ignores_rows_that_are_not_kept():
    history = PredictionHistory(3)
    history.rank_and_update(torch.tensor([0, 1]), torch.tensor([1.0, torch.nan]), torch.tensor([False, True]))
    assert history.doubt.isnan().all()
    assert history.double().doubt.dtype == torch.float32
