"""What the system may have against reading or writing a file is told in one paragraph, and nothing is lost by it."""

from __future__ import annotations

import logging
import os
import resource
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune import cli
from autoprune.errors import FileError
from autoprune.files import (
    append_line,
    cache_folder,
    check_cache,
    read_json,
    read_lines,
    read_tensors,
    write_json,
    write_tensors,
)
from autoprune.repack import export_onnx, files, load, repack, save
from autoprune.repack.report import RepackedModel
from autoprune.repack.tuning import tuning

WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_json(path, {"new": 1}),
    "tensors": lambda path: write_tensors(path, {"new": torch.ones(3)}),
}
writers = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
every = pytest.mark.parametrize("write", [*WRITERS.values(), lambda path: append_line(path, {"new": 1})])


@pytest.fixture(scope="module")
def fast() -> RepackedModel:
    return repack(nn.Linear(4, 2), torch.randn(1, 4))


@contextmanager
def no_rights() -> Iterator[None]:
    """As a user who may not do everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@writers
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_mode_that_open_gives(write: Callable[[Path], None], umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


@writers
def test_a_file_that_is_replaced_keeps_its_mode(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "shared"
    path.touch()
    path.chmod(0o664)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o664
    assert path.stat().st_size > 0


@writers
@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(write: Callable[[Path], None], exists: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "store" / "model", tmp_path / "current"
    link.symlink_to("store/model")
    if exists:
        target.parent.mkdir()
        target.write_text("before")
    write(link)
    assert link.is_symlink()
    assert target.stat().st_size > 10
    assert [each.name for each in target.parent.iterdir()] == ["model"]


def test_a_model_is_saved_through_a_link(fast: RepackedModel, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "model")
    save(fast, tmp_path / "link")
    x = torch.randn(3, 4)
    assert torch.equal(load(tmp_path / "model")(x), fast(x))
    assert (tmp_path / "link").is_symlink()


@writers
def test_what_is_no_file_is_not_replaced(write: Callable[[Path], None], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "socket"))
    for name, kind in (("pipe", "a pipe"), ("socket", "a socket"), ("folder", "a folder")):
        with pytest.raises(FileError, match=f"{name} is .*{kind.split()[1]}.*give the name of a file"):
            write(tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert stat.S_ISSOCK((tmp_path / "socket").stat().st_mode)
    assert {each.name for each in tmp_path.iterdir()} == {"pipe", "socket", "folder"}


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
@writers
@pytest.mark.parametrize("folder", ["/proc/self/fd", "/dev/fd"])
def test_what_is_open_is_not_replaced(write: Callable[[Path], None], folder: str, tmp_path: Path) -> None:
    """As /dev/stdout is, which may be a file."""
    with (tmp_path / "output").open("w") as handle:
        (tmp_path / "link").symlink_to(f"{folder}/{handle.fileno()}")
        for path in (f"{folder}/{handle.fileno()}", tmp_path / "link"):
            with pytest.raises(FileError, match="which a file cannot replace"):
                write(Path(path))
        handle.write("heard")
    assert (tmp_path / "output").read_text() == "heard"


@every
def test_a_path_that_cannot_be(write: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for path, why in (("file/inside", "Not a directory|File exists"), ("loop", "symbolic"), ("x" * 300, "too long")):
        with pytest.raises(FileError, match=f"cannot be written: .*({why}).*the same command goes on"):
            write(tmp_path / path)


@every
def test_a_full_disk(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path)
    before = path.read_bytes()
    with full_disk(10), pytest.raises(FileError, match=r"file cannot be written: .*[Ff]ile too large"):
        write(path)
    assert path.read_bytes()[: len(before)] == before
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    write(path)


@every
def test_a_folder_that_may_not_be_written(write: Callable[[Path], None], tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with no_rights(), pytest.raises(FileError, match="cannot be written: Permission denied"):
            write(tmp_path / "file")
    finally:
        tmp_path.chmod(0o755)


def test_a_file_that_may_not_be_read_is_not_called_corrupt(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("json", "lines", "tensors")]
    write_json(paths[0], {"a": 1})
    append_line(paths[1], {"a": 1})
    write_tensors(paths[2], {"a": torch.ones(1)})
    readers: list[Callable[[Path, str], object]] = [read_json, read_lines, read_tensors]
    for path, read in zip(paths, readers, strict=True):
        path.chmod(0)
        with no_rights(), pytest.raises(FileError, match="cannot be read: Permission denied") as told:
            read(path, "it")
        assert "corrupt" not in str(told.value)
        assert "elete" not in str(told.value)
        path.chmod(0o644)
        read(path, "it")


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"the packed model cannot be read: .* is no file"):
        load(tmp_path)
    with pytest.raises(FileError, match="is no file but a folder"):
        read_json(tmp_path, "the plan")


@pytest.mark.parametrize("name", ["folder/", "models/new/", "\udcff.safetensors"])
def test_names_that_are_refused(name: str, fast: RepackedModel, tmp_path: Path) -> None:
    for call in (
        lambda path: save(fast, path),
        load,
        lambda path: export_onnx(nn.Linear(4, 2), torch.ones(1, 4), path),
    ):
        with pytest.raises(FileError, match=r"names a folder|no UTF-8"):
            call(f"{tmp_path}/{name}")
    assert not any(tmp_path.iterdir())


def test_a_users_home(fast: RepackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(fast, "~/models/fast.safetensors")
    assert (tmp_path / "models" / "fast.safetensors").is_file()
    assert torch.equal(load("~/models/fast.safetensors")(torch.ones(2, 4)), fast(torch.ones(2, 4)))
    with pytest.raises(FileError, match="no such user"):
        load("~nobody-of-that-name/fast.safetensors")


def homeless() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", homeless)
    for name in ("AUTOPRUNE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FileError, match=r"neither HOME nor an entry in passwd. Set AUTOPRUNE_CACHE"):
        cache_folder()


@pytest.mark.parametrize("home", [True, False])
def test_repack_goes_on_without_a_cache_and_says_so_once(
    home: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("AUTOPRUNE_CACHE")
    if home:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
    tuning._say_once.cache_clear()
    model, x = nn.Linear(24, 12), torch.randn(2, 24)
    with caplog.at_level(logging.WARNING, "autoprune"):
        for _ in range(2):
            with torch.inference_mode():
                assert torch.allclose(repack(model, x)(x), model(x), atol=1e-5)
    assert len(caplog.records) == 1
    assert "AUTOPRUNE_CACHE" in caplog.text if not home else "Not a directory" in caplog.text


def test_a_cache_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path))
    check_cache()
    tmp_path.chmod(0o555)
    with no_rights(), pytest.raises(FileError, match="Set AUTOPRUNE_CACHE to a folder that can"):
        check_cache()
    tmp_path.chmod(0o755)


def test_the_command_line_tells_an_error_of_the_system_in_a_paragraph(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "/runs/events")

    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: /runs/events: No space left on device. Once that is mended, the same command goes on.\n"


def test_a_file_that_cannot_be_checked_is_not_called_corrupt(
    fast: RepackedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    save(fast, tmp_path / "fast")
    monkeypatch.setattr(files, "check_demand", fail)
    with pytest.raises(FileError, match=r"does not load: .*No usable temporary directory found.* set TMPDIR") as told:
        load(tmp_path / "fast")
    assert "corrupt" not in str(told.value)
