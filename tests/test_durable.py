"""Durable writing: the new content whole or the old content untouched, whatever happens in between."""

import errno
import os
import resource
import subprocess
import sys
import textwrap

import pytest

from formary import durable
from formary.errors import StorageError


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    return path


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    path.mkdir()
    (path / "a.txt").write_text("old")
    return path


def fill(folder, text="new"):
    with durable.new_folder(folder) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "b.txt").write_text(text)


def names(place):
    return sorted(path.name for path in place.iterdir())


def test_a_file_and_its_folders_appear(tmp_path):
    durable.write_json(tmp_path / "x" / "y.json", {"ä": 1})
    assert (tmp_path / "x" / "y.json").read_text(encoding="utf-8") == '{\n  "ä": 1\n}\n'
    assert names(tmp_path / "x") == ["y.json"]


def test_a_new_folder_replaces_the_old_one_as_a_whole(folder):
    fill(folder)
    assert names(folder) == ["inner"] and names(folder.parent) == ["model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_while_writing_keeps_the_old_content(file, folder, error):
    with pytest.raises(error), durable.new_file(file) as temporary:
        temporary.write_text("half")
        raise error
    with pytest.raises(error), durable.new_folder(folder) as temporary:
        (temporary / "a.txt").write_text("half")
        raise error
    assert file.read_text() == (folder / "a.txt").read_text() == "old"
    assert names(file.parent) == ["a.txt", "model"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_at_any_point_keeps_the_old_content(file, folder, monkeypatch, call):
    monkeypatch.setattr(os, call, full)
    with pytest.raises(StorageError, match=r"a\.txt: could not be written .No space left on device.*free some space"):
        durable.write_text(file, "new")
    with pytest.raises(StorageError, match="model: could not be written"):
        fill(folder)
    monkeypatch.undo()
    assert file.read_text() == (folder / "a.txt").read_text() == "old"
    assert names(file.parent) == ["a.txt", "model"]


def test_a_write_that_the_system_refuses_keeps_the_old_content(file):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match=r"a\.txt: could not be written"):
            durable.write_text(file, "x" * 20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "old" and names(file.parent) == ["a.txt"]


def test_ctrl_c_between_the_two_renames_puts_the_old_folder_back(folder, monkeypatch):
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fill(folder)
    assert (folder / "a.txt").read_text() == "old" and names(folder.parent) == ["model"]


@pytest.mark.parametrize("renames", [0, 1])
def test_after_a_kill_the_old_folder_is_there_at_the_next_start(folder, renames):
    program = f"""
        import os, pathlib, sys
        from formary import durable
        replace, done = os.replace, []
        def killed(source, target):
            if len(done) == {renames}:
                os._exit(9)
            done.append(source)
            replace(source, target)
        os.replace = killed
        with durable.new_folder(pathlib.Path(sys.argv[1])) as temporary:
            (temporary / "a.txt").write_text("new")
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(folder)], check=False)
    assert killed.returncode == 9 and len(names(folder.parent)) == 2
    durable.remove_leftovers(folder.parent)
    assert (folder / "a.txt").read_text() == "old" and names(folder.parent) == ["model"]


def test_leftovers_are_removed_and_nothing_else(tmp_path, folder):
    (tmp_path / ".writing-1-a.txt").write_text("half")
    (tmp_path / ".writing-1-model").mkdir()
    (tmp_path / ".hidden").write_text("mine")
    durable.remove_leftovers(tmp_path)
    assert names(tmp_path) == [".hidden", "model"]
    durable.remove_leftovers(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_is_not_writable_is_an_error_of_ours(folder):
    folder.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        durable.write_text(folder / "b.txt", "new")


@pytest.mark.parametrize("below", ["b.txt", "c/b.txt"])
def test_a_file_where_a_folder_should_be_is_named(file, below):
    said = r"b\.txt: could not be written \(\S*/a\.txt is a file, not a folder\)"
    with pytest.raises(StorageError, match=said):
        durable.write_text(file / below, "new")
    with pytest.raises(StorageError, match=said):
        fill(file / below)
    assert file.read_text() == "old" and names(file.parent) == ["a.txt"]


def test_naming_says_which_file_and_what_is_left(tmp_path):
    path, left = tmp_path / "a", "the checkpoints are whole"
    with (
        pytest.raises(StorageError, match=r"/a: could not be written \(No space left.*\); nothing half-written"),
        durable.naming(path),
    ):
        full()
    with pytest.raises(StorageError, match=f"; {left}; free some space"), durable.naming(path, left=left):
        full()
    with pytest.raises(ValueError), durable.naming(path):
        raise ValueError
