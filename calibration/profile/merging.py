"""Shards of a profile put together: the same folder as one run leaves, whatever order they are given in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moacompress.calibration.data.samples import Sample, save_samples
from moacompress.calibration.gates.training import Gates
from moacompress.calibration.profile.folder import begun_profile, check_place, prepare
from moacompress.calibration.profile.manifest import Manifest, with_recorded
from moacompress.calibration.profile.rounding_loss import rounding_of, write_rounding
from moacompress.calibration.profile.sample_run import check_skipped
from moacompress.calibration.profile.shard import Shard
from moacompress.calibration.profile.statistics import Statistics
from moacompress.calibration.profile.store import Profile, merge, read_sample, read_samples, write_sample
from moacompress.core.artefact_names import ANSWERS_FILE, CALIBRATION_FILE, GATES_FILE, SHINGLES_FILE, VALIDATION_FILE
from moacompress.core.errors import ArtefactError, UsageError
from moacompress.core.files import check_no_link, write_bytes
from moacompress.core.lock_holders import own_folder
from moacompress.core.place import check_writable, no_empty_folder
from moacompress.core.progress import SILENT, Progress
from moacompress.core.shingles import Shingles


@dataclass(frozen=True)
class _Part:
    """The folder of a shard, and what it holds."""

    folder: Path
    head: Manifest
    shard: Shard

    @property
    def name(self) -> str:
        return f"{self.folder} (shard {self.shard.name})"

    def samples(self, file: str, fingerprint: str, numbers: Sequence[int]) -> dict[int, Sample]:
        """Returns the samples of a split by number.

        Raises:
            ArtefactError: they are not there, or damaged.
        """
        found = read_samples(self.folder / file, fingerprint) if fingerprint else None
        if found is None or len(found) != len(numbers):
            raise ArtefactError(f"{self.name} is not finished: it lacks {file}; run its command again")
        return dict(zip(numbers, found, strict=True))

    def statistics(self) -> dict[int, tuple[Statistics, float]]:
        """Returns the statistics of its samples, and the seconds that each took, by number.

        Raises:
            ArtefactError: some are not there, or damaged.
        """
        read = {
            number: read_sample(self.folder, number, self.head.owner, self.head.array_shapes)
            for number in self.shard.calibration
        }
        found = {number: sample for number, sample in read.items() if sample is not None}
        if len(found) < len(read):
            raise ArtefactError(
                f"{self.name} is not finished: {len(found)} of its {len(read)} samples are there; run its command again"
            )
        return found


def merge_shards(
    folders: Sequence[str | Path], out: str | Path, *, overwrite: bool = False, progress: Progress | None = None
) -> Profile:
    """Puts the shards of a profile together, in any order, which is then what one run would have made.

    The shards' folders are only read. With `overwrite` whatever profile is in `out` is removed; other files in it stay.

    Raises:
        UsageError: no folders, one of them twice, or `out` among them.
        ArtefactError: a folder is no shard, is not finished, or has samples of another one too; samples are in none of them;
            they are of other weights or another recipe; or `out` holds something else.
        DataError: too many samples are left out.
    """
    out, progress = Path(out), progress or SILENT
    parts, calibration, validation = _checked(folders, out)
    samples, held_out = ([found[number] for number in sorted(found)] for found in (calibration, validation))
    with no_empty_folder(out), own_folder(out):
        first = parts[0].head
        if not overwrite:
            _check_statistics(first, out)
        head = prepare(out, replace(first, shard=None, skipped=(), gates="", seconds=0.0, complete=False), overwrite)
        if head.complete:
            return Profile.load(out)
        head = replace(head.of_samples(samples, held_out), gates=first.gates, centres=first.centres)
        head.write(out)
        save_samples(out / CALIBRATION_FILE, samples)
        save_samples(out / VALIDATION_FILE, held_out)
        _copy_answers(parts, out)
        shingles = [path for path in (part.folder / SHINGLES_FILE for part in parts) if path.is_file()]
        if len(shingles) == len(parts):
            Shingles.union([Shingles.load(path) for path in shingles]).save(out / SHINGLES_FILE)
        _copy_rounding(parts, out, head)
        if first.gates:
            gates = Gates.load(parts[0].folder, first.fingerprint)
            if gates is None or gates.weights.fingerprint != first.gates:
                raise ArtefactError(f"{parts[0].name} lacks its {GATES_FILE}, or it is damaged; run its command again")
            gates.save(out, head.fingerprint)
        progress.start("merging", len(samples))
        found: dict[int, tuple[Statistics, float]] = {}
        for part in parts:
            for number, (statistics, seconds) in part.statistics().items():
                write_sample(out, number, statistics, head.owner, seconds)
                found[number] = statistics, seconds
                progress.step(part.shard.name)
        progress.done()
        skipped = tuple(number for number in sorted(found) if not found[number][0].finite)
        check_skipped(skipped, calibration, len(calibration))
        total = sum(found[number][1] for number in sorted(found))
        head = replace(head, skipped=skipped, seconds=round(total, 3))
        merge(out, head, samples, [found[number][0] for number in sorted(found)])
        return Profile.load(out)


def check_merge(folders: Sequence[str | Path], out: str | Path, *, overwrite: bool = False) -> dict[str, int]:
    """Checks that `merge_shards` could put shards together; nothing is written.

    Returns the numbers of `shards`, and of `samples` and `validation_samples` in all of them.

    Raises:
        MoaCompressError: as `merge_shards`.
    """
    parts, calibration, validation = _checked(folders, Path(out))
    first = parts[0].head
    if not overwrite:
        _check_statistics(first, Path(out))
    check_place(Path(out), first.request, overwrite)
    for part in parts:
        part.statistics()
    return {"shards": len(parts), "samples": len(calibration), "validation_samples": len(validation)}


def _checked(folders: Sequence[str | Path], out: Path) -> tuple[list[_Part], dict[int, Sample], dict[int, Sample]]:
    """Returns the shards in folders, and their calibration and validation samples by number."""
    check_writable(out)
    parts = _parts([Path(folder) for folder in folders], out)
    check_no_link(*(part.folder / ANSWERS_FILE for part in parts))  # their bytes are copied
    _check_alike(parts)
    _check_whole(parts, [part.shard.calibration for part in parts], parts[0].shard.totals[0], "calibration")
    _check_whole(parts, [part.shard.validation for part in parts], parts[0].shard.totals[1], "validation")
    calibration, validation = dict[int, Sample](), dict[int, Sample]()
    for part in parts:
        calibration |= part.samples(CALIBRATION_FILE, part.head.calibration_fingerprint, part.shard.calibration)
        validation |= part.samples(VALIDATION_FILE, part.head.validation_fingerprint, part.shard.validation)
    return parts, calibration, validation


def _check_statistics(head: Manifest, out: Path) -> None:
    """Refuses shards that lack statistics which a profile of the same request in `out` has.

    Raises:
        ArtefactError: they do, or the profile there cannot be read. Nothing of it is touched.
    """
    there = begun_profile(out)
    if there is None or there.request != head.request:
        return
    lacking = sorted(with_recorded(head, there).array_shapes.keys() - head.array_shapes.keys())
    if lacking:
        raise ArtefactError(
            f"{out} holds a profile with statistics that the shards lack ({', '.join(lacking)}); make them with these too, "
            "merge into another folder, or pass --overwrite"
        )


def _parts(folders: Sequence[Path], out: Path) -> list[_Part]:
    """Returns the shards in folders, ordered by what they hold."""
    if not folders:
        raise UsageError("no shards given; name the folders of all of them")
    real = [folder.resolve() for folder in folders]
    twice = [folder for number, folder in enumerate(folders) if real[number] in (*real[:number], out.resolve())]
    if twice:
        raise UsageError(
            f"{twice[0]} is given twice, or is where the profile goes; name each shard once, and another --out"
        )
    parts = []
    for folder in folders:
        head = Manifest.read(folder)
        if head.shard is None:
            raise ArtefactError(
                f"{folder} is no shard but a profile of all samples; only what --shard made can be merged"
            )
        parts.append(_Part(folder, head, head.shard))
    return sorted(parts, key=lambda part: part.shard.calibration)


def _check_alike(parts: Sequence[_Part]) -> None:
    """Refuses shards of other weights, another recipe, other texts or other gates."""
    first = parts[0]
    for part in parts[1:]:
        ours, theirs = first.head, part.head
        if ours.shape.weights_fingerprint != theirs.shape.weights_fingerprint:
            what = f"weights (fingerprint {theirs.shape.weights_fingerprint}, not {ours.shape.weights_fingerprint})"
        elif ours.request != theirs.request or ours.array_shapes != theirs.array_shapes:
            what = f"request: {_difference(ours, theirs)}"
        elif (ours.wording, first.shard.totals) != (theirs.wording, part.shard.totals):
            what = "wording of prompts or number of samples; make all shards with one version of moacompress"
        elif ours.gates != theirs.gates:
            what = (
                f"gates (fingerprint {theirs.gates or 'none yet'}, not {ours.gates or 'none yet'}); finish all shards, on "
                "processors of one kind, or profile under torchrun, which trains gates once"
            )
        elif ours.centres != theirs.centres:
            what = "mean keys; finish all shards, on processors of one kind"
        else:
            continue
        raise ArtefactError(f"{part.name} has another {what}, than {first.name}; all shards are to be of one profile")


def _difference(ours: Manifest, theirs: Manifest) -> str:
    """Returns in which keys of their recipes two manifests differ."""
    one, other = (_flat(head.recipe.resolved()) for head in (ours, theirs))
    names = [name for name in sorted(one | other) if one.get(name) != other.get(name)]
    if not names:
        return "its data files or the dtype it was computed in differ"
    shown = (f"{name} is {other.get(name)!r}, not {one.get(name)!r}" for name in names[:3])
    return "; ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Returns nested mappings as one, with dots in its names."""
    if not isinstance(values, dict):
        return {name: values}
    return {
        key: value for part, inner in values.items() for key, value in _flat(inner, f"{name}.{part}".strip(".")).items()
    }


def _check_whole(parts: Sequence[_Part], numbers: Sequence[Sequence[int]], total: int, name: str) -> None:
    """Refuses shards that overlap, or that lack samples of a split: `numbers` of each shard are to be `total` together."""
    holder: dict[int, _Part] = {}
    for part, own in zip(parts, numbers, strict=True):
        for number in own:
            if number in holder:
                raise ArtefactError(
                    f"{part.name} and {holder[number].name} both have {name} sample {number}; give each shard once, and shards "
                    "of one count"
                )
            holder[number] = part
    missing = total - len(holder)
    if missing:
        first = next(number for number in range(total) if number not in holder)
        there, count = {part.shard.number for part in parts}, max(part.shard.count for part in parts)
        lacking = [f"{number}/{count}" for number in range(1, count + 1) if number not in there]
        shards = (
            f"; give shard {', '.join(lacking[:5])}{' and more' if len(lacking) > 5 else ''} too" if lacking else ""
        )
        raise ArtefactError(f"{missing} of {total} {name} samples are in no shard, such as {first}{shards}")


def _copy_answers(parts: Sequence[_Part], out: Path) -> None:
    """Writes the answers of all shards into one file: samples that are asked for later need not be answered again."""
    texts = [path.read_bytes() for path in (part.folder / ANSWERS_FILE for part in parts) if path.is_file()]
    if texts:
        write_bytes(out / ANSWERS_FILE, b"".join(text if text.endswith(b"\n") else text + b"\n" for text in texts))


def _copy_rounding(parts: Sequence[_Part], out: Path, head: Manifest) -> None:
    """Writes what rounded weights lose, from the validation samples of all shards, where they say it."""
    kls: dict[int, float] = {}
    for part in parts:
        found = rounding_of(part.folder, head.shape.weights_fingerprint)
        of_samples = found.get("of_samples") if found is not None else None
        if not isinstance(of_samples, list) or len(of_samples) != len(part.shard.validation):
            return
        kls |= dict(zip(part.shard.validation, map(float, of_samples), strict=True))
    write_rounding(out, head.recipe, head.shape.weights_fingerprint, [kls[number] for number in sorted(kls)])
