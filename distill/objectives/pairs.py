"""Which teacher crop teaches which student crop.

Student crops are numbered 0 .. V - 1 with the two global crops first; the target branch has seen the first one or two
of them. With both, either pairing has 2 + 2L terms for L local crops.
"""

from __future__ import annotations

from typing import Literal

from robx.errors import InputError

Pairing = Literal["same", "swapped"]
Pairs = tuple[tuple[int, int], ...]  # (teacher crop q, student crop v)


def crop_pairs(pairing: Pairing, *, student_crops: int, teacher_crops: int = 2) -> Pairs:
    """The terms of the loss.

    ``same`` (RoB, arXiv 2301.09451): a student crop that the teacher has seen too is matched to that very crop and no
    other; every other crop is matched to all that the teacher has seen. ``swapped`` (SwAV, arXiv 2006.09882, eq. 1;
    DINO, arXiv 2104.14294, eq. 3): every pair but a crop with itself.

    Raises:
        InputError: an unknown pairing, or a pairing that leaves no term.
    """
    every = [(q, v) for v in range(student_crops) for q in range(teacher_crops)]
    if pairing == "same":
        pairs = [(q, v) for q, v in every if v == q or v >= teacher_crops]
    elif pairing == "swapped":
        pairs = [(q, v) for q, v in every if v != q]
    else:
        raise InputError(f"unknown pairing {pairing!r}: choose same or swapped")
    if not pairs:
        raise InputError(f"pairing {pairing!r} of {teacher_crops} teacher and {student_crops} student crops is empty")
    return tuple(pairs)
