"""Writing targets to disk during a run; robx.distill.targets.stored defines the format and reads it."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from robx.distill.batches.views import Targets, Views
from robx.distill.targets.branches import TargetBranch
from robx.distill.targets.stored import TargetsInfo, pack, read_info, require_same, table_path
from robx.errors import InputError
from robx.records import to_json
from robx.store.files import unwritable, write_json
from robx.store.written import Written


def check_folder(folder: Path, *, epochs: int, info: TargetsInfo | None = None) -> list[str]:
    """Refuse a folder in which targets of `epochs` epochs would replace files that robx did not write; writes nothing.

    Returns:
        The files of an earlier version of robx, which kept no record of them: those beside a valid targets.json.

    Raises:
        InputError: the message names the file; or the folder holds targets other than `info`.
        ArtifactError: targets.json is not robx's, or damaged.
    """
    written, earlier = Written(folder), list[str]()
    if (folder / "targets.json").exists():
        found = read_info(folder)
        if info is not None:
            require_same(found, info, folder=folder, every=True)
        if "targets.json" not in written:
            names = {"targets.json", "teacher.json"}
            earlier = [p.name for p in folder.iterdir() if p.name in names or _TABLE.fullmatch(p.name)]
    written.check(*(name for name in _names(epochs) if name not in earlier))
    return earlier


def _names(epochs: int) -> list[str]:
    tables = (f"epoch-{epoch:05d}" for epoch in range(epochs))
    return ["targets.json", "teacher.json", *(name + suffix for name in tables for suffix in (".npy", ".json"))]


_TABLE = re.compile(r"epoch-\d{5,}\.(npy|json)")


class TargetWriter:
    """Writes epochs of targets; each process of a run has one for the same folder."""

    def __init__(self, folder: Path, info: TargetsInfo, *, epochs: int = 1) -> None:
        """Start or continue `folder` with targets of `epochs` epochs; the first process alone prepares it.

        Raises:
            InputError: it holds targets of another run or files that robx did not write, or is not writable.
        """
        self.folder, self.info = folder, info
        self._file: int | None = None
        self._epoch = -1
        if _rank() == 0:
            earlier = check_folder(folder, epochs=epochs, info=info)
            written = Written(folder)
            written.adopt(*earlier)
            written.claim(*_names(epochs))
            if not (folder / "targets.json").exists():
                write_json(folder / "targets.json", to_json(info))

    def write(self, views: Views, targets: Targets) -> None:
        """Store one batch's targets under (views.epoch, views.index).

        Raises:
            InputError: patch targets, which cannot be stored, or no space left.
        """
        if targets.patch_probs is not None:
            raise InputError("patch targets cannot be stored: set patch_weight = 0 to store RoB-iBOT's CLS targets")
        if views.epoch != self._epoch or self._file is None:
            self.finish()
            self._open(views.epoch)
        rows = pack(targets, self.info)
        try:
            for index, row in zip(views.index.tolist(), rows, strict=True):
                os.pwrite(self._descriptor, row.tobytes(), self._start + index * rows.dtype.itemsize)
        except OSError as error:
            raise unwritable(self._table, error) from error

    def sync(self) -> None:
        """Flush the rows to disk."""
        if self._file is None:
            return
        try:
            os.fsync(self._file)
        except OSError as error:
            raise unwritable(self._table, error) from error

    def finish(self) -> None:
        """Mark the open epoch complete, after the rows of all processes are on disk."""
        if self._file is None:
            return
        self.sync()
        self.close()
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if _rank() == 0:
            write_json(self._table.with_suffix(".json"), {"epoch": self._epoch, "bytes": self._table.stat().st_size})

    def close(self) -> None:
        """Close the open table, complete or not; a later run can continue it."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def _table(self) -> Path:
        return table_path(self.folder, self._epoch)

    @property
    def _descriptor(self) -> int:
        if self._file is None:
            raise ValueError("no epoch is open")
        return self._file

    def _open(self, epoch: int) -> None:
        self._epoch = epoch
        header = _header(self.info)
        self._start = len(header)
        try:
            # Never truncated: other processes may already have written rows, and all write the same header.
            self._file = os.open(self._table, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            # Allocate now, so that a full disk is noticed here and not in the last batch.
            os.posix_fallocate(self._file, 0, len(header) + self.info.images * self.info.row.itemsize)
            os.pwrite(self._file, header, 0)
        except OSError as error:
            raise unwritable(self._table, error) from error


class WritingBranch:
    """A branch whose targets are stored as they are computed; call ``settle`` before every checkpoint."""

    def __init__(self, branch: TargetBranch, writer: TargetWriter) -> None:
        self.branch, self.writer = branch, writer

    def targets(self, views: Views) -> Targets:
        """The wrapped branch's targets."""
        targets = self.branch.targets(views)
        self.writer.write(views, targets)
        return targets

    def update(self, step: int, student: nn.Module) -> None:
        """Update the wrapped branch."""
        self.branch.update(step, student)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped branch's."""
        return self.branch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The wrapped branch's."""
        self.branch.load_state_dict(state)

    def settle(self, *, epoch_done: bool) -> None:
        """Flush the stored targets to disk, and mark the epoch complete if it is."""
        if epoch_done:
            self.writer.finish()
        else:
            self.writer.sync()


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _header(info: TargetsInfo) -> bytes:
    buffer = io.BytesIO()
    fields = {"descr": np.lib.format.dtype_to_descr(info.row), "fortran_order": False, "shape": (info.images,)}
    np.lib.format.write_array_header_2_0(buffer, fields)
    return buffer.getvalue()
