"""Atomic writes: files are never incomplete, leftovers of killed processes are removed, and errors
name their file.
"""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lpl_pretrain.errors import (
    DataError,
    LPLError,
    SaveError,
    StorageError,
    exit_status,
    file_in_use,
    is_transient,
)
from lpl_pretrain.runtime.atomic import (
    add_path_to_oserror,
    atomic_write,
    scratch_folder,
    temporary_name,
)


def killed_while_writing(path: Path) -> None:
    """Forks a process that ends inside `atomic_write`."""
    if not (pid := os.fork()):
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            os._exit(1)
    os.waitpid(pid, 0)


def publish(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("whole")


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    killed_while_writing(tmp_path / "a.json")
    (left,) = tmp_path.iterdir()
    publish(tmp_path / "b.json")
    assert not left.exists() and [path.name for path in tmp_path.iterdir()] == ["b.json"]


def test_temporary_files_of_live_processes_and_other_machines_are_kept(tmp_path):
    own = temporary_name(tmp_path / "a.json")
    host, _, number = own.name.split(".")[-2].split("-")
    foreign = tmp_path / f".a.json.not_{host}-4194999-{number}.tmp"
    for path in (own, foreign):
        path.write_text("half")
    publish(tmp_path / "b.json")
    assert own.exists() and foreign.exists()


def test_an_error_is_raised_and_the_temporary_file_removed(tmp_path):
    with pytest.raises(OSError) as raised, atomic_write(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert raised.value.filename == str(tmp_path / "a.json") and not list(tmp_path.iterdir())


def test_an_error_of_a_file_descriptor_names_its_file():
    with (
        pytest.raises(OSError, match="No space left on device: '/dev/full'"),
        add_path_to_oserror(Path("/dev/full")),
    ):
        Path("/dev/full").write_text("x")


def chained(error: LPLError, cause: Exception, *, hidden: bool) -> LPLError:
    try:
        try:
            raise cause
        except Exception as caught:
            raise error from (None if hidden else caught)
    except LPLError as raised:
        return raised


@pytest.mark.parametrize("hidden", [False, True])
def test_transient_errors_have_exit_status_1(hidden):
    full = OSError(28, "No space left on device")
    absent = FileNotFoundError(2, "No such file or directory")
    assert exit_status(chained(DataError("x"), full, hidden=hidden)) == 1
    assert exit_status(chained(DataError("x"), absent, hidden=hidden)) == 2
    assert exit_status(DataError("rank 3: /data/x: Stale file handle: copy it again")) == 1, (
        "an error of another rank arrives as text"
    )
    assert exit_status(DataError("x")) == 2 and exit_status(SaveError("x")) == 1
    assert is_transient(full) and not is_transient(absent) and not is_transient(ValueError())


def test_a_storage_error_names_path_and_reason():
    message = str(StorageError.of(OSError(5, "Input/output error", "/runs/a")))
    assert message.startswith("/runs/a: Input/output error: ")
    assert StorageError.of(FileNotFoundError(2, "No such file or directory", "/runs/a")) is None
    assert StorageError.of(ValueError("x")) is None


def test_errors_of_safetensors_are_storage_errors(tmp_path):
    """The writer of safetensors is in Rust and raises SafetensorError instead of OSError."""
    with pytest.raises(SafetensorError) as raised:
        save_file({"x": torch.zeros(1)}, tmp_path / "absent" / "x")
    absent = str(raised.value)
    full = absent.replace(
        "No such file or directory (os error 2)", "No space left on device (os error 28)"
    )
    assert full != absent, absent
    assert StorageError.of(raised.value) is None
    assert "No space left on device" in str(StorageError.of(SafetensorError(full)))
    of_torch = "Error closing file </runs/x>: Input/output error (5)"
    assert "Input/output error" in str(StorageError.of(RuntimeError(of_torch)))
    assert (
        StorageError.of(
            RuntimeError("the size of tensor a (5) must match the size of tensor b (28)")
        )
        is None
    )


def test_a_failed_read_names_its_file(tmp_path):
    """A file descriptor has no name.  A read from a folder fails like one from a lost disk."""
    error = None
    try:
        with open(tmp_path / "a", "w+") as file:
            os.close(file.fileno())
            os.dup2(os.open(tmp_path, os.O_RDONLY), file.fileno())
            file.read()
    except OSError as caught:
        error = caught
    assert error is not None and error.filename is None
    assert file_in_use(error) == str(tmp_path / "a")
    error.errno = errno.EIO
    assert str(StorageError.of(error)).startswith(f"{tmp_path / 'a'}: ")


def test_scratch_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not (pid := os.fork()):
        with scratch_folder("work") as folder:
            (folder / "download").write_text("half")
            os._exit(1)
    os.waitpid(pid, 0)
    (left,) = tmp_path.iterdir()
    with scratch_folder("work") as folder:
        assert (
            list(tmp_path.iterdir()) == [folder]
            and folder != left
            and folder.stat().st_mode & 0o77 == 0
        )
    assert not list(tmp_path.iterdir())
