"""Which language is a word from? A task whose true answer is a probability, and known."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import torch

from benchmarks.paper.data.dataset import Data, Split

LANGUAGES = ("de", "en", "es", "fi", "fr", "hu", "it", "nl", "pl", "pt", "sv", "tr")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPELLED = str.maketrans(
    {"ı": "i", "ł": "l", "đ": "d", "ð": "d", "ø": "o", "æ": "ae", "œ": "oe", "þ": "th"}  # noqa: RUF001
)
SHORTEST, LONGEST = 3, 12  # letters
TRAIN, VALIDATION, TEST = 10_000, 2_000, 20_000
INSTALL = "pip install 'wordfreq>=3.1.1'"


def words() -> Data:
    r"""32,000 words of twelve languages, from the frequency lists of the package ``wordfreq`` (Speer, 2022).

    The joint distribution of language l and word w is what the lists say: every language is as likely as the others,
    and within a language a word is as likely as its frequency $f_l(w)$ among the words that are eligible. So

    $$p(l \mid w) = f_l(w) \Big/ \sum_{l'} f_{l'}(w).$$

    1. Words are drawn from the marginal $\sum_l f_l(w) / 12$, and of words that come again the first counts, until
       there are 32,000 different ones. Their order is then shuffled and cut into the three splits, so that no word is
       in two.
    2. The label of each is drawn, once, from its posterior. Which words were drawn depends on no label, so that the
       posterior of a label given its word is as above.

    Eligible are words that have 3 to 12 letters a to z after ``spell``; those that are then spelled alike are one. The
    lists are the small ones (every word that is used once in a million words, in the language's own spelling), with
    frequencies in whole occurrences per billion words. All numbers are drawn from the raw bits of PCG64 by additions,
    divisions and comparisons, so that the data set is the same everywhere.

    A word is an image of height 1 and width 12 with a channel for each letter: 1 where the letter stands, 0 elsewhere.
    The lists are published under CC BY-SA 4.0, the package under the Apache License 2.0.

    Raises:
        FileNotFoundError: the package is not installed.
        ValueError: a list of it cannot be read.
    """
    spellings, shares = joint({language: frequencies(language) for language in LANGUAGES})
    cumulative = np.cumsum(shares, 1)  # a sum from left to right, where .sum() may choose another order
    chosen = draw_different(cumulative[:, -1], TRAIN + VALIDATION + TEST, Uniform(0))
    cumulative = cumulative[chosen]
    drawn = Uniform(1)(len(chosen)) * cumulative[:, -1]
    labels = torch.from_numpy((cumulative <= drawn[:, None]).sum(1))
    posterior = torch.from_numpy(shares[chosen] / cumulative[:, -1:])
    order = np.argsort(Uniform(2)(len(chosen)), kind="stable")
    everything = Split(one_hot([spellings[index] for index in chosen]), labels, posterior).take(torch.from_numpy(order))
    bounds = (0, TRAIN, TRAIN + VALIDATION, None)
    splits = [everything.take(slice(*bounds[part : part + 2])) for part in range(3)]
    return Data(len(LANGUAGES), *splits, padding=0, flip=False)


def spell(text: str) -> str:
    """Small letters without accents: NFKD less its combining marks, ß as ss, æ as ae, ł as l, and so on.

    Letters that NFKD does not take apart are in ``SPELLED``; ß is taken apart by ``str.casefold``.
    """
    decomposed = unicodedata.normalize("NFKD", text.casefold()).translate(SPELLED)
    return re.sub("[\u0300-\u036f]", "", decomposed)


def frequencies(language: str) -> dict[str, int]:
    """Occurrences of each eligible word in a billion words of a language.

    Raises:
        FileNotFoundError: wordfreq is not installed.
        ValueError: its list cannot be read.
    """
    try:
        import wordfreq
    except ImportError as error:
        raise FileNotFoundError(f"words needs the package wordfreq ({error}): {INSTALL}") from None
    try:
        lists = wordfreq.get_frequency_list(language, "small")  # words of frequency 10 ** (-place / 100), by place
    except Exception as error:  # of gzip, msgpack, the file system or the package itself
        raise ValueError(f"the list of {language} of wordfreq cannot be read ({error}): {INSTALL}") from error
    listed = "\n".join(word for of_place in lists for word in of_place)
    counts = [round(1e9 * 10 ** (-place / 100)) for place, of_place in enumerate(lists) for _ in of_place]
    eligible = re.compile(f"[a-z]{{{SHORTEST},{LONGEST}}}").fullmatch
    found: dict[str, int] = {}
    for word, count in zip(spell(listed).split("\n"), counts, strict=True):
        if eligible(word):
            found[word] = found.get(word, 0) + count
    return found


def joint(counts: dict[str, dict[str, int]]) -> tuple[list[str], np.ndarray]:
    """Every word, in alphabetical order, and its share in each language (words, languages)."""
    spellings = sorted(set().union(*counts.values()))
    shares = [[of_language.get(word, 0) for word in spellings] for of_language in counts.values()]
    totals = [sum(of_language.values()) for of_language in counts.values()]
    return spellings, np.array(shares, float).T / totals


class Uniform:
    """Numbers in [0, 1) from the raw bits of PCG64, which numpy promises not to change: ``Uniform(seed)(count)``."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def __call__(self, count: int) -> np.ndarray:
        """Give the next numbers."""
        return (self.bits.random_raw(count) >> np.uint64(11)) * 2.0**-53


def draw_different(weights: np.ndarray, count: int, numbers: Uniform) -> np.ndarray:
    """Draw indices in proportion to weights until there are ``count`` different ones, in the order of their first.

    Raises:
        ValueError: there are too few.
    """
    if np.count_nonzero(weights) < 2 * count:
        raise ValueError(f"too few words in the lists of wordfreq ({np.count_nonzero(weights):,}): {INSTALL}")
    cumulative = np.cumsum(weights)
    drawn = np.empty(0, np.int64)
    while len(drawn) < count:
        found = np.searchsorted(cumulative, numbers(count) * cumulative[-1], side="right")
        drawn = np.concatenate([drawn, found])
        drawn = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return drawn[:count]


def one_hot(spellings: list[str]) -> torch.Tensor:
    """Words as images (N, 26, 1, 12): the channel is the letter."""
    padded = "".join(word.ljust(LONGEST, "`") for word in spellings)  # ` is before a in ASCII
    letters = torch.frombuffer(bytearray(padded.encode()), dtype=torch.uint8).long() - ord("`")
    images = torch.nn.functional.one_hot(letters.reshape(-1, 1, LONGEST), 27)[..., 1:]
    return images.permute(0, 3, 1, 2).to(torch.uint8).contiguous()
