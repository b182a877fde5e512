from pathlib import Path

from robx.store.cache import cache_folder


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("ROBX_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert cache_folder() == tmp_path / "named"
    monkeypatch.delenv("ROBX_CACHE")
    assert cache_folder() == tmp_path / "user" / "robx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "robx"
