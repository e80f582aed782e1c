"""Places that commands write to: what is said of those that cannot be written."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moacompress.core.errors import ArtefactError
from moacompress.core.place import named_folder, writing_to


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file can get more than 4 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
@pytest.mark.parametrize(
    "write",
    [
        lambda folder: (folder / "a").write_bytes(bytes(10_000)),
        lambda folder: save_file({"a": torch.zeros(10_000)}, folder / "a"),
        lambda folder: torch.save(torch.zeros(10_000), folder / "a"),
    ],
    ids=["python", "safetensors", "torch"],
)
def test_every_library_s_word_for_a_full_disk_is_one_error(write: Callable[[Path], object], tmp_path: Path) -> None:
    match = rf"^cannot write to {tmp_path}: .* bytes are free there: make room"
    with pytest.raises(ArtefactError, match=match), writing_to(tmp_path):
        write(tmp_path)


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), writing_to(tmp_path):
        raise RuntimeError("out of memory")


def test_a_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_folder(".") == tmp_path
    assert named_folder("a/b") == Path("a/b")
    with pytest.raises(ArtefactError, match="no folder that can be made"):
        named_folder("/")
