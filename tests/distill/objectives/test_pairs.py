from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robx.distill.objectives.pairs import crop_pairs
from robx.errors import InputError


def test_same_view_by_hand() -> None:
    assert set(crop_pairs("same", student_crops=4)) == {(0, 0), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)}


def test_swapped_by_hand() -> None:
    assert set(crop_pairs("swapped", student_crops=4)) == {(0, 1), (1, 0), (0, 2), (1, 2), (0, 3), (1, 3)}


def test_one_teacher_crop_teaches_every_student_crop() -> None:
    assert set(crop_pairs("same", student_crops=4, teacher_crops=1)) == {(0, 0), (0, 1), (0, 2), (0, 3)}
    assert set(crop_pairs("swapped", student_crops=4, teacher_crops=1)) == {(0, 1), (0, 2), (0, 3)}


@given(local=st.integers(0, 12), pairing=st.sampled_from(["same", "swapped"]))
def test_both_pairings_have_as_many_terms(local: int, pairing: str) -> None:
    pairs = crop_pairs(pairing, student_crops=2 + local)  # type: ignore[arg-type]
    assert len(pairs) == len(set(pairs)) == 2 + 2 * local
    assert {v for _, v in pairs} == set(range(2 + local))


@pytest.mark.parametrize(("pairing", "student", "teacher"), [("crossed", 4, 2), ("swapped", 1, 1)])
def test_what_cannot_be_paired_is_refused(pairing: str, student: int, teacher: int) -> None:
    with pytest.raises(InputError, match=pairing):
        crop_pairs(pairing, student_crops=student, teacher_crops=teacher)  # type: ignore[arg-type]
