"""Read XML model files (OpenVINO IR) that may be hostile: checked before a parser or a runtime opens them."""

from __future__ import annotations

from pathlib import Path

from robx.errors import ArtifactError

MAX_XML_BYTES = 256 * 1024 * 1024


def read_xml(path: Path) -> bytes:
    """The UTF-8 text of an XML file without a document type: entities can expand a small file without limit.

    Raises:
        ArtifactError: it is too large, declares entities, or is in another encoding.
    """
    if path.stat().st_size > MAX_XML_BYTES:
        raise ArtifactError(f"{path} is larger than {MAX_XML_BYTES} bytes, so robx did not write it: export it again")
    text = path.read_bytes()
    if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
        raise ArtifactError(f"{path} declares XML entities, so robx did not write it: export it again")
    # In UTF-16 and the like, the two words above would not be found.
    if b"\0" in text or text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ArtifactError(f"{path} is not UTF-8 text, so robx did not write it: export it again")
    return text
