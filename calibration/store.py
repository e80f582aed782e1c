"""The profile on disk: a folder that a run fills sample by sample, and the `Profile` that search reads from it.

    profile.json              what was asked for, the rules, the resolved recipe; "complete": true once all is there
    calibration.safetensors   the samples that are profiled
    validation.safetensors    the samples that plans will be measured on
    samples/00000.safetensors statistics of one finished sample
    influence.safetensors     the statistics of all samples

Every file is written aside and moved into place. A sample's file carries the fingerprint of the profile it belongs to
and a digest of its numbers: a resumed run takes exactly the files that it would have written and redoes the others.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moacompress.artefacts import fingerprint, read_json, write_bytes, write_json
from moacompress.calibration.samples import Sample, fingerprint_samples, load_samples
from moacompress.errors import ArtefactError, MoaCompressError, UsageError
from moacompress.plan import ModelShape, Rule
from moacompress.recipe import Recipe

FORMAT = "moacompress-profile"
VERSION = 1
ESTIMATORS = ("fisher", "sample")

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What the backward passes of a sample say (or of many: then with an axis for the sample in front).

    Attributes:
        squares: `sum_i d_i^2` over the sample's rows, float32 `[draws, layers, kv_heads, rules]`.
        total: `sum_i d_i`, same shape.
    """

    squares: Floats
    total: Floats

    @property
    def finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return bool(np.isfinite(self.squares).all() and np.isfinite(self.total).all())

    def tensors(self) -> dict[str, Floats]:
        """Returns the arrays by their names on disk."""
        return {"squares": self.squares, "total": self.total}

    def digest(self) -> str:
        """Returns a hash of all numbers."""
        return hashlib.sha256(self.squares.tobytes() + self.total.tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Profile:
    """How much every rule on every KV head is predicted to cost.

    Attributes:
        path: the folder.
        source: MODEL, as it can be loaded again.
        shape: the model's shape, weights fingerprint included.
        lengths: profiled lengths in tokens, ascending.
        rules: the candidate rules; `rules[0]` is `Rule.FULL`.
        min_window: smallest window of any rule, tokens.
        recipe: the resolved recipe.
        fingerprint: of everything that decides the numbers.
        calibration_fingerprint: of the calibration samples' token ids.
        validation: the samples that plans are measured on.
        seconds: time that the samples took.
        sample_lengths: nominal length of every profiled sample, int64 `[samples]`.
        statistics: of every profiled sample, `[samples, draws, layers, kv_heads, rules]`.
    """

    path: Path
    source: str
    shape: ModelShape
    lengths: tuple[int, ...]
    rules: tuple[Rule, ...]
    min_window: int
    recipe: Recipe
    fingerprint: str
    calibration_fingerprint: str
    validation: list[Sample]
    seconds: float
    sample_lengths: npt.NDArray[np.int64]
    statistics: Statistics

    def influence(self, estimator: str) -> npt.NDArray[np.float64]:
        """Returns the predicted KL of one rule on one KV head, in nats per answer token.

        Half the mean of the statistic over the samples and draws of a length.

        Args:
            estimator: "fisher" (`sum_i d_i^2`) or "sample" (`(sum_i d_i)^2`).

        Returns:
            float64 `[lengths, layers, kv_heads, rules]`; 0 for `rules[0]`.

        Raises:
            UsageError: another estimator.
        """
        if estimator not in ESTIMATORS:
            raise UsageError(f"estimator {estimator!r} is not one of {', '.join(ESTIMATORS)}")
        chosen = self.statistics.squares if estimator == "fisher" else self.statistics.total
        values = chosen.astype(np.float64)
        if estimator == "sample":
            values **= 2
        return np.stack([values[self.sample_lengths == length].mean((0, 1)) / 2 for length in self.lengths])

    @staticmethod
    def load(path: str | Path) -> Profile:
        """Reads a finished profile.

        Raises:
            ArtefactError: missing, half-written or corrupted; the message names the file and says what to do.
        """
        path = Path(path)
        head = Head.read(path)
        if not head.complete:
            raise ArtefactError(
                f"the profile in {path} is not finished; run the same profile command again to finish it"
            )
        validation = _samples(path / "validation.safetensors", head.validation_fingerprint)
        lengths, statistics = _read_merged(path / "influence.safetensors", head)
        return Profile(
            path=path,
            source=head.source,
            shape=head.shape,
            lengths=head.lengths,
            rules=head.rules,
            min_window=head.recipe.profile.min_window,
            recipe=head.recipe,
            fingerprint=head.fingerprint,
            calibration_fingerprint=head.calibration_fingerprint,
            validation=validation,
            seconds=head.seconds,
            sample_lengths=lengths,
            statistics=statistics,
        )


@dataclass(frozen=True)
class Head:
    """What `profile.json` holds.

    Attributes:
        source: MODEL, as it can be loaded again.
        shape: the model's shape.
        rules: the candidate rules.
        recipe: the resolved recipe.
        request: fingerprint of what was asked for, known before any sample is made.
        fingerprint: fingerprint of the request and the calibration samples; empty until they are made.
        calibration_fingerprint: of the calibration samples' token ids; empty until they are made.
        validation_fingerprint: of the validation samples' token ids; empty until they are made.
        skipped: indices of the samples left out because a number was not finite.
        digest: of the statistics in `influence.safetensors`.
        seconds: time that the samples took.
        complete: whether everything is there.
    """

    source: str
    shape: ModelShape
    rules: tuple[Rule, ...]
    recipe: Recipe
    request: str
    fingerprint: str = ""
    calibration_fingerprint: str = ""
    validation_fingerprint: str = ""
    skipped: tuple[int, ...] = ()
    digest: str = ""
    seconds: float = 0.0
    complete: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        """Profiled lengths in tokens, ascending."""
        return self.recipe.calibration.lengths

    @property
    def sample_shape(self) -> tuple[int, int, int, int]:
        """Shape of a sample's statistics, `(draws, layers, kv_heads, rules)`."""
        return self.recipe.profile.draws, self.shape.layers, self.shape.kv_heads, len(self.rules)

    def write(self, folder: Path) -> None:
        """Writes `profile.json`, atomically."""
        data = {
            **self.__dict__,
            "shape": self.shape.to_dict(),
            "rules": [(rule.sink, rule.alpha, rule.beta_q) for rule in self.rules],
            "recipe": self.recipe.resolved(),
            "lengths": self.lengths,
            "min_window": self.recipe.profile.min_window,
        }
        complete = data.pop("complete")
        write_json(folder / "profile.json", {"format": FORMAT, "version": VERSION, **data, "complete": complete})

    @staticmethod
    def read(folder: Path) -> Head:
        """Reads `profile.json`.

        Raises:
            ArtefactError: missing, of a newer version, or damaged.
        """
        path = folder / "profile.json"
        if not path.exists():
            raise ArtefactError(
                f"{folder} is not a profile: it has no profile.json; make one with `moacompress profile`"
            )
        data = _json(path)
        try:
            shape = {**data["shape"], "native_windows": tuple(data["shape"]["native_windows"])}
            names = ("source", "request", "fingerprint", "calibration_fingerprint", "validation_fingerprint", "digest")
            return Head(
                shape=ModelShape(**shape),
                rules=tuple(Rule(*map(int, rule)) for rule in data["rules"]),
                recipe=Recipe.from_dict(data["recipe"], "its recipe"),
                skipped=tuple(map(int, data["skipped"])),
                seconds=float(data["seconds"]),
                complete=data["complete"] is True,
                **{name: str(data[name]) for name in names},
            )
        except (KeyError, TypeError, ValueError, AttributeError, MoaCompressError) as error:
            raise _damaged(path, str(error)) from error


def prepare(folder: Path, head: Head, overwrite: bool) -> Head:
    """Makes the folder of a profile, or finds what an earlier run of the same request left there.

    Args:
        folder: where the profile goes.
        head: what is asked for.
        overwrite: replace whatever else is in the folder.

    Returns:
        The head on disk, with the recipe of this run and where it found the model.

    Raises:
        ArtefactError: the folder holds something else and `overwrite` is False, or can not be written.
    """
    _sweep(folder)
    found = _same_request(folder, head, overwrite)
    if found is None:
        try:
            if folder.is_dir():
                shutil.rmtree(folder)
            else:
                folder.unlink(missing_ok=True)
            folder.mkdir(parents=True)
        except OSError as error:
            raise ArtefactError(f"can not write {folder}: {error.strerror or error}") from error
        found = head
    elif (found.recipe, found.source) != (head.recipe, head.source):
        found = replace(found, recipe=head.recipe, source=head.source)
    else:
        return found
    found.write(folder)
    return found


def _same_request(folder: Path, head: Head, overwrite: bool) -> Head | None:
    """Returns the head to go on with; None if the folder is to be made empty."""
    if not folder.exists():
        return None
    if folder.is_dir() and not any(folder.iterdir()):
        return None
    path = folder / "profile.json"
    if path.is_file():
        try:
            found = Head.read(folder)
        except ArtefactError:
            # Nothing in it can be trusted but files that carry this profile's own fingerprint, and those are checked.
            if _foreign(path):
                if overwrite:
                    return None
                raise
            _forget_samples(folder)
            return replace(head, seconds=0.0)
        if found.request == head.request:
            return found
        if not any(folder.rglob("*.safetensors")):
            return None  # the other request failed before anything was saved
        if not overwrite:
            raise ArtefactError(
                f"{folder} holds a profile of another model or recipe ({found.source}, request {found.request}, this "
                f"one is {head.request}); choose another folder or pass --overwrite"
            )
    else:
        # not even with --overwrite: a mistyped folder must not cost somebody's files
        raise ArtefactError(f"{folder} exists already and is not a profile; choose another folder")
    return None


def merge(folder: Path, head: Head, lengths: Sequence[int], statistics: Sequence[Statistics]) -> Head:
    """Writes `influence.safetensors` and then marks the profile as complete.

    Args:
        folder: the profile's folder.
        head: its head, all but `digest` and `complete` filled in.
        lengths: nominal length of every sample.
        statistics: of every sample, those in `head.skipped` included.

    Returns:
        The head that was written.
    """
    from safetensors.numpy import save

    used = [index for index in range(len(lengths)) if index not in head.skipped]
    merged = Statistics(
        np.stack([statistics[index].squares for index in used]), np.stack([statistics[index].total for index in used])
    )
    nominal = np.array([lengths[index] for index in used], np.int64)
    write_bytes(folder / "influence.safetensors", save({**merged.tensors(), "lengths": nominal}))
    head = replace(head, digest=merged.digest(), complete=True)
    head.write(folder)
    return head


def sample_path(folder: Path, index: int) -> Path:
    """Returns where the statistics of a sample are."""
    return folder / "samples" / f"{index:05d}.safetensors"


def write_sample(folder: Path, index: int, statistics: Statistics, owner: str, seconds: float) -> None:
    """Writes the statistics of one finished sample, atomically.

    Args:
        folder: the profile's folder.
        index: number of the sample.
        statistics: may hold numbers that are not finite: then the sample is one to be skipped.
        owner: fingerprint of the profile.
        seconds: time that it took.
    """
    from safetensors.numpy import save

    notes = {"profile": owner, "index": str(index), "digest": statistics.digest(), "seconds": f"{seconds:.3f}"}
    write_bytes(sample_path(folder, index), save(statistics.tensors(), metadata=notes))


def read_sample(folder: Path, index: int, owner: str, shape: tuple[int, ...]) -> tuple[Statistics, float] | None:
    """Returns the statistics and the seconds of a finished sample; None if it has to be done (again).

    Args:
        folder: the profile's folder.
        index: number of the sample.
        owner: fingerprint of the profile.
        shape: `(draws, layers, kv_heads, rules)`.
    """
    path = sample_path(folder, index)
    if not path.is_file():
        return None
    try:
        arrays, notes = _read(path)
        statistics = Statistics(arrays["squares"], arrays["total"])
        seconds = float(notes["seconds"])
    except (ArtefactError, KeyError, ValueError):
        return None
    whole = statistics.squares.shape == statistics.total.shape == shape
    if not whole or (notes.get("profile"), notes.get("index")) != (owner, str(index)):
        return None
    return (statistics, seconds) if notes.get("digest") == statistics.digest() else None


def read_samples(path: Path, expected: str) -> list[Sample] | None:
    """Returns the samples in `path`; None if they have to be made (again).

    Args:
        path: a file of samples.
        expected: their fingerprint, or empty if it was not recorded yet.
    """
    try:
        return _samples(path, expected) if path.is_file() else None
    except ArtefactError:
        return None


def fingerprint_ordered(samples: Sequence[Sample]) -> str:
    """Returns a hash of all that the profile takes from samples: ids, answers and lengths, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{len(sample.input_ids)} {sample.length} ".encode())
        digest.update(np.ascontiguousarray(sample.input_ids, "<i8").tobytes())
        digest.update(np.ascontiguousarray(sample.answer_mask, np.uint8).tobytes())
    return digest.hexdigest()[:16]


def _samples(path: Path, expected: str) -> list[Sample]:
    try:
        samples = load_samples(path)
    except ArtefactError as error:
        why = str(error).removeprefix(f"can not read samples {path}: ").removesuffix("; make them anew")
        raise _damaged(path, why) from error
    if expected and fingerprint_samples(samples) != expected:
        raise _damaged(path, f"its samples have fingerprint {fingerprint_samples(samples)}, not {expected}")
    return samples


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from error


def _read_merged(path: Path, head: Head) -> tuple[npt.NDArray[np.int64], Statistics]:
    arrays, _ = _read(path)
    if set(arrays) != {"squares", "total", "lengths"}:
        raise _damaged(path, f"it holds {', '.join(sorted(arrays)) or 'nothing'}")
    statistics, lengths = Statistics(arrays["squares"], arrays["total"]), arrays["lengths"]
    shape = (len(lengths), *head.sample_shape)
    if statistics.squares.shape != shape or statistics.total.shape != shape:
        raise _damaged(path, f"its arrays have shape {statistics.squares.shape}, not {shape}")
    if not statistics.finite or statistics.digest() != head.digest:
        raise _damaged(path, "its numbers are not those that were written")
    if set(lengths.tolist()) != set(head.lengths):
        raise _damaged(path, f"it has samples of {sorted(set(lengths.tolist()))} tokens, not {list(head.lengths)}")
    return lengths, statistics


def _json(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path, "profile")
    except ArtefactError as error:
        raise _damaged(path, str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtefactError(f'{path} is not that of a profile: its "format" is not {FORMAT!r}; choose another folder')
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ArtefactError(
            f"{path} has version {version}, this moacompress reads up to {VERSION}; upgrade moacompress"
        )
    return data


def _foreign(path: Path) -> bool:
    """Whether a damaged-looking `profile.json` is sound JSON of someone else, or of a newer moacompress."""
    try:
        data = read_json(path, "profile")
    except ArtefactError:
        return False
    return not (isinstance(data, dict) and data.get("format") == FORMAT and data.get("version") == VERSION)


def _sweep(folder: Path) -> None:
    """Removes what a killed run was just writing aside."""
    for pattern in (".profile.json.*.tmp", ".*.safetensors.*.tmp", "samples/.*.safetensors.*.tmp"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def _forget_samples(folder: Path) -> None:
    for name in ("calibration", "validation"):
        (folder / f"{name}.safetensors").unlink(missing_ok=True)


def _damaged(path: Path, why: str) -> ArtefactError:
    return ArtefactError(f"profile file {path} is damaged: {why}; run the same profile command again to repair it")


def request_fingerprint(shape: ModelShape, rules: Sequence[Rule], recipe: Recipe, files: dict[str, str]) -> str:
    """Returns a hash of all that decides a profile's numbers and is known before its samples are made.

    Choices that only matter later (estimator, search, evaluation) are not in it.

    Args:
        shape: the model, with its weights fingerprint.
        rules: the candidate rules.
        recipe: the run.
        files: digest of every local file that samples are made of.
    """
    return fingerprint(
        {
            "version": VERSION,
            "model": shape.to_dict(),
            "rules": [(rule.sink, rule.alpha, rule.beta_q) for rule in rules],
            "min_window": recipe.profile.min_window,
            "draws": recipe.profile.draws,
            "seed": recipe.seed,
            "calibration": recipe.resolved()["calibration"],
            "files": files,
        }
    )
