from __future__ import annotations

import pytest

from robx.distill.objectives.build import build_objective
from robx.distill.objectives.kd import SupervisedKd
from robx.distill.objectives.rob_dino import RobDino
from robx.distill.objectives.rob_ibot import RobIbot
from robx.distill.objectives.rob_msn import RobMsn
from robx.distill.objectives.rob_swav import RobSwav
from robx.distill.recipes import override, preset


def test_presets_are_the_published_losses() -> None:
    dino = build_objective(preset("dino", "vit"))
    assert isinstance(dino, RobDino)
    assert (dino.teacher_temperature, dino.student_temperature) == (0.07, 0.1)
    assert (dino.pairing, dino.sinkhorn_iterations) == ("same", 0)
    ibot = build_objective(preset("ibot", "vit"))
    assert isinstance(ibot, RobIbot)
    assert (ibot.teacher_temperature, ibot.student_temperature, ibot.patch_weight) == (0.07, 0.1, 1.0)
    msn = build_objective(preset("msn", "vit"))
    assert isinstance(msn, RobMsn)
    assert (msn.teacher_temperature, msn.student_temperature) == (0.025, 0.1)
    assert (msn.sinkhorn_iterations, msn.me_max) == (0, 0.0)
    swav = build_objective(preset("swav", "cnn"))
    assert isinstance(swav, RobSwav)
    assert (swav.epsilon, swav.student_temperature, swav.sinkhorn_iterations) == (0.03, 0.1, 3)
    kd = build_objective(preset("kd", "cnn"))
    assert isinstance(kd, SupervisedKd)
    assert kd.temperature == 10


@pytest.mark.parametrize("method", ["dino", "ibot", "msn", "swav"])
def test_base_methods_swap_the_crops(method: str) -> None:
    objective = build_objective(preset(method, "vit", base=True))  # type: ignore[arg-type]
    assert objective.pairing == "swapped"  # type: ignore[attr-defined]


def test_base_msn_has_sinkhorn_and_me_max() -> None:
    msn = build_objective(preset("msn", "vit", base=True))
    assert isinstance(msn, RobMsn)
    assert msn.sinkhorn_iterations == 3
    assert msn.me_max == 1


def test_every_setting_reaches_the_objective() -> None:
    values = {"teacher_temperature": 0.5, "student_temperature": 0.2, "pairing": "swapped", "sinkhorn_iterations": 2}
    for method in ("dino", "ibot", "msn"):
        objective = build_objective(override(preset(method, "vit"), values))  # type: ignore[arg-type]
        assert {name: getattr(objective, name) for name in values} == values
    swav = build_objective(override(preset("swav", "vit"), {"sinkhorn_epsilon": 0.2, "student_temperature": 0.3}))
    assert isinstance(swav, RobSwav)
    assert (swav.epsilon, swav.student_temperature) == (0.2, 0.3)
    ibot = build_objective(override(preset("ibot", "vit"), {"patch_weight": 0.25}))
    assert isinstance(ibot, RobIbot)
    assert ibot.patch_weight == 0.25
