"""Fidelity: figures with known answers, broken outputs that must be caught, and the verdict's rules."""

import dataclasses

import numpy as np
import pytest

from robx.errors import InputError
from robx.eval.fidelity.fidelity import fidelity, make_bank, worst_class
from robx.eval.fidelity.similarity import broken

CLASSES, WIDTH = 4, 24


def images(n, seed, spread=1.0):
    """Embeddings around class centres that are far from the origin, as a real trunk's are; and their labels."""
    centres = np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    return (centres[labels] + spread * rng.normal(size=(n, WIDTH)) + 20).astype(np.float32), labels


@pytest.fixture(scope="module")
def bank():
    return make_bank(*images(200, 0), classes=CLASSES)


@pytest.fixture(scope="module")
def judged():
    return images(400, 1)


def test_the_same_answers_pass(bank, judged):
    features, labels = judged
    found = fidelity(features, features, labels=labels, bank=bank)
    assert found.verdict == "PASS"
    assert found.values["cosine_min"].value == pytest.approx(1)
    assert (
        found.values["probe_drop"].value == found.values["knn_drop"].value == found.values["relative_error"].value == 0
    )
    assert found.values["probe_agreement"].value == found.values["neighbour_overlap"].value == 100
    assert found.values["probe_top1"] == found.values["probe_top1_reference"]
    assert found.values["probe_drop"].high > 0  # zero seen is not zero known
    assert "within the margin of 1" in found.reasons[0]


def test_a_ruined_candidate_fails(bank, judged):
    features, labels = judged
    noise = np.random.default_rng(5).normal(size=features.shape).astype(np.float32)
    found = fidelity(features, features + 3 * noise, labels=labels, bank=bank)
    assert found.verdict == "FAIL" and found.values["probe_drop"].low > 1
    assert found.values["knn_drop"].value > 5 and found.values["probe_mcnemar_p"].value < 1e-6
    assert found.values["neighbour_overlap"].value < 60
    assert any("below 0.99 for int8" in reason for reason in found.reasons)


def test_few_images_are_inconclusive_however_alike(bank):
    features, labels = images(50, 6)
    found = fidelity(features, features, labels=labels, bank=bank)
    assert found.verdict == "INCONCLUSIVE" and "268 images would decide" in found.reasons[0]


@pytest.mark.parametrize("fault", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_fails(bank, judged, fault):
    features, labels = judged
    candidate = features.copy()
    candidate[7, 3] = fault
    found = fidelity(features, candidate, labels=labels, bank=bank)
    assert found.verdict == "FAIL" and "1 of 400 embeddings contain NaN or infinity" in found.reasons[0]
    assert found.values["not_finite"].value == 1 and found.values["cosine_min"].value == -1


def test_a_constant_output_fails_though_its_plain_cosine_is_high(bank, judged):
    features, labels = judged
    stuck = np.broadcast_to(features.mean(0), features.shape)
    found = fidelity(features, stuck, labels=labels, bank=bank)
    assert found.verdict == "FAIL" and "constant" in found.reasons[0]
    assert found.values["constant_dimensions"].value == WIDTH
    assert not broken(features, features)


def test_without_labels_the_cosine_decides(bank, judged):
    features, _ = judged
    noise = np.random.default_rng(7).normal(size=features.shape).astype(np.float32)
    assert fidelity(features, features + 0.01 * noise).verdict == "PASS"
    assert fidelity(features, features + 0.01 * noise, precision="fp32").verdict == "FAIL"
    assert fidelity(features, features + 0.5 * noise).verdict == "FAIL"
    assert fidelity(features[:50], features[:50]).verdict == "INCONCLUSIVE"
    unlabelled = fidelity(features, features, labels=np.full(400, -1), bank=bank)
    assert unlabelled.verdict == "PASS" and "probe_drop" not in unlabelled.values


def test_unlabelled_images_do_not_count_in_the_drop(bank, judged):
    features, labels = judged
    noise = np.random.default_rng(8).normal(size=features.shape).astype(np.float32)
    candidate = features + noise
    some = np.where(np.arange(400) < 300, labels, -1)
    partly = fidelity(features, candidate, labels=some, bank=bank).values
    alone = fidelity(features[:300], candidate[:300], labels=labels[:300], bank=bank).values
    assert partly["probe_drop"] == alone["probe_drop"] and partly["probe_drop"].n == 300
    assert partly["cosine_mean"].n == 400


def test_an_adapted_user_gets_back_what_a_rotation_took(bank, judged):
    features, labels = judged
    rotation = np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)
    found = fidelity(
        features, features @ rotation, labels=labels, bank=bank, candidate_bank=bank.features @ rotation
    ).values
    assert found["probe_drop"].value > 20
    assert abs(found["own_bank_knn_drop"].value) < 0.6  # a rotation keeps every cosine
    assert abs(found["retrained_probe_drop"].value) < 3


def test_worst_class_names_the_class_that_lost_most():
    labels = np.repeat([0, 1, 2], 20)
    right = np.ones(60, bool)
    candidate = right.copy()
    candidate[[20, 21, 22, 40]] = False
    value, note = worst_class(right, candidate, labels, class_names=["cat", "dog", "cow"])
    assert value.value == pytest.approx(15) and note == "worst class dog: drop 15.0 points on 20 images"
    assert worst_class(right, right, labels)[1] == ""
    alone, _ = worst_class(right[20:40], candidate[20:40], labels[20:40])
    assert value.low < alone.low and value.high > alone.high  # the worst of three was picked: a wider interval


def test_what_does_not_pair_is_refused(bank, judged):
    features, labels = judged
    with pytest.raises(InputError, match="do not pair"):
        fidelity(features, features[:-1], labels=labels, bank=bank)
    with pytest.raises(InputError, match="reference's own"):
        fidelity(features * np.nan, features)
    with pytest.raises(InputError, match="do not match"):
        fidelity(features, features, labels=labels, bank=bank, candidate_bank=bank.features[:-1])


def test_records_can_hold_every_figure(bank, judged):
    features, labels = judged
    candidate = features.copy()
    candidate[0] = np.nan
    for value in fidelity(features, candidate, labels=labels, bank=bank).values.values():
        assert all(np.isfinite(x) for x in dataclasses.astuple(value)[:3] if x is not None)
