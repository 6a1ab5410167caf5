"""The handwritten digits that scikit-learn ships, split for training and testing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StagecutError


@dataclass(frozen=True)
class DigitsData:
    """1,797 images of digits in two parts; pixels have the training part's mean 0 and deviation 1."""

    x_train: Tensor  # (N, 1, 8, 8) float32
    y_train: Tensor  # (N,) int64, 0 to 9
    x_test: Tensor  # (M, 1, 8, 8) float32
    y_test: Tensor  # (M,) int64, 0 to 9


def load_digits(seed: int = 0, test_share: float = 0.2) -> DigitsData:
    """Load the digits from the installed scikit-learn; the same ``seed`` always gives the same split.

    Raises:
        StagecutError: scikit-learn is not installed, or ``test_share`` is not between 0 and 1.
    """
    if not 0 < test_share < 1:
        raise StagecutError(f"test_share must lie between 0 and 1, got {test_share}")
    try:
        from sklearn.datasets import load_digits as load_bundled
    except ImportError as error:
        raise StagecutError(
            "the digits come with scikit-learn, which is not installed", hint="pip install scikit-learn"
        ) from error
    bundled = load_bundled()
    x = torch.tensor(bundled.images, dtype=torch.float32).unsqueeze(1)  # (1797, 8, 8) -> (1797, 1, 8, 8)
    y = torch.tensor(bundled.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    n_test = round(len(x) * test_share)
    test, train = order[:n_test], order[n_test:]
    x = (x - x[train].mean()) / x[train].std()
    return DigitsData(x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test])
