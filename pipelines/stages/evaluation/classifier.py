"""Which of a few classes a picture belongs to: logistic regression on its features.

Shape legend: N pictures, D features, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PENALTY = 1e-2  # of the squared weights, against the mean cross-entropy
MAX_ITERATIONS = 500


@dataclass(frozen=True, eq=False)
class Classifier:
    """A fitted classifier."""

    classes: tuple[str, ...]
    mean_D: NDArray[np.float64]
    scale_D: NDArray[np.float64]
    weight_DK: NDArray[np.float64]
    bias_K: NDArray[np.float64]

    def __call__(self, features_ND: NDArray[np.float64]) -> list[str]:
        """The likeliest class of each picture."""
        scores_NK = (features_ND - self.mean_D) / self.scale_D @ self.weight_DK + self.bias_K
        return [self.classes[index] for index in scores_NK.argmax(1)]


def fit_classifier(features_ND: NDArray[np.float64], labels: Sequence[str]) -> Classifier:
    """Fit multinomial logistic regression on standardised features, with an L2 penalty.

    The problem is convex, so its solution is a function of the data alone.

    Raises:
        ValueError: fewer than two classes, or as many labels as pictures are not there.
    """
    import numpy as np
    import torch
    from torch.nn import functional

    classes = tuple(sorted(set(labels)))
    if len(classes) < 2 or len(labels) != len(features_ND):
        raise ValueError(
            f"labels must be one a picture ({len(features_ND)}) and of two classes at least, "
            f"got {len(labels)} of {list(classes)}"
        )
    mean_D = features_ND.mean(0)
    scale_D = np.maximum(features_ND.std(0), 1e-8)
    x_ND = torch.from_numpy((features_ND - mean_D) / scale_D)
    target_N = torch.tensor([classes.index(label) for label in labels])
    weight_DK = torch.zeros(x_ND.shape[1], len(classes), dtype=torch.float64, requires_grad=True)
    bias_K = torch.zeros(len(classes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_DK, bias_K], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe"
    )

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(x_ND @ weight_DK + bias_K, target_N)
        value = value + PENALTY * weight_DK.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return Classifier(
        classes=classes,
        mean_D=mean_D,
        scale_D=scale_D,
        weight_DK=weight_DK.detach().numpy(),
        bias_K=bias_K.detach().numpy(),
    )
