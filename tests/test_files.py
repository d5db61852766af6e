"""write_whole: a file appears whole or not at all, whoever else writes, and whatever stands there."""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fastbn import checkpoint, files, nn, training

POSIX = pytest.mark.skipif(os.name != "posix", reason="links, devices and permissions as POSIX has them")


def there(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_content_is_written_and_replaced(tmp_path):
    for content in (b"", b"one", b"longer than one", b"two"):
        files.write_whole(tmp_path / "f", content)
        assert (tmp_path / "f").read_bytes() == content
    assert there(tmp_path) == ["f"]


def test_two_threads_at_once_leave_one_content_whole(tmp_path):
    """With a name made of the process's number, 34 of 300 files were damaged, and 292 calls raised."""
    pytest.importorskip("safetensors")
    models = [nn.Dense(50, 50, seed=seed) for seed in range(2)]
    expected = []
    for i, model in enumerate(models):
        checkpoint.save(tmp_path / f"alone-{i}", model)
        expected.append((tmp_path / f"alone-{i}").read_bytes())
    meet = threading.Barrier(2)

    def save(model):
        for _ in range(40):
            meet.wait(60)
            checkpoint.save(tmp_path / "m", model)
            assert (tmp_path / "m").read_bytes() in expected

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, models))
    assert there(tmp_path) == ["alone-0", "alone-1", "m"]


@POSIX
def test_permissions_stay_and_new_files_follow_the_umask(tmp_path):
    path = tmp_path / "f"
    before = os.umask(0o027)
    try:
        files.write_whole(path, b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        files.write_whole(path, b"2")
        assert stat.S_IMODE(path.stat().st_mode) == 0o604
    finally:
        os.umask(before)


@POSIX
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "far").mkdir()
    for target in ("far/model", "far/not yet"):
        link = tmp_path / target.replace("/", " ")
        link.symlink_to(tmp_path / target)
        files.write_whole(link, b"new")
        assert link.is_symlink()
        assert (tmp_path / target).read_bytes() == b"new"
    assert there(tmp_path / "far") == ["model", "not yet"]


@POSIX
def test_what_is_no_file_is_written_to(tmp_path):
    files.write_whole("/dev/null", b"away")
    assert not Path("/dev/null").is_file()
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()), daemon=True)
    reader.start()
    files.write_whole(tmp_path / "pipe", b"through")
    reader.join(60)
    assert got == [b"through"]
    read, write = os.pipe()
    files.write_whole(f"/dev/fd/{write}", b"through")  # a link to what is no path
    assert os.read(read, 9) == b"through"
    os.close(read)
    os.close(write)
    if Path("/dev/full").exists():
        with pytest.raises(OSError, match=r"'/dev/full'$"):
            files.write_whole("/dev/full", b"nowhere")


@POSIX
def test_a_planted_link_is_not_followed(tmp_path, monkeypatch):
    """Not even by somebody who knew the name."""
    (tmp_path / "target").write_bytes(b"precious")
    monkeypatch.setattr(files.os, "urandom", lambda n: b"known")
    (tmp_path / ".6b6e6f776e.fastbn.tmp").symlink_to(tmp_path / "target")
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "f", b"new")
    assert (tmp_path / "target").read_bytes() == b"precious"
    assert there(tmp_path) == [".6b6e6f776e.fastbn.tmp", "target"]


def test_a_parent_that_is_a_file_is_the_error_that_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((FileNotFoundError, NotADirectoryError)) as caught:
        files.write_whole(tmp_path / "file" / "f", b"new")
    assert caught.value.filename == str(tmp_path / "file" / "f")


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, call):
    files.write_whole(tmp_path / "f", b"old")

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, call, fails)
    with pytest.raises(OSError, match="No space left on device") as caught:
        files.write_whole(tmp_path / "f", b"new")
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"old"
    assert there(tmp_path) == ["f"]


def test_pictures_are_written_so_too(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    history = training.History(loss=[2.0, 1.0])
    (tmp_path / "real.png").write_bytes(b"old")
    if os.name == "posix":
        (tmp_path / "link.png").symlink_to("real.png")
    history.plot(tmp_path / "link.png")
    if os.name == "posix":
        assert (tmp_path / "link.png").is_symlink()
        assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    before = there(tmp_path)
    with pytest.raises(OSError, match="full"):
        history.plot(tmp_path / "other.png")
    assert there(tmp_path) == before


def test_a_number_of_threads_is_of_the_machine_that_saved_it(tmp_path):
    """A model of 128 processors loads where 8 are."""
    pytest.importorskip("safetensors")
    from fastbn import BatchNorm
    from fastbn.kernels import machine

    bn = BatchNorm(3, num_threads=machine.most_threads())
    checkpoint.save(tmp_path / "m", bn)
    content = (tmp_path / "m").read_bytes()
    n = str(machine.most_threads()).encode()
    more = b"9" * len(n)
    assert content.count(b'\\"num_threads\\": ' + n) == 1
    (tmp_path / "m").write_bytes(content.replace(b'\\"num_threads\\": ' + n, b'\\"num_threads\\": ' + more))
    assert checkpoint.load(tmp_path / "m").config()["num_threads"] == machine.most_threads()
    assert (checkpoint.load(tmp_path / "m")(np.eye(3)) == bn(np.eye(3))).all()
