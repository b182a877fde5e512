"""robx: a large self-supervised vision model made small, and proved on the device that runs it."""

import os
import sys

__version__ = "0.1.0"

# robx sends nothing and lets nothing send: onnxruntime's Linux wheel writes a device id when it is imported unless this
# is set, and OpenVINO and NNCF report through a package they do without when it cannot be imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
