"""A linear probe on stored features: standardise, multinomial logistic regression, freeze.

The probe stands for the head that a user has trained on the fp32 model and does not want to train again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize

from robx.errors import InputError

# More rows hardly change a probe's answers but cost time in proportion; a fixed random subset is used.
MAX_ROWS = 50_000


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A frozen linear classifier: scores = (x - mean) / std @ weights + bias."""

    mean: np.ndarray  # float32 (D,)
    std: np.ndarray  # float32 (D,)
    weights: np.ndarray  # float32 (D, C)
    bias: np.ndarray  # float32 (C,)

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Class scores (N, C) of features (N, D)."""
        scores: np.ndarray = ((features - self.mean) / self.std) @ self.weights + self.bias
        return scores

    def predict(self, features: np.ndarray) -> np.ndarray:
        """The best class of each row, int64 (N,); -1 for a row that is not finite."""
        finite = np.isfinite(features).all(axis=1)
        best = self.scores(np.where(finite[:, None], features, 0)).argmax(axis=1)
        return np.where(finite, best, -1)


def fit_probe(features: np.ndarray, labels: np.ndarray, *, classes: int, penalty: float = 1e-3) -> Probe:
    """Train a probe on features (N, D) with labels (N,), 0 <= label < classes; deterministic.

    Minimises the mean cross-entropy + penalty / 2 * |weights|^2 over standardised features with L-BFGS. The problem is
    strictly convex in the weights, so the answer does not depend on where it starts.
    (scikit-learn's LogisticRegression takes up to twice as long to reach the same objective.)

    Raises:
        InputError: no rows, values that are not finite, or labels outside the classes.
    """
    if not len(features) or len(features) != len(labels):
        raise InputError(
            f"a probe needs one label per feature, got {len(features)} features and {len(labels)} labels: "
            "give labelled images"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"labels from {labels.min()} to {labels.max()} do not fit {classes} classes: leave out unlabelled images"
        )
    if not np.isfinite(features).all():
        raise InputError("the features contain NaN or infinity: the model is damaged; train or export it again")
    if len(features) > MAX_ROWS:
        chosen = np.sort(np.random.default_rng(0).permutation(len(features))[:MAX_ROWS])
        features, labels = features[chosen], labels[chosen]
    mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
    std = features.std(axis=0, dtype=np.float64).astype(np.float32)
    std[std < 1e-6 * max(float(std.max()), 1e-30)] = 1  # a constant dimension carries no information
    rows = ((features - mean) / std).astype(np.float32)
    found = optimize.minimize(
        _loss, np.zeros((rows.shape[1] + 1) * classes), args=(rows, labels, classes, penalty), jac=True,
        method="L-BFGS-B", options={"maxiter": 200, "ftol": 1e-7, "gtol": 1e-5},
    )  # fmt: skip
    weights = found.x.reshape(-1, classes).astype(np.float32)
    return Probe(mean=mean, std=std, weights=weights[:-1], bias=weights[-1])


def _loss(
    flat: np.ndarray, rows: np.ndarray, labels: np.ndarray, classes: int, penalty: float
) -> tuple[float, np.ndarray]:
    """Penalised mean cross-entropy and its gradient; weights (D + 1, C) with the bias last, which is not penalised."""
    weights = flat.reshape(-1, classes)
    scores = rows @ weights[:-1].astype(np.float32) + weights[-1].astype(np.float32)
    scores -= scores.max(axis=1, keepdims=True)
    own = np.take_along_axis(scores, labels[:, None], axis=1)[:, 0]
    np.exp(scores, out=scores)
    total = scores.sum(axis=1)
    loss = float(np.mean(np.log(total) - own, dtype=np.float64)) + penalty / 2 * float(np.sum(weights[:-1] ** 2))
    scores /= total[:, None]
    scores[np.arange(len(labels)), labels] -= 1
    scores /= len(labels)
    gradient = np.empty_like(weights)
    gradient[:-1] = rows.T @ scores + penalty * weights[:-1]
    gradient[-1] = scores.sum(axis=0, dtype=np.float64)
    return loss, gradient.ravel()
