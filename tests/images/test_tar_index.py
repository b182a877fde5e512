"""The index of large shards is kept, and made again for the shards that changed."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from robx.errors import CorruptImage
from robx.images import tar_index
from robx.images.shards import ShardSource, write_shard
from robx.images.sources import labels_of


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, first: int, *, count: int = 5) -> None:
    write_shard(path, [(f"{i}.png", png(i % 256), i % 3 if i % 4 else None) for i in range(first, first + count)])
    os.utime(path, ns=(1, time.time_ns() - 10_000_000_000))


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    monkeypatch.setenv("ROBX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "KEPT_FROM_BYTES", 1)
    paths = [tmp_path / f"{n}.tar" for n in range(4)]
    for number, path in enumerate(paths):
        write(path, 5 * number)
    paths[3].write_bytes(paths[3].read_bytes()[:2000])  # a damaged one
    os.utime(paths[3], ns=(1, time.time_ns() - 10_000_000_000))
    return paths


def facts(source: ShardSource) -> tuple[object, ...]:
    said = []
    for index in range(len(source)):
        try:
            said.append((source.key(index), source.label(index), source.read(index).getpixel((0, 0))))
        except CorruptImage as error:
            said.append((source.key(index), source.label(index), str(error)))
    return tuple(said), source.fingerprint, source.classes, source.note, source.labels.tolist()


def count_indexed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    indexed: list[str] = []
    real = tar_index.index_shard
    monkeypatch.setattr(tar_index, "index_shard", lambda shard, image: indexed.append(shard.name) or real(shard, image))
    return indexed


def test_a_second_start_indexes_nothing_and_finds_the_same(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = facts(ShardSource(shards, name="x"))
    indexed = count_indexed(monkeypatch)
    assert facts(ShardSource(shards, name="x")) == first and not indexed
    monkeypatch.setattr(tar_index, "KEPT_FROM_BYTES", 1 << 40)
    assert facts(ShardSource(shards, name="x")) == first and len(indexed) == 4  # as without a cache


def test_only_a_shard_that_changed_is_indexed_again(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = ShardSource(shards, name="x").fingerprint
    write(shards[1], 100, count=7)
    indexed = count_indexed(monkeypatch)
    source = ShardSource(shards, name="x")
    assert indexed == ["1.tar"] and source.fingerprint != first
    assert [source.key(i) for i in range(4, 8)] == ["4", "100", "101", "102"]
    assert np.array_equal(labels_of(source), source.labels) and source.read(6).getpixel((0, 0)) == (101, 0, 0)
    indexed.clear()
    assert facts(ShardSource(shards, name="x")) == facts(source) and not indexed


def test_contents_that_change_unseen_change_the_fingerprint(shards: list[Path]) -> None:
    first = ShardSource(shards, name="x").fingerprint
    data, found = bytearray(shards[0].read_bytes()), shards[0].stat()
    data[530] ^= 1
    shards[0].write_bytes(bytes(data))
    os.utime(shards[0], ns=(found.st_atime_ns, found.st_mtime_ns))
    assert ShardSource(shards, name="x").fingerprint != first


def test_repeated_keys_are_told_apart_from_the_cache_as_well(shards: list[Path]) -> None:
    write(shards[1], 0)
    first = facts(ShardSource(shards, name="x"))
    assert facts(ShardSource(shards, name="x")) == first
    assert ShardSource(shards, name="x").key(0) == "0/0"


def test_a_damaged_cache_and_another_image_member_are_indexed_anew(
    shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = facts(ShardSource(shards, name="x"))
    indexed = count_indexed(monkeypatch)
    kept = next((shards[0].parent / "cache" / "listings").glob("shards-*.npz"))
    kept.write_bytes(kept.read_bytes()[:300])
    assert facts(ShardSource(shards, name="x")) == first and len(indexed) == 4
    assert facts(ShardSource(shards, name="x", image="png"))[0] == first[0] and len(indexed) == 8


def test_shards_written_just_now_are_not_kept(shards: list[Path]) -> None:
    os.utime(shards[0])
    ShardSource(shards, name="x")
    assert not list((shards[0].parent / "cache" / "listings").glob("*.npz"))
