"""The probe against scikit-learn's logistic regression, and against its own gradient by differences."""

import numpy as np
import pytest
from scipy import optimize
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from robx.errors import InputError
from robx.eval.fidelity import probe


def data(n=150, d=6, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    features = rng.normal(size=(classes, d))[labels] + rng.normal(size=(n, d))
    return (features * rng.uniform(0.1, 30, d) + rng.normal(size=d) * 10).astype(np.float32), labels


def test_the_probe_is_scikit_learns_minimum():
    features, labels = data()
    found = probe.fit_probe(features, labels, classes=3, penalty=1e-2)
    scaled = StandardScaler().fit_transform(features.astype(np.float64))
    # scikit-learn: C sum(loss) + |w|^2 / 2; here: mean(loss) + penalty |w|^2 / 2.
    model = LogisticRegression(C=1 / (1e-2 * len(labels)), tol=1e-10, max_iter=5000).fit(scaled, labels)
    np.testing.assert_allclose(found.weights, model.coef_.T, atol=5e-3)
    expected = model.decision_function(scaled)
    centred = found.scores(features) - found.scores(features).mean(1, keepdims=True)
    np.testing.assert_allclose(centred, expected - expected.mean(1, keepdims=True), atol=2e-2)
    np.testing.assert_array_equal(found.predict(features), model.predict(scaled))


def test_the_gradient_is_the_losss():
    features, labels = data(40, 3)
    start = np.random.default_rng(1).normal(size=12)
    rows = features / 30
    numeric = optimize.approx_fprime(start, lambda w: probe._loss(w, rows, labels, 3, 0.1)[0], 1e-3)
    np.testing.assert_allclose(probe._loss(start, rows, labels, 3, 0.1)[1], numeric, atol=2e-2, rtol=2e-2)


def test_a_dimension_that_never_moves_and_one_that_does_by_a_hair_do_no_harm():
    features, labels = data()
    padded = np.concatenate([features, np.full((150, 1), 7.0, np.float32), np.zeros((150, 1), np.float32)], axis=1)
    padded[0, -1] = 1e-20
    found = probe.fit_probe(padded, labels, classes=3)
    plain = probe.fit_probe(features, labels, classes=3)
    np.testing.assert_array_equal(found.predict(padded), plain.predict(features))


def test_rows_that_are_not_finite_are_answered_by_none():
    features, labels = data()
    found = probe.fit_probe(features, labels, classes=3)
    features[4, 1] = np.nan
    answers = found.predict(features)
    assert answers[4] == -1 and (np.delete(answers, 4) >= 0).all()


def test_more_rows_than_are_used_give_the_same_probe_every_time(monkeypatch):
    monkeypatch.setattr(probe, "MAX_ROWS", 100)
    features, labels = data(300)
    first, second = (probe.fit_probe(features, labels, classes=3) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert (first.predict(features) == labels).mean() > 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, y: (f[:0], y[:0]), "got 0 features"),
        (lambda f, y: (f, y + 1), "do not fit 3 classes"),
        (lambda f, y: (f * np.inf, y), "NaN or infinity"),
    ],
)
def test_what_cannot_train_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        probe.fit_probe(*change(*data()), classes=3)
