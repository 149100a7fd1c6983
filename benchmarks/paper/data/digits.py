"""scikit-learn's handwritten digits."""

from __future__ import annotations

import torch

from benchmarks.paper.data.dataset import Data, Split, hold_out


def digits() -> Data:
    """1,797 images of 8 x 8 handwritten digits, half of them for testing; embedded in scikit-learn."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    everything = Split(
        torch.tensor(bunch.images, dtype=torch.uint8).unsqueeze(1), torch.tensor(bunch.target, dtype=torch.long)
    )
    rest, test = hold_out(everything, 898)
    train, validation = hold_out(rest)
    return Data(10, train, validation, test, padding=1, flip=False)
