"""Writing where something is already: its mode and links stay, names may be long, and what the killed leave is deleted."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
import time
from pathlib import Path

import pytest

from convpeft import AdapterFileError
from convpeft.files import writing
from convpeft.files.writing import write
from tests.adapter_files import assert_refused, base, condition, trained

import convpeft  # isort: skip


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o666, 0o400, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path, b"new")
    assert (path.read_bytes(), mode_of(path)) == (b"new", mode)


def test_the_bytes_of_a_private_file_are_never_readable_by_others(tmp_path, monkeypatch):
    path, seen = tmp_path / "a.safetensors", []
    path.write_bytes(b"old")
    path.chmod(0o600)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append(stat.S_IMODE(os.fstat(file).st_mode)), fsync(file)))
    write(path, b"new")
    assert seen == [0o600]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_that_the_process_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "a", b"new")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "a") == 0o666 & ~mask


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, chain, hanging = (tmp_path / name for name in ("there/a", "link", "chain", "hanging"))
    target.write_bytes(b"old")
    link.symlink_to(target)
    chain.symlink_to("link")
    hanging.symlink_to("later/b")
    write(link, b"1")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"1")
    write(chain, b"2")
    assert (chain.is_symlink(), link.is_symlink(), target.read_bytes()) == (True, True, b"2")
    write(hanging, b"3")
    assert (hanging.is_symlink(), (tmp_path / "later" / "b").read_bytes()) == (True, b"3")
    assert [each.name for each in target.parent.iterdir()] == ["a"]


def test_links_in_a_circle_pipes_folders_and_devices_are_refused(tmp_path):
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, why in {"one": "circle|symbolic", "pipe": "it is a pipe", "folder": "it is a directory"}.items():
        with pytest.raises(AdapterFileError, match=f"{name} cannot be written: .*({why})"):
            write(tmp_path / name, b"new")
    with pytest.raises(AdapterFileError, match="it is a device, no file"):
        write(Path("/dev/null"), b"new")
    with pytest.raises(AdapterFileError, match="cannot be written"):
        write(Path("/dev/null\0"), b"new")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["folder", "one", "pipe", "two"]


def test_a_pipe_and_a_device_are_not_waited_for_when_loading(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert_refused(tmp_path / "pipe", "pipe cannot be read: it is a pipe")
    assert_refused(Path("/dev/zero"), "/dev/zero cannot be read: it is a device, no file")
    assert_refused(tmp_path, "cannot be read: it is a directory")
    assert_refused(tmp_path / "a\0b", "cannot be read: .*null")


@pytest.mark.parametrize("step", ["chmod", "fsync"])
@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_modes_or_flushing_are_written_to(tmp_path, monkeypatch, step, code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, fail)
    write(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("step", "code"), [("fsync", errno.EIO), ("fsync", errno.ENOSPC), ("chmod", errno.EIO)])
def test_a_disk_that_fails_is_no_such_file_system(tmp_path, monkeypatch, step, code):
    def fail(*arguments):
        raise OSError(code, os.strerror(code))

    path = tmp_path / "a"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(AdapterFileError, match="cannot be written"):
        write(path, b"new")
    assert ([each.name for each in tmp_path.iterdir()], path.read_bytes()) == (["a"], b"old")


@pytest.mark.parametrize(
    "name", ["a" * 255, "a" * 243 + ".safetensors", "ä" * 127, "名" * 85, "a" * 240, "a" * 60, "a"]
)
def test_every_name_that_fits_can_be_written(tmp_path, monkeypatch, name):
    replace, parts = os.replace, []
    monkeypatch.setattr(os, "replace", lambda part, to: (parts.append(Path(part).name), replace(part, to)))
    for content in (b"one", b"two"):
        write(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == [name]
    assert all(len(os.fsencode(part)) <= max(60, len(os.fsencode(name))) for part in parts)
    with pytest.raises(AdapterFileError, match="File name too long"):
        write(tmp_path / ("b" * 256), b"new")


@pytest.mark.parametrize("name", ["a.safetensors", "a" * 255])
def test_what_a_killed_process_leaves_is_deleted_by_the_next_that_writes(tmp_path, name):
    child = os.fork()
    if not child:
        try:
            os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
            write(tmp_path / name, b"never")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a")
    assert left.name.endswith(".part")
    write(tmp_path / "another", b"new")
    assert left.exists()  # not one of that file's
    write(tmp_path / name, b"new")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([name, "another"])


def test_nothing_that_is_being_written_or_is_not_ours_is_deleted(tmp_path):
    machine, old = writing._machine(), time.time() - 2 * 3600
    alive = tmp_path / f".a.{machine}-{os.getppid()}-00000000.part"
    elsewhere = tmp_path / ".a.00000000-1-00000000.part"
    before = tmp_path / ".a.abcd_123.part"
    kept = [
        alive,
        elsewhere,
        before,
        tmp_path / ".b.abcd_123.part",
        tmp_path / ".a.part",
        tmp_path / ".a.mine-too.part",
    ]
    for path in kept:
        path.write_bytes(b"x")
    write(tmp_path / "a", b"new")
    assert all(path.exists() for path in kept)
    for path in kept:
        os.utime(path, (old, old))
    write(tmp_path / "a", b"new")
    assert [path.name for path in kept if not path.exists()] == [elsewhere.name, before.name]


def test_a_reader_beside_writers_always_sees_one_whole_adapter(tmp_path):
    path, specs = (
        tmp_path / "a.safetensors",
        [{"rules": [{"match": "proj", "kind": "lora", "rank": n}]} for n in (1, 2, 3)],
    )
    writers = [trained(base(), spec, "screw") for spec in specs]
    values = {id(model): model.proj.convpeft["screw"].up.detach().clone() for model in writers}
    convpeft.save_adapter(writers[0], path)
    ended, failed = threading.Event(), []

    def save(model):
        while not ended.is_set():
            try:
                convpeft.save_adapter(model, path)
            except Exception as error:
                failed.append(error)

    threads = [threading.Thread(target=save, args=(model,)) for model in writers]
    for thread in threads:
        thread.start()
    try:
        model, seen = base(), set()
        before = condition(model)
        for _ in range(60):
            convpeft.load_adapter(model, path)
            up = model.proj.convpeft["screw"].up.detach()
            assert any(up.shape == value.shape and up.equal(value) for value in values.values())
            seen.add(up.shape[1])
            convpeft.eject(model)
        assert condition(model) == before
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert failed == []
    assert len(seen) > 1
    assert [each.name for each in tmp_path.iterdir()] == ["a.safetensors"]
