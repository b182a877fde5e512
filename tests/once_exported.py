"""torch.onnx.export, called once for each network: it takes two seconds, and many tests start from the same student.

The models are kept in a folder that the processes of one test run share. What robx does with a model is not kept: its
checks, and the comparison with the trunk's own embeddings, which would also reveal a wrong file here.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_OWN = ("_parameters", "_buffers", "_modules")  # of every module; the others say how it computes


class OnceExported:
    """Stands in for `export`, which is torch.onnx.export."""

    def __init__(self, export: Callable[..., Any], folder: Path) -> None:
        self._export, self._folder = export, folder

    def __call__(self, model: nn.Module, args: tuple[Any, ...] = (), f: Any = None, **options: Any) -> Any:
        """The program of `model`, or an object with its model_proto alone if that was exported before."""
        if f is not None or not options.get("dynamo"):
            return self._export(model, args, f, **options)
        path = self._folder / f"{_digest(model, args, options)}.onnx"
        if path.exists():
            import onnx

            return SimpleNamespace(model_proto=onnx.load(path))
        program = self._export(model, args, **options)
        if program is not None:
            self._folder.mkdir(exist_ok=True)
            unfinished = path.with_name(f"{path.name}.{os.getpid()}")
            unfinished.write_bytes(program.model_proto.SerializeToString())
            unfinished.replace(path)
        return program


def _digest(model: nn.Module, args: tuple[Tensor, ...], options: dict[str, Any]) -> str:
    """Changes with every weight and setting of the network, with the shapes of its input and with the options."""
    import torch

    found = hashlib.sha256(repr([(arg.shape, arg.dtype) for arg in args]).encode())
    found.update(_words(options))
    for name, module in model.named_modules():
        settings = {key: value for key, value in vars(module).items() if key not in _OWN}
        found.update(f"{name} {type(module)}".encode() + _words(settings))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _words(values: dict[str, Any]) -> bytes:
    """In words, without the addresses of functions, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(values.items()))).encode()
