"""robx distils a large self-supervised vision model into a small one and proves it on the device that runs it."""

import os
import sys
from pathlib import Path

__version__ = "0.1.0"

# robx sends nothing and lets nothing send: onnxruntime's Linux wheel writes a device id when it is imported unless this
# is set, and OpenVINO and NNCF report through a package they do without when it cannot be imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

# A checkout without symbolic links (core.symlinks=false, a zip) has text files or nothing where the links robx/distill
# and so on should be: find the stages in the folders that the links point to. An installed robx has real folders.
_here = Path(__file__).parent
if not (_here / "distill").is_dir() and (_here.parent / "distill" / "__init__.py").is_file():
    __path__.append(str(_here.parent))
