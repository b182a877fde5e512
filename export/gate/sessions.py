"""Opening a candidate in the runtime that will execute it, or saying why this machine cannot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from robx.errors import DeviceError, MissingExtra
from robx.formats import FORMATS, RUNTIMES
from robx.records import load_bundle

if TYPE_CHECKING:
    from robx.runtime.session import Session


def open_candidate(folder: Path, *, batch: int | None = None) -> Session | str:
    """The session of a candidate's bundle, or the reason why it cannot be run on this machine.

    `batch` is the number of images in every call, where that is always the same, as in `robx bench`: an engine may
    optimise for it.

    Raises:
        ArtifactError: the bundle itself is damaged.
    """
    from robx.runtime.session import SessionSettings, open_session

    bundle = load_bundle(folder)
    if RUNTIMES[bundle.runtime].engine is None:
        return f"robx cannot run {FORMATS[bundle.format].title} models: check the model on its own platform"
    try:
        return open_session(folder, SessionSettings(batch=batch))
    except (DeviceError, MissingExtra) as error:
        # The reason outlives the scratch folder that it names.
        return str(error).replace(f"{folder}{os.sep}", "").replace(str(folder), "the model")
