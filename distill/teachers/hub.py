"""One request to the Hugging Face hub before timm asks it for weights: without a network, fail at once.

Its client repeats a request for more than a minute, and timm and robx may repeat that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Classes of errors, by name: the client is built on requests, httpx or httpx2, by its version.
_NO_CONNECTION = {"ConnectionError", "ConnectError", "ConnectTimeout", "ProxyError"}
_FILES = ("model.safetensors", "pytorch_model.bin")


def require_hub(config: Any, cache: Path) -> None:
    """Raise the client's error where the hub cannot be reached, unless the weights are in the cache.

    The request is the client's own, so it takes the proxies, the mirror (HF_ENDPOINT) and the timeout
    (HF_HUB_ETAG_TIMEOUT) that the download will take. What else may go wrong is left to the download: a slow answer, a
    missing file, a server's error.

    Args:
        config: timm's pretrained_cfg of the model; nothing is asked without a hub_id.
        cache: the hub's folder of downloads.
    """
    if config is None or not config.hf_hub_id or os.environ.get("TIMM_USE_OLD_CACHE"):
        return
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    repository, _, revision = config.hf_hub_id.partition("@")
    place: dict[str, Any] = {"repo_id": repository, "revision": revision or None}
    files = (config.hf_hub_filename, *_FILES) if config.hf_hub_filename else _FILES
    if any(isinstance(try_to_load_from_cache(filename=name, cache_dir=cache, **place), str) for name in files):
        return
    try:
        get_hf_file_metadata(hf_hub_url(filename=files[0], **place))
    except Exception as error:
        if _NO_CONNECTION & {kind.__name__ for kind in type(error).__mro__}:
            raise
