"""Files and folders that appear whole or not at all, whatever befalls the run that makes them."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from ztp_deploy.atomic import new_directory, sweep, write_text
from ztp_deploy.errors import WriteFailed


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    final = tmp_path / "deep" / "folder"
    with pytest.raises(ValueError), new_directory(final) as scratch:
        (scratch / "half").write_text("half")
        assert not final.exists()
        raise ValueError
    assert list((tmp_path / "deep").iterdir()) == []
    with new_directory(final) as scratch:
        (scratch / "file").write_text("one")
    with pytest.raises(KeyboardInterrupt), new_directory(final) as scratch:
        raise KeyboardInterrupt
    assert (final / "file").read_text() == "one"
    with new_directory(final) as scratch:
        (scratch / "file").write_text("two")
    assert (final / "file").read_text() == "two"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


def hold(folder: Path) -> subprocess.Popen[str]:
    """Another process with scratches of its own in `folder`, until its input ends."""
    script = """
import sys
from pathlib import Path
from ztp_deploy.atomic import new_directory
with new_directory(Path(sys.argv[1], "theirs")) as scratch:
    (scratch / "half").write_text("half")
    print(scratch.name, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", script, str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_run_left_is_swept_and_a_living_one_keeps_its_own(tmp_path):
    """Whoever's process numbers they are: those of a container may be anybody's here."""
    other = hold(tmp_path)
    theirs = tmp_path / other.stdout.readline().strip()
    (tmp_path / ".old.0123abcd.partial").mkdir()
    (tmp_path / ".file.89abcdef.partial").write_text("x")
    with new_directory(tmp_path / "new") as mine:
        sweep(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, theirs.name}
    assert (theirs / "half").read_text() == "half"
    other.kill()
    other.communicate()
    assert theirs.exists()
    write_text(tmp_path / "file", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "new"]


@pytest.mark.parametrize("name", [".download.partial", ".film.mkv.partial", ".x.4242.partial", "x.0123abcd.partial"])
def test_partial_files_of_others_stay(name, tmp_path):
    """An engine may be built beside anything."""
    (tmp_path / name).write_text("theirs")
    write_text(tmp_path / "file", "x")
    assert (tmp_path / name).read_text() == "theirs"


def test_a_run_killed_between_two_folders_loses_none(tmp_path):
    (tmp_path / ".engine.0123abcd.old.partial").mkdir()
    (tmp_path / ".engine.0123abcd.old.partial" / "file").write_text("earlier")
    sweep(tmp_path)
    assert (tmp_path / "engine" / "file").read_text() == "earlier"
    (tmp_path / ".engine.89abcdef.old.partial").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert (tmp_path / "engine" / "file").read_text() == "earlier"


@pytest.mark.parametrize("name", ["engine-old", "engine.old", "engine.0123abcd.old"])
def test_a_name_that_sounds_set_aside_is_a_name_like_any_other(name, tmp_path):
    with new_directory(tmp_path / name) as scratch:
        (scratch / "file").write_text("half")
        sweep(tmp_path)
        assert list(tmp_path.iterdir()) == [scratch]
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_interrupted_replacement_keeps_what_stood(tmp_path, monkeypatch):
    final = tmp_path / "engine"
    with new_directory(final) as scratch:
        (scratch / "file").write_text("one")
    rename = Path.rename

    def interrupted(path, target):
        if target == final and ".old." not in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), new_directory(final) as scratch:
        (scratch / "file").write_text("two")
    assert (final / "file").read_text() == "one"
    assert list(tmp_path.iterdir()) == [final]


def test_a_replacement_whose_undoing_fails_keeps_what_stood(tmp_path, monkeypatch):
    final = tmp_path / "engine"
    with new_directory(final) as scratch:
        (scratch / "file").write_text("one")
    rename = Path.rename

    def refused(path, target):
        if target == final:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refused)
        with pytest.raises(WriteFailed, match="Input/output"), new_directory(final) as scratch:
            (scratch / "file").write_text("two")
    sweep(tmp_path)
    assert (final / "file").read_text() == "one"
    assert list(tmp_path.iterdir()) == [final]


def test_many_at_once_make_one_folder(tmp_path):
    """Eight processes, each ten times: every one ends well, and one whole folder stands."""
    script = """
import sys
from pathlib import Path
from ztp_deploy.atomic import new_directory
for number in range(10):
    with new_directory(Path(sys.argv[1], "engine")) as scratch:
        for name in "ab":
            (scratch / name).write_text(f"{sys.argv[2]} {number}")
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), str(run)], stderr=subprocess.PIPE, text=True)
        for run in range(8)
    ]
    assert [run.communicate()[1] for run in runs] == [""] * 8
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]
    assert (tmp_path / "engine" / "a").read_text() == (tmp_path / "engine" / "b").read_text()


def test_errors_of_the_block_that_are_no_refused_writes_pass(tmp_path):
    for elsewhere in (tmp_path.parent / "nowhere" / "file", tmp_path / "file", tmp_path / "ab" / "file"):
        with pytest.raises(FileNotFoundError), new_directory(tmp_path / "a"):
            elsewhere.read_text()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteFailed), new_directory(tmp_path / "a") as scratch:
        (scratch / "b" / "file").write_text("x")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    """A real refusal by the kernel: a limit on file size stands in for the full disk."""
    script = """
import resource, sys, signal
from pathlib import Path
from ztp_deploy.atomic import new_directory, write_text
from ztp_deploy.errors import WriteFailed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
root = Path(sys.argv[1])
for attempt in (1, 2):
    try:
        if attempt == 1:
            with new_directory(root / "a") as scratch:
                (scratch / "big").write_bytes(b"x" * 5000)
        else:
            write_text(root / "b", "x" * 5000)
    except WriteFailed as error:
        print(error.exit_code, error)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("2 ") and "full" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_many_files_of_a_folder_are_one_sweep(tmp_path, monkeypatch):
    """Each sweep looks at all that lies there."""
    swept = []
    monkeypatch.setattr("ztp_deploy.atomic.sweep", swept.append)
    for number in range(5):
        write_text(tmp_path / f"{number}", "x")
    assert swept == [tmp_path]


def test_write_text_replaces_whole(tmp_path):
    write_text(tmp_path / "sub" / "file", "one")
    write_text(tmp_path / "sub" / "file", "two")
    assert (tmp_path / "sub" / "file").read_text() == "two"
    with pytest.raises(WriteFailed):
        write_text(tmp_path / "sub" / "file" / "below", "three")
