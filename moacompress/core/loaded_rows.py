"""Rows of local files and of hub sets, as `datasets` loads them."""

from __future__ import annotations

import glob
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from moacompress.core.errors import DataError

if TYPE_CHECKING:
    from datasets import Features

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""What `datasets` loads files of each suffix by."""
LARGE_BYTES = 1 << 30
"""Size of a hub set from which it is streamed."""
STREAMED_ROWS = 50_000
"""Rows that are read of a streamed set, the first ones."""
Found = TypeVar("Found")


def read_once(read: Callable[[Path], Found]) -> Callable[[Path], Found]:
    """Lets a reader of a file, or of a folder's `.txt` files, keep what it found until one is written, added or removed."""
    kept: dict[Path, tuple[list[tuple[Path, int, int]], Found]] = {}

    @wraps(read)
    def reader(path: Path) -> Found:
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        try:
            states = [(file, status.st_mtime_ns, status.st_size) for file in files for status in [file.stat()]]
        except OSError:
            return read(path)  # which says what is wrong
        if path not in kept or kept[path][0] != states:
            kept[path] = states, read(path)
        return kept[path][1]

    return reader


def file_rows(loader: str, path: Path) -> list[Any]:
    """Returns the rows of a file, by one of `LOADERS`: of a text file one, its whole `text`.

    What JSON and Parquet rows lack of the others' columns is None; a column of JSON that holds dates alone has datetimes. All
    cells of CSV are texts. Nothing is left in a cache.

    Raises:
        DataError: missing, unreadable or damaged.
    """
    with _loading(f"read {path}"):
        path.open("rb").close()
        if not path.stat().st_size:
            return []
        settings: dict[str, Any] = {}
        if loader == "text":
            settings = {"sample_by": "document", "encoding": "utf-8-sig"}
        elif loader == "csv":
            settings = {"features": _texts(next(iter(_streamed(loader, path)), {})), "keep_default_na": False}
        return list(_streamed(loader, path, **settings))


def hub_rows(name: str, config: str | None, split: str) -> Sequence[Any]:
    """Returns the rows of a hub set; of a large one the first `STREAMED_ROWS`, which are all that is fetched.

    Raises:
        DataError: no network, no such set or split, or damage.
    """
    import datasets

    with _loading(f"load hub set {name}"):
        info = datasets.load_dataset_builder(name, name=config).info.splits or {}
        large = split in info and (info[split].num_bytes or 0) >= LARGE_BYTES
        rows = datasets.load_dataset(name, name=config, split=split, streaming=large)
        return list(islice(rows, STREAMED_ROWS)) if large else rows


def _streamed(loader: str, path: Path, **settings: Any) -> Any:
    import datasets

    return datasets.load_dataset(loader, data_files=glob.escape(str(path)), split="train", streaming=True, **settings)


def _texts(row: dict[str, Any]) -> Features | None:
    """Returns that all columns are texts; None of no columns."""
    from datasets import Features, Value

    return Features({column: Value("string") for column in row}) if row else None


@contextmanager
def _loading(what: str) -> Iterator[None]:
    """Keeps `datasets` and the hub's client off the screen, and turns whatever it fails with into one error.

    Raises:
        DataError: says what could not be done.
    """
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    bars = datasets.utils.logging.is_progress_bar_enabled()
    levels = [(log, log.get_verbosity()) for log in (datasets.utils.logging, hub_logging)]
    datasets.disable_progress_bars()
    for log, _ in levels:
        log.set_verbosity(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        raise DataError(f"cannot {what}: {_cause(error)}") from error
    finally:
        for log, level in levels:
            log.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _cause(error: BaseException) -> str:
    """Returns the first line of what went wrong: Arrow's own words where it was Arrow, as they say in which row."""
    import pyarrow

    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None:
        chain.append(at)
        at = at.__cause__ or at.__context__
    told = next((one for one in chain if isinstance(one, pyarrow.ArrowInvalid)), error)
    if isinstance(told, OSError) and told.strerror:
        return told.strerror
    lines = str(told).strip().splitlines()
    return f"{type(told).__name__}: {lines[0]}" if lines else type(told).__name__
