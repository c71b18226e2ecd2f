"""The timing cache: where it lies, that it is whole, that nobody's timings are lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ztp_deploy.backends.tensorrt import config, timing_cache


def test_there_is_one_file_per_library_version_and_device(monkeypatch, tmp_path):
    monkeypatch.setenv("ZTP_CACHE", str(tmp_path / "own"))
    path = timing_cache.path_for("tensorrt", "11.4.0", "nvidia-h100-sm90")
    assert path == tmp_path / "own" / "tensorrt" / "tensorrt-11.4.0-nvidia-h100-sm90.timings"
    monkeypatch.delenv("ZTP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert timing_cache.directory() == tmp_path / "xdg" / "ztp_deploy" / "tensorrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert timing_cache.directory() == tmp_path / ".cache" / "ztp_deploy" / "tensorrt"


# The module alone: its package would load torch, in every process.
ADD_LINES = """
import runpy, sys
from pathlib import Path
from types import SimpleNamespace
timing_cache = SimpleNamespace(**runpy.run_path(sys.argv[3]))
for number in range(20):
    timing_cache.update(Path(sys.argv[1]), lambda had: had + f"{sys.argv[2]}-{number}\\n".encode())
"""


def test_processes_do_not_lose_each_others_timings(tmp_path):
    path = tmp_path / "deep" / "t.timings"
    running = [
        subprocess.Popen([sys.executable, "-c", ADD_LINES, str(path), name, timing_cache.__file__]) for name in "abc"
    ]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert sorted(path.read_text().split()) == sorted(f"{name}-{number}" for name in "abc" for number in range(20))
    assert not list(path.parent.glob("*.partial"))


def test_a_failed_update_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "t.timings"
    timing_cache.update(path, lambda had: b"good")

    def fails(had: bytes) -> bytes:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        timing_cache.update(path, fails)
    assert path.read_bytes() == b"good"
    assert timing_cache.read(tmp_path / "nothing") == b""


def test_what_a_killed_update_left_is_swept(tmp_path):
    path = tmp_path / "t.timings"
    (tmp_path / ".t.timings.0123abcd.partial").write_bytes(b"half")
    timing_cache.update(path, lambda had: b"good")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["t.lock", "t.timings"]


class FakeCache:
    def __init__(self, lines: set[str]) -> None:
        self.lines = lines

    def combine(self, other: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if "of another GPU" in self.lines:
            return False
        self.lines |= other.lines
        return True

    def serialize(self) -> bytes:
        return "\n".join(sorted(self.lines)).encode()


class FakeConfig:
    """Keeps timings as the builder's configuration does: given at the start, more at the end."""

    cache: FakeCache | None = None

    def create_timing_cache(self, data: bytes) -> FakeCache | None:
        return None if data == b"damaged" else FakeCache(set(data.decode().split("\n")) - {""})

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, FakeCache)  # the bindings take no None
        if "of another GPU" in cache.lines:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> FakeCache | None:
        return self.cache


def test_a_build_starts_from_the_kept_timings_and_adds_its_own(tmp_path):
    path = tmp_path / "t.timings"
    path.write_bytes(b"earlier")
    builder = FakeConfig()
    config.use_timings(builder, path)
    assert builder.cache.lines == {"earlier"}
    builder.cache.lines.add("mine")
    path.write_bytes(b"earlier\nmeanwhile")  # another process, while this one built
    config.keep_timings(builder, path)
    assert path.read_text().split() == ["earlier", "meanwhile", "mine"]


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    builder = FakeConfig()
    config.use_timings(builder, tmp_path / "file" / "t.timings")
    with pytest.warns(UserWarning, match="timings were not kept"):
        config.keep_timings(builder, tmp_path / "file" / "t.timings")
    (tmp_path / "t.timings").mkdir()
    with pytest.warns(UserWarning, match=r"were not kept in \S+/t\.timings: Is a directory\.$"):
        config.keep_timings(builder, tmp_path / "t.timings")


@pytest.mark.parametrize("standing", [b"damaged", b"of another GPU"])
def test_timings_that_are_of_no_use_are_replaced(tmp_path, standing):
    """Kept, they would be in the way of every later build."""
    path = tmp_path / "t.timings"
    path.write_bytes(standing)
    builder = FakeConfig()
    config.use_timings(builder, path)
    assert builder.cache.lines == set()
    builder.cache.lines.add("mine")
    config.keep_timings(builder, path)
    assert path.read_text() == "mine"


def test_a_library_that_gives_no_timings_is_a_warning(tmp_path):
    builder = FakeConfig()
    with pytest.warns(UserWarning, match="timings were not kept"):
        config.keep_timings(builder, tmp_path / "t.timings")
