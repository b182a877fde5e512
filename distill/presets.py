"""The published recipe of each method: the values that differ from the defaults of Recipe.

Sources: Duval, Misra, Ballas 2023 (arXiv 2301.09451) and its released configuration for RoB; the releases of DINO,
iBOT, MSN and SwAV for the base methods.
"""

from __future__ import annotations

from typing import Any

_DINO: dict[str, Any] = {"objective": "dino", "drop_path": 0.1, "warmup_lr": 1e-5}
_IBOT: dict[str, Any] = {
    "objective": "ibot",
    "warmup_lr": 1e-5,
    "local_crops": 10,
    "global_scale": (0.25, 1.0),
    "local_scale": (0.05, 0.25),
    "warmup_share": 0.1,
    "weight_decay_end": 0.48,
    "epochs": 100,
}
_MSN: dict[str, Any] = {
    "objective": "msn",
    "head": "mlp",
    "teacher_temperature": 0.025,  # equals 0.1 sharpened by T = 0.25
    "patch_drop": 0.15,
    "local_crops": 10,
    "global_scale": (0.3, 1.0),
    "local_scale": (0.05, 0.3),
    "color_strength": 1.0,
    "blur_p": (0.5, 0.5, 0.5),
    "solarize_p": (0.0, 0.0, 0.0),
    "lr": 1e-3,
    "warmup_lr": 2e-4,
    "warmup_share": 0.1,
    "clip_grad": 1.0,
    "epochs": 150,
}
_SWAV: dict[str, Any] = {
    "objective": "swav",
    "prototypes": 3000,
    "sinkhorn_iterations": 3,
    "local_crops": 4,
    "global_scale": (0.14, 1.0),
    "local_scale": (0.05, 0.14),
    "color_strength": 1.0,
    "blur_p": (0.5, 0.5, 0.5),
    "solarize_p": (0.0, 0.0, 0.0),
    "optimizer": "larc",
    "lr": 4.8,
    "lr_batch": 4096,
    "warmup_lr": 0.3,
    "final_lr": 4.8e-3,
    "warmup_share": 0.1,
    "weight_decay": 1e-6,
    "weight_decay_end": 1e-6,
    "epochs": 100,
    "batch_size": 4096,
}
_KD: dict[str, Any] = {
    "objective": "kd",
    "teacher_temperature": 10.0,
    "student_temperature": 10.0,
    "local_crops": 0,
    "global_scale": (0.08, 1.0),
    "color_strength": 0.0,
    "gray_p": 0.0,
    "blur_p": (0.0, 0.0, 0.0),
    "solarize_p": (0.0, 0.0, 0.0),
    "optimizer": "sgd",
    "nesterov": True,
    "lr": 0.01,
    "lr_batch": 256,
    "final_lr": 0.0,
    "warmup_share": 0.0,
    "weight_decay": 5e-4,
    "weight_decay_end": 5e-4,
    "epochs": 100,
    "batch_size": 256,
}
ROB: dict[str, dict[str, Any]] = {"dino": _DINO, "ibot": _IBOT, "msn": _MSN, "swav": _SWAV, "kd": _KD}

# ViT-Tiny students differ from larger ViTs.
TINY: dict[str, dict[str, Any]] = {"ibot": {"drop_path": 0.1}, "msn": {"patch_drop": 0.1}}

# CNN students of DINO, iBOT and MSN teachers; the authors take the best peak of .002, .02 and .2.
_CNN: dict[str, Any] = {
    "optimizer": "larc",
    "lr": 0.2,
    "final_lr": 1e-5,
    "warmup_lr": 1e-5,
    "weight_decay": 1e-6,
    "weight_decay_end": 1e-6,
    "drop_path": 0.0,
    "patch_drop": 0.0,
}
CNN: dict[str, dict[str, Any]] = dict.fromkeys(("dino", "ibot", "msn"), _CNN)

# What the base methods need against collapse, and RoB drops.
BASE: dict[str, dict[str, Any]] = {
    "dino": {
        "prototypes": 65536,
        "centering": True,
        "teacher_temperature_start": 0.04,
        "teacher_temperature_epochs": 30,
        "freeze_last_layer_epochs": 1,
        "clip_grad": 3.0,
        "ema_momentum": (0.996, 1.0),
    },
    "ibot": {
        "prototypes": 8192,
        "centering": True,
        "teacher_temperature_start": 0.04,
        "teacher_temperature_epochs": 30,
        "freeze_last_layer_epochs": 1,
        "clip_grad": 3.0,
        "ema_momentum": (0.996, 1.0),
    },
    "msn": {"head": "native", "me_max": 1.0, "sinkhorn_iterations": 3, "ema_momentum": (0.996, 1.0)},
    # SwAV's targets come from the student itself.
    "swav": {"sinkhorn_epsilon": 0.05, "freeze_last_layer_epochs": 1, "ema_momentum": (0.0, 0.0)},
}

# For runs of minutes on a CPU. Chosen by measurement at equal CPU time (benchmarks/equal_compute.py), not published.
# The student matches the teacher's embedding and its feature maps at every stride, each through a linear map;
# prototypes did not help, so none are fitted and any teacher will do. One crop, without colour changes: there are too
# few steps to learn to ignore them. On a CPU with bf16 instructions it computes in bf16.
QUICK: dict[str, Any] = {
    "prototype_weight": 0.0,
    "feature_weight": 1.0,
    "feature_projection": "linear",
    "stage_weight": 1.0,
    "patch_weight": 0.0,
    "patch_drop": 0.0,
    "drop_path": 0.0,
    "global_crops": 1,
    "local_crops": 0,
    "global_scale": (0.5, 1.0),
    "color_strength": 0.0,
    "gray_p": 0.0,
    "blur_p": (0.0, 0.0, 0.0),
    "solarize_p": (0.0, 0.0, 0.0),
    "optimizer": "adamw",
    "lr": 3e-3,
    "lr_batch": None,
    "warmup_lr": 0.0,
    "warmup_share": 0.1,
    "final_lr": 1e-5,
    "weight_decay": 0.04,
    "weight_decay_end": 0.04,
    "clip_grad": 3.0,
    "epochs": 10,
    "batch_size": 32,
}
# A ViT does not learn at the rate of a CNN.
QUICK_VIT: dict[str, Any] = QUICK | {"lr": 1e-3}
# What --recipe takes by name, beside files, by the kind of student. The published presets are the default.
NAMED: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {"cnn": {}, "vit": {}},
    "quick": {"cnn": QUICK, "vit": QUICK_VIT},
}
