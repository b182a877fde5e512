"""One run of LightlyTrain, started by equal_compute.py in LightlyTrain's own environment; robx is not imported.

    DIR/bin/python benchmarks/lightly_runner.py JOB.json

It uses the documented API alone: ``lightly_train.pretrain`` with timm's student and a custom teacher model, because
LightlyTrain 0.18 stops with EfficientNet teachers that are given by name ("The expanded size of the tensor (1280) must
match the existing size (320)").
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

WARM_STEPS = 4


class Teacher(nn.Module):
    """A timm network with the interface of LightlyTrain's custom models, for pixels normalised as ImageNet's."""

    def __init__(self, trunk: str, *, file: str, width: int) -> None:
        super().__init__()
        saved = torch.load(file, weights_only=True)
        self.net: Any = timm.create_model(trunk)
        self.width = width
        self.net.load_state_dict(saved["weights"])
        self.register_buffer("scale", saved["scale"])
        self.register_buffer("shift", saved["shift"])

    def feature_dim(self) -> int:
        """Channels of the feature map."""
        return self.width

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        """The feature map."""
        scale, shift = self.get_buffer("scale"), self.get_buffer("shift")
        return {"features": self.net.forward_features(x * scale + shift)}

    def forward_pool(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pooled to 1 x 1."""
        return {"pooled_features": x["features"].mean(dim=(2, 3), keepdim=True)}

    def get_model(self) -> nn.Module:
        """The network."""
        net: nn.Module = self.net
        return net


def main() -> None:
    """Run the job, write the student's last weights and the CPU seconds spent."""
    import lightly_train  # only in its own environment

    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    any_size: dict[str, Any] = {"dynamic_img_size": True} if job["student"].startswith("vit_") else {}
    net = timm.create_model(job["student"], num_classes=0, **any_size)
    net.load_state_dict(torch.load(job["first"], weights_only=True))
    teacher = Teacher(job["trunk"], file=job["teacher"], width=job["width"])
    moments: list[float] = []
    register_optimizer_step_post_hook(lambda *_: moments.append(time.process_time()))
    given = dict(job["arguments"])
    chosen = {name: None if value == "none" else value for name, value in given.pop("transform_args", {}).items()}
    transforms = {"image_size": (job["size"], job["size"]), **chosen}
    began = time.process_time()
    lightly_train.pretrain(
        out=job["out"],
        data=job["files"],
        model=net,
        method_args={"teacher": teacher},
        epochs=job["epochs"],
        seed=job["seed"],
        num_workers=0,
        accelerator="cpu",
        devices=1,
        overwrite=True,
        transform_args=transforms,
        **given,
    )
    total = time.process_time() - began
    exported = torch.load(Path(job["out"]) / "exported_models" / "exported_last.pt", weights_only=True)
    net.load_state_dict(exported)
    torch.save(net.state_dict(), job["weights"])
    steps = len(moments)
    step = (moments[-1] - moments[WARM_STEPS]) / max(1, steps - 1 - WARM_STEPS)
    spent = {"total": total, "step": step, "steps": steps, "outside": max(0.0, total - step * steps)}
    Path(job["out"]).with_name("spent.json").write_text(json.dumps(spent))


if __name__ == "__main__":
    main()
