"""The data set of words: its posterior against its definition, its draws, and what it says when it cannot be had."""

from __future__ import annotations

import builtins
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import wordfreq

from benchmarks.paper.data import DataSpec, load, train_size
from benchmarks.paper.data.dataset import with_noise
from benchmarks.paper.data.words import LANGUAGES, LETTERS, Uniform, draw_different, spell
from benchmarks.paper.recipe import evaluate, temperature_scaled


@pytest.fixture(scope="module")
def data():
    return load(DataSpec("words"))


@pytest.fixture(scope="module")
def spellings(data):
    """The words of each split, read back from their images."""

    def read(image):
        return "".join(LETTERS[column.argmax()] if column.any() else " " for column in image[:, 0].T).rstrip()

    return {name: [read(i) for i in getattr(data, name).images] for name in ("train", "validation", "test")}


def test_no_word_is_in_two_splits(data, spellings):
    assert [len(spellings[name]) for name in ("train", "validation", "test")] == [10_000, 2_000, 20_000]
    assert train_size(DataSpec("words")) == 10_000
    every = [word for of_split in spellings.values() for word in of_split]
    assert len(set(every)) == 32_000
    assert all(3 <= len(word) <= 12 and word.isalpha() and word.isascii() and word.islower() for word in every)
    assert data.train.images.sum((1, 2, 3)).tolist() == [len(word) for word in spellings["train"]]


def test_posterior_is_what_the_lists_say(data, spellings):
    """Against the frequencies of wordfreq as numbers, added word by word."""
    totals, found = [], []
    wanted = {word: row for row, word in enumerate(spellings["test"][:500])}
    for language in LANGUAGES:
        total, of_words = 0.0, [0.0] * len(wanted)
        for word, frequency in wordfreq.get_frequency_dict(language, "small").items():
            spelled = spell(word)
            if 3 <= len(spelled) <= 12 and set(spelled) <= set(LETTERS):
                total += frequency
                if spelled in wanted:
                    of_words[wanted[spelled]] += frequency
        totals.append(total)
        found.append(of_words)
    shares = np.array(found).T / totals
    posterior = data.test.posterior[:500].numpy()
    np.testing.assert_allclose(posterior, shares / shares.sum(1, keepdims=True), rtol=1e-3, atol=1e-12)


def test_labels_are_drawn_from_the_posterior(data):
    """The number of labels of each class is what the posteriors add up to, and so for the least certain words."""
    for split in (data.train, data.validation, data.test):
        torch.testing.assert_close(split.posterior.sum(1), torch.ones(len(split), dtype=torch.float64))
        assert (split.posterior.gather(1, split.labels[:, None]) > 0).all()
        for part in (split, split.take(split.posterior.amax(1) < 0.7)):
            counts = torch.bincount(part.labels, minlength=12).double()
            deviation = (part.posterior * (1 - part.posterior)).sum(0).sqrt()
            assert ((counts - part.posterior.sum(0)).abs() < 4 * deviation).all()
    unsure = data.test.posterior.amax(1) < 0.7
    assert 0.1 < unsure.double().mean() < 0.3  # the task is uncertain in itself


def test_the_same_on_every_machine(data):
    assert data.digest() == DIGEST


DIGEST = "01fe5dd001e1f385"


def test_likelier_words_are_drawn_first():
    weights = np.array([0.0, 1.0, 2.0, 4.0, 0.0, 8.0])
    first = Counter(int(draw_different(weights, 2, Uniform(seed))[0]) for seed in range(3000))
    assert set(first) == {1, 2, 3, 5}
    for index, count in first.items():
        share = weights[index] / weights.sum()
        assert abs(count / 3000 - share) < 4 * math.sqrt(share * (1 - share) / 3000)
    drawn = draw_different(np.ones(50), 20, Uniform(0))
    assert len(set(drawn.tolist())) == 20
    assert draw_different(np.ones(50), 10, Uniform(0)).tolist() == drawn[:10].tolist()
    with pytest.raises(ValueError, match="too few words in the lists of wordfreq"):
        draw_different(np.ones(30), 20, Uniform(0))


@pytest.mark.parametrize(
    ("word", "spelled"),
    [
        ("Été", "ete"),
        ("straße", "strasse"),
        ("ığdır", "igdir"),  # noqa: RUF001
        ("łódź", "lodz"),
        ("køb", "kob"),
        ("œuvre", "oeuvre"),
    ],
)
def test_spelling(word, spelled):
    assert spell(word) == spelled


def test_one_sentence_where_the_package_is_missing_or_broken(monkeypatch):
    def broken(language, wordlist):
        raise OSError("not a gzip file")

    monkeypatch.setattr(wordfreq, "get_frequency_list", broken)
    with pytest.raises(ValueError, match=r"the list of de of wordfreq cannot be read \(not a gzip file\): pip install"):
        load(DataSpec("words"))
    found = builtins.__import__

    def without(name, *arguments):
        if name == "wordfreq":
            raise ModuleNotFoundError("No module named 'wordfreq'")
        return found(name, *arguments)

    monkeypatch.delitem(sys.modules, "wordfreq")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FileNotFoundError, match=r"words needs the package wordfreq \(No module named 'wordfreq'\)"):
        load(DataSpec("words"))


def test_metrics_against_the_posterior():
    generator = torch.Generator().manual_seed(0)
    posterior = torch.rand(6, 3, generator=generator).double()
    posterior[0, 1] = 0.0
    posterior /= posterior.sum(1, keepdim=True)
    logits, labels = torch.randn(6, 3, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])
    found = evaluate(logits, labels, posterior)
    kl = entropy = 0.0
    for true, predicted in zip(posterior.tolist(), logits.double().softmax(1).tolist(), strict=True):
        kl += sum(p * math.log(p / q) for p, q in zip(true, predicted, strict=True) if p) / 6
        entropy -= sum(p * math.log(p) for p in true if p) / 6
    assert found["kl"] == pytest.approx(kl)
    assert found["excess"] == pytest.approx(found["nll"] - entropy)
    right = sum(max(p) == p[y] for p, y in zip(posterior.tolist(), labels.tolist(), strict=True))
    assert found["limit"] == pytest.approx(100 * right / 6)
    assert evaluate(posterior.clamp(min=1e-300).log(), labels, posterior)["kl"] == pytest.approx(0.0, abs=1e-12)


def test_temperature_is_fitted_on_validation_data(data):
    torch.manual_seed(0)
    labels = data.validation.labels
    logits = 3.0 * torch.randn(len(labels), 12).scatter_add(1, labels[:, None], torch.ones(len(labels), 1))
    test = data.test.take(slice(100))
    found = temperature_scaled(2.0 * torch.ones(100, 12), test, logits, data.validation)
    assert found["temperature"] > 1.5
    assert found["nll"] == pytest.approx(math.log(12))
    assert temperature_scaled(logits[:100], test, 9.0 * torch.eye(12)[labels], data.validation) is None


def test_noise_replaces_a_share_of_the_training_labels(data):
    noisy = load(DataSpec("words", label_noise=0.3))
    assert torch.equal(noisy.train.images, data.train.images)
    assert (noisy.train.labels != data.train.labels).sum() == 3_000
    assert torch.equal(noisy.test.labels, data.test.labels)
    assert torch.equal(noisy.validation.labels, data.validation.labels)
    replaced = with_noise(data.train, 12, 1.0).labels
    assert not (replaced == data.train.labels).any()
    assert torch.bincount(replaced, minlength=12).min() > 600
