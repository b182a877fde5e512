"""The weights that a student starts from: random ones, timm's, an earlier run's, or those of a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
from torch import Tensor, nn

from robx.distill.teachers.checkpoints import read_trunk
from robx.distill.teachers.from_timm import for_model, hash_state
from robx.distill.teachers.hub import require_hub
from robx.distill.teachers.trunks import load_strictly
from robx.errors import ArtifactError, InputError, first_line
from robx.image_size import ImageSize
from robx.images.decode import IMAGENET_MEAN, IMAGENET_STD
from robx.progress import Fact
from robx.records import unfinished
from robx.store.files import cache_folder, sha256_file
from robx.trunk import build_trunk, load_trunk

PRETRAINED = "pretrained"


@dataclass(frozen=True)
class Initial:
    """Weights of one student's trunk, and where they are from."""

    timm_name: str
    sha256: str
    origin: str
    state: Mapping[str, Tensor]

    def load_into(self, trunk: nn.Module) -> None:
        """Load these weights into a trunk of the same network."""
        trunk.load_state_dict(self.state)


def open_initial(init: Path, student: str, *, image_size: ImageSize, cache: Path | None = None) -> Initial:
    """The weights that `student`, a timm name, starts from.

    Args:
        init: ``pretrained`` for timm's weights of that name; the folder of a Student; or a file (safetensors or
            torch.save) with the network's state dict as timm or torchvision names it, also below wrappers such as
            ``state_dict`` or ``module.``; a classifier in it is left out.
        student: a timm name; a tag chooses among timm's weights.
        image_size: pixels of the global crops, the side or (height, width); position embeddings of other sizes are
            resampled as timm does.
        cache: folder for downloads; default ``$ROBX_CACHE`` or ``~/.cache/robx``.

    Raises:
        InputError: no such weights, no network access, or weights of another network.
        ArtifactError: a damaged file or folder.
    """
    if str(init) == PRETRAINED:
        return _from_timm(student, image_size, cache or cache_folder())
    if init.is_dir():
        return _from_run(init, student, image_size)
    if not init.exists():
        raise InputError(f"--init {init} does not exist: give a run's folder, a file of weights, or {PRETRAINED}")
    return _from_file(init, student, image_size)


def starting_line(student: str, initial: Initial | None) -> str:
    """What a student starts from, as one line for the user."""
    if initial is not None:
        return Fact(f"{student} starts from {initial.origin}")
    line = f"{student} starts from random weights"
    if "." in student:  # a warning, and not only a fact
        return f"{line}: its name chooses pretrained weights, give --init pretrained to use them"
    return Fact(line)


def _from_timm(student: str, image_size: ImageSize, cache: Path) -> Initial:
    try:
        config = timm.models.get_pretrained_cfg(student)
        require_hub(config, cache / "timm")
        trunk = build_trunk(student, image_size=image_size, pretrained=cache / "timm")
    except InputError:
        raise
    except Exception as error:  # the hub's client, urllib and timm raise different types
        raise InputError(
            f"timm's weights of {student} are not available ({first_line(error, limit=160)}): "
            "check the network, or give --init FILE"
        ) from error
    origin = "timm's pretrained weights" + (f" {config.hf_hub_id}" if config and config.hf_hub_id else "")
    if config and (tuple(config.mean), tuple(config.std)) != (IMAGENET_MEAN, IMAGENET_STD):
        origin += f", trained with mean {_short(config.mean)} and std {_short(config.std)}; this run uses ImageNet's"
    state = trunk.state_dict()
    return Initial(student, hash_state(state), origin, state)


def _from_run(folder: Path, student: str, image_size: ImageSize) -> Initial:
    record, trunk = load_trunk(folder)
    if record.timm_name != student:
        raise InputError(
            f"--init holds a {record.timm_name}, and the student is {student}: give --student {record.timm_name}"
        )
    state = _fitted(trunk.state_dict(), student, image_size, where=folder)
    origin = f"the student in {folder}" + (", whose training was interrupted" if unfinished(record) else "")
    return Initial(student, record.sha256, origin, state)


def _from_file(path: Path, student: str, image_size: ImageSize) -> Initial:
    state = _fitted(read_trunk(path), student, image_size, where=path)
    return Initial(student, sha256_file(path), str(path), state)


def _fitted(state: Mapping[str, Tensor], student: str, image_size: ImageSize, *, where: Path) -> dict[str, Tensor]:
    """The tensors as the student's trunk of this size names and shapes them."""
    trunk = build_trunk(student, image_size=image_size)
    try:
        found = for_model(_below_prefix(state, trunk.state_dict()), trunk, classifier=False)
        load_strictly(trunk, found, where=str(where))
    except ArtifactError as error:
        raise InputError(f"--init does not fit the student {student}: {error}") from None
    return trunk.state_dict()


def _below_prefix(state: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below the one prefix that holds all of `want`; `state` itself if there is none or several."""
    learned = [key for key in want if not key.endswith("num_batches_tracked")]
    ends = [key.removesuffix(learned[0]) for key in state if key.endswith(f".{learned[0]}")]
    whole = [prefix for prefix in ends if all(f"{prefix}{key}" in state for key in learned)]
    if len(whole) != 1 or all(key in state for key in learned):
        return dict(state)
    return {key.removeprefix(whole[0]): value for key, value in state.items() if key.startswith(whole[0])}


def _short(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:g}" for value in values)
