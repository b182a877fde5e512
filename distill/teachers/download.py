"""Downloading a file once: progress, resume, SHA-256, and a cache without incomplete files.

During the download the bytes are in ``NAME.part``; a later run resumes it if the server still has the same file.
Next to a finished file, ``NAME.sha256`` holds its hash, so that a changed file is noticed.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from robx.errors import ArtifactError, InputError
from robx.progress import Progress
from robx.store.files import require_space, sha256_file, unwritable, write_atomically, write_text
from robx.store.locks import wait_for

MAX_DOWNLOAD_BYTES = 16 * 1024**3
_CHUNK = 1024 * 1024
_TIMEOUT = 30.0
_ATTEMPTS = 3


def fetch(
    url: str,
    folder: Path,
    *,
    name: str | None = None,
    sha256: str = "",
    hint: str = "",
    progress: Progress | None = None,
) -> Path:
    """The file at `url`: from `folder`, or downloaded into it now.

    Args:
        url: http or https.
        folder: created if necessary; other processes that need the same file wait.
        name: file name; by default the last part of the URL.
        sha256: expected hash; "" trusts the first download and compares later ones with it.
        hint: what to do without a network; the end of the message.
        progress: called with (bytes so far, total bytes or 0, name).

    Raises:
        InputError: no network, no such file, no space, or the connection broke three times.
        ArtifactError: the file's hash is not `sha256`, or the cached file changed.
    """
    name = name or urlsplit(url).path.rsplit("/", 1)[-1]
    path = folder / name
    with wait_for(path):
        if path.is_file():
            return _verified(path, sha256)
        part = path.with_name(f"{name}.part")
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                _download(url, part, name=name, progress=progress)
                break
            except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
                _give_up(url, error, last=attempt == _ATTEMPTS, hint=hint)
        return _finish(part, path, sha256, url=url)


def _download(url: str, part: Path, *, name: str, progress: Progress | None) -> None:
    """Fill `part`, resuming at its end if the server still has the same file."""
    tag_file = part.with_name(f"{part.name}.tag")
    tag = tag_file.read_text(errors="replace") if tag_file.is_file() else ""
    have = part.stat().st_size if part.is_file() and tag else 0
    headers = {"User-Agent": "robx", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        with contextlib.suppress(OSError):
            part.unlink()  # longer than the file: start again
        raise http.client.HTTPException("the partial file was too long") from error
    with response:
        have = have if response.status == 206 and _starts_at(response, have) else 0
        total = have + int(response.headers.get("Content-Length") or 0)
        if total > MAX_DOWNLOAD_BYTES:
            raise ArtifactError(
                f"{url} has {total / 1e9:.0f} GB, more than any teacher checkpoint: give --teacher-weights FILE"
            )
        require_space(part.parent, total - have)
        write_text(tag_file, response.headers.get("ETag") or response.headers.get("Last-Modified") or "")
        _copy(response, part, have, total, name=name, progress=progress)


def _copy(response: Any, part: Path, have: int, total: int, *, name: str, progress: Progress | None) -> None:
    try:
        file = part.open("ab" if have else "wb")
    except OSError as error:
        raise unwritable(part, error) from error
    with file:
        while chunk := response.read(_CHUNK):
            try:
                file.write(chunk)
            except OSError as error:
                raise unwritable(part, error) from error
            have += len(chunk)
            if have > MAX_DOWNLOAD_BYTES:
                raise ArtifactError(f"{name} is larger than any teacher checkpoint: give --teacher-weights FILE")
            if progress is not None:
                progress(have, total, name)
    if total and have < total:
        raise http.client.IncompleteRead(b"", total - have)


def _finish(part: Path, path: Path, sha256: str, *, url: str) -> Path:
    found = sha256_file(part)
    if sha256 and found != sha256:
        part.unlink()
        raise ArtifactError(
            f"{url} is not the file that was expected (SHA-256 {found[:16]}…, not {sha256[:16]}…): "
            "it was changed in transit or on its host; do not use it"
        )
    write_text(path.with_name(f"{path.name}.sha256"), found)
    write_atomically(path, lambda temporary: _same(part, temporary))
    for leftover in (part, part.with_name(f"{part.name}.tag")):
        leftover.unlink(missing_ok=True)
    return path


def _same(part: Path, path: Path) -> None:
    """Hard-link the finished file, or copy it where the file system has no hard links."""
    try:
        path.unlink(missing_ok=True)
        os.link(part, path)
    except OSError:
        shutil.copyfile(part, path)


def _verified(path: Path, sha256: str) -> Path:
    recorded = path.with_name(f"{path.name}.sha256")
    expected = sha256 or (recorded.read_text(errors="replace").strip() if recorded.is_file() else "")
    if expected and sha256_file(path) != expected:
        raise ArtifactError(
            f"{path} has changed since it was downloaded (its SHA-256 differs): delete it and run again"
        )
    return path


def _starts_at(response: Any, have: int) -> bool:
    match = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
    return match is not None and int(match.group(1)) == have


def _give_up(url: str, error: Exception, *, last: bool, hint: str) -> None:
    """Raise if another attempt would not help; return to try again."""
    if isinstance(error, urllib.error.HTTPError) and error.code < 500:
        raise InputError(f"{url} cannot be downloaded (HTTP {error.code} {error.reason}){_then(hint)}") from error
    offline = isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError)
    if not (offline or last):
        return
    why = getattr(error, "reason", None) or error
    again = "" if offline else "; run the same command again to resume"
    raise InputError(f"{url} cannot be downloaded ({why}){again}{_then(hint)}") from error


def _then(hint: str) -> str:
    return f": {hint}" if hint else ""
