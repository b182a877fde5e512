"""robx distils large self-supervised vision models into small ones and measures them on edge devices."""

import os
import sys
from pathlib import Path

__version__ = "0.1.0"

# The one place where the telemetry of libraries is switched off (runtime/device/runner.py, which runs without robx, has
# its own). onnxruntime's Linux wheel writes a device id on import unless the variable is set; OpenVINO and NNCF report
# through a package that they do without when it cannot be imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# A checkout without symbolic links (core.symlinks=false, a zip) has text files or nothing where the links robx/distill
# and so on should be: find the stages in the folders that the links point to. An installed robx has real folders.
_here = Path(__file__).parent
if not (_here / "distill").is_dir() and (_here.parent / "distill" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
