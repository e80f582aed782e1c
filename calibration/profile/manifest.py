"""What a profile is of, as `profile.json` says it, and the folder that a run begins or takes up again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moacompress.calibration.data.samples import Sample, fingerprint_ordered, fingerprint_samples
from moacompress.calibration.profile.shard import Shard
from moacompress.calibration.profile.statistics import SIDES
from moacompress.core.artefact_names import (
    CALIBRATION_FILE,
    INFLUENCE_FILE,
    MANIFEST_FILE,
    PROFILE_FOLDER,
    SAMPLES_FOLDER,
    SHINGLES_FILE,
    TEMPORARY,
    VALIDATION_FILE,
    holder_of_folder,
    of_profile,
)
from moacompress.core.errors import ArtefactError, MoaCompressError, one_line
from moacompress.core.files import (
    BrokenJson,
    check_no_link,
    fingerprint,
    read_json,
    remove,
    sweep_files,
    write_json,
    write_text,
)
from moacompress.core.version import own_version
from moacompress.recipe import Recipe
from moacompress.recipe_sections import INFLUENCE, ProfileRecipe
from moacompress.rules.key_centres import Centres, from_texts, to_texts
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan_form import check_candidates, read_shape
from moacompress.rules.rule import SINKS, Rule
from moacompress.rules.untrusted import WRONG_FORM

DISTANCE_BINS = 18
"""Bins of the distance histograms: 0, 1, 2-3, 4-7, ... tokens; the last begins at 65,536."""
FORMAT = "moacompress-profile"
VERSION = 2
MADE_BY = "moacompress_version"
"""Key of the version of moacompress that wrote a manifest; no fingerprint has it."""


class DamagedProfile(ArtefactError):
    """A file of a profile that is not as it was written; the same profile command repairs it."""


@dataclass(frozen=True)
class Manifest:
    """What `profile.json` holds.

    Attributes:
        source: MODEL, as it can be loaded again.
        shape: the model's shape.
        rules: the candidate rules.
        recipe: the resolved recipe.
        request: fingerprint of what was asked for, known before any sample is made.
        around: key of the plan that is profiled around; empty for the dense model.
        fingerprint: fingerprint of the request and the calibration samples; empty until they are made.
        calibration_fingerprint: of the calibration samples' token ids; empty until they are made.
        validation_fingerprint: of the validation samples' token ids; empty until they are made.
        skipped: indices of the samples left out because a number was not finite.
        digest: of the statistics in `influence.safetensors`.
        seconds: time that the samples took.
        complete: whether everything is there.
        gates: fingerprint of the gates that rules which select choose by; empty until they are there.
        centres: mean keys that keys in codes lie less, see `Plan.centres`; none until they are known, or without formats.
        wording: digest of what prompts said when it was begun.
        shard: the part of the samples that is here; None for all of them.
    """

    source: str
    shape: ModelShape
    rules: tuple[Rule, ...]
    recipe: Recipe
    request: str
    around: str = ""
    fingerprint: str = ""
    calibration_fingerprint: str = ""
    validation_fingerprint: str = ""
    skipped: tuple[int, ...] = ()
    digest: str = ""
    seconds: float = 0.0
    complete: bool = False
    gates: str = ""
    centres: Centres = ()
    wording: str = ""
    shard: Shard | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Profiled lengths in tokens, ascending."""
        return self.recipe.calibration.lengths

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every array of a sample by its name, of those that are alike at all lengths."""
        return array_shapes(self.recipe.profile, self.shape, len(self.rules), around=bool(self.around))

    @property
    def has_gates(self) -> bool:
        """Whether some of its rules select."""
        return any(rule.selects for rule in self.rules)

    def numbered(self, samples: Sequence[Sample]) -> dict[int, Sample]:
        """Returns the calibration samples that are here by their number among those of the profile."""
        return dict(zip(range(len(samples)) if self.shard is None else self.shard.calibration, samples, strict=True))

    def of_samples(self, calibration: Sequence[Sample], validation: Sequence[Sample]) -> Manifest:
        """Returns the same with the fingerprints of the samples that are here; it is not complete yet."""
        parts = self.request, self.wording, fingerprint_ordered(calibration)
        return replace(
            self,
            fingerprint=hashlib.sha256(" ".join(filter(None, parts)).encode()).hexdigest()[:16],
            calibration_fingerprint=fingerprint_samples(calibration),
            validation_fingerprint=fingerprint_samples(validation),
            complete=False,
        )

    @property
    def owner(self) -> str:
        """What files of samples are marked with."""
        centres = fingerprint(to_texts(self.centres)) if self.centres else ""
        return " ".join(filter(None, (self.fingerprint, self.gates, centres)))

    def write(self, folder: Path) -> None:
        """Writes `profile.json`, atomically."""
        data = {
            **self.__dict__,
            "shape": self.shape.to_dict(),
            "rules": [rule.to_list() for rule in self.rules],
            "centres": to_texts(self.centres),
            "recipe": self.recipe.resolved(),
            "lengths": self.lengths,
            "min_window": self.recipe.profile.min_window,
        }
        complete, shard = data.pop("complete"), data.pop("shard")
        if shard is not None:
            data["shard"] = shard.to_dict()
        marks = {"format": FORMAT, "version": VERSION, MADE_BY: own_version()}
        write_json(folder / MANIFEST_FILE, {**marks, **data, "complete": complete})

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Reads `profile.json`.

        Raises:
            DamagedProfile: no JSON.
            ArtefactError: missing, cannot be opened, or sound JSON that this version does not accept.
        """
        path = folder / MANIFEST_FILE
        if not path.exists():
            if not folder.exists():
                raise ArtefactError(f"there is no profile {folder}; make one with `moacompress profile`")
            inside = folder / PROFILE_FOLDER
            hint = f"give {inside}" if is_profile(inside) else "make one with `moacompress profile`"
            raise ArtefactError(f"{folder} is not a profile: it has no {MANIFEST_FILE}; {hint}")
        data = _json(path)
        try:
            names = (
                "source",
                "request",
                "around",
                "fingerprint",
                "calibration_fingerprint",
                "validation_fingerprint",
                "digest",
                "gates",
                "wording",
            )
            model, recipe = read_shape(data["shape"]), Recipe.from_dict(data["recipe"], "its recipe")
            rules = tuple(Rule.from_list(rule) for rule in data["rules"])
            check_candidates(model, recipe.profile.min_window, rules)
            return Manifest(
                shape=model,
                rules=rules,
                recipe=recipe,
                skipped=tuple(map(int, data["skipped"])),
                seconds=float(data["seconds"]),
                complete=data["complete"] is True,
                centres=from_texts(data["centres"], model.layers, model.kv_heads, model.head_dim),
                shard=Shard.from_dict(data["shard"]) if "shard" in data else None,
                **{name: str(data[name]) for name in names},
            )
        except (*WRONG_FORM, MoaCompressError) as error:
            why = f"no {error}" if isinstance(error, KeyError) else one_line(error)
            raise ArtefactError(
                f"{path} was made by {_maker(data)} and moacompress {own_version()} cannot read it: {why}; use the version "
                "that made it, or profile into another folder or with --overwrite"
            ) from error


def request_fingerprint(
    shape: ModelShape,
    rules: Sequence[Rule],
    recipe: Recipe,
    files: dict[str, str],
    around: str = "",
    computes_in: str | None = None,
) -> str:
    """Returns a hash of all that decides a profile's numbers and is known before its samples are made.

    Choices that only matter later (estimator, search, evaluation) are not in it, nor is which statistics are recorded.

    Args:
        shape: the model, with its weights fingerprint.
        rules: the candidate rules.
        recipe: the run.
        files: digest of every local file that samples are made of.
        around: key of the plan that is profiled around; empty for the dense model.
        computes_in: the dtype that the model computes in; by default its own.
    """
    other = computes_in not in (None, shape.dtype)
    trains = not around and any(rule.selects for rule in rules)  # around a plan its own gates select
    return fingerprint(
        {
            "around": around,
            "version": VERSION,
            "model": shape.to_dict(),
            "rules": [rule.to_list() for rule in rules],
            "min_window": recipe.profile.min_window,
            "draws": recipe.profile.draws,
            "seed": recipe.seed,
            "calibration": recipe.calibration.hashed(),
            "files": files,
            **({"computes_in": computes_in} if other else {}),
            **({} if recipe.profile.centres else {"centres": False}),
            **({"gate_samples": recipe.profile.gate_samples} if trains else {}),
            **({"scorer": recipe.profile.scorer} if trains and recipe.profile.scorer != INFLUENCE else {}),
        }
    )


def recipe_in(folder: Path, model: str | None) -> Recipe | None:
    """Returns the recipe of what was profiled in a folder; None where nothing was, another model, or it is damaged.

    Args:
        folder: of a profile, or to become one.
        model: that is to be profiled; None for the one in the recipe.

    Raises:
        ArtefactError: a profile that this version does not accept, or something else of that name.
    """
    found = begun_profile(folder)
    if found is None:
        return None
    return found.recipe if model is None or found.source in (model, str(Path(model).resolve())) else None


def begun_profile(folder: Path) -> Manifest | None:
    """Returns the manifest of a profile of which something was saved; None where nothing was, or it is damaged.

    Raises:
        ArtefactError: a profile that this version does not accept, or something else of that name.
    """
    return _read(folder) if _has_begun(folder) else None


def is_profile(folder: Path) -> bool:
    """Whether a folder is that of a profile: of any version, finished or not, and also where its manifest is damaged."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return False
    try:
        _head(path)
    except DamagedProfile:
        return True
    except ArtefactError:
        return False
    return True


def _read(folder: Path) -> Manifest | None:
    """Returns the manifest in a folder; None where there is none, or one that is damaged and can be made again.

    Raises:
        ArtefactError: sound JSON that this version does not accept, or it cannot be opened.
    """
    if not (folder / MANIFEST_FILE).is_file():
        return None
    try:
        return Manifest.read(folder)
    except DamagedProfile:
        return None


def _has_begun(folder: Path) -> bool:
    """Whether something was saved in a folder, and not only asked for."""
    return any(folder.rglob("*.safetensors"))


def prepare(folder: Path, manifest: Manifest, overwrite: bool) -> Manifest:
    """Makes the folder of a profile, or finds what an earlier run of the same request left there.

    This process is to be the lock holder of the folder.

    Args:
        folder: where the profile goes.
        manifest: what is asked for.
        overwrite: start from scratch: of what is in the folder, all that a profile has is removed.

    Returns:
        The manifest on disk, with the recipe of this run and where it found the model. It is not complete where this run asks
        for statistics that the earlier one did not record.

    Raises:
        ArtefactError: the folder holds something else, or a profile that is of another request or that this version does not
            accept, and `overwrite` is False; nothing in it is touched. Or its samples are a link, or it cannot be written.
    """
    if not overwrite:
        _read(folder)
    check_no_link(folder / SAMPLES_FOLDER)
    _sweep(folder)
    found = _same_request(folder, manifest, overwrite)
    if found is None:
        _remove_all_but_the_manifest(folder)
        found = manifest
    else:
        recipe = with_recorded(manifest, found).recipe
        if (found.recipe, found.source) == (recipe, manifest.source):
            return found
        wanted = replace(found, recipe=recipe, source=manifest.source)
        same = wanted.array_shapes == found.array_shapes
        found = replace(wanted, complete=found.complete and same)
    found.write(folder)
    return found


def clear_profile(folder: Path) -> None:
    """Removes the profile from a folder that this process owns, and the folder's other files are left alone.

    Where there are some, the manifest of a profile stays that has just begun: the folder is known by it.

    Raises:
        ArtefactError: something cannot be removed, or written.
    """
    _remove_all_but_the_manifest(folder)
    manifest = folder / MANIFEST_FILE
    if set(folder.iterdir()) <= {manifest, holder_of_folder(folder)}:
        remove([manifest])
        return
    try:
        found = Manifest.read(folder)
    except ArtefactError:  # damaged, or of another version
        write_text(manifest, "")  # which is repaired when a profile is made
        return
    Manifest(found.source, found.shape, found.rules, found.recipe, found.request, found.around).write(folder)


def _remove_all_but_the_manifest(folder: Path) -> None:
    """Removes a profile's files but for the one without which the folder would be that of somebody else."""
    remove([path for path in of_profile(folder) if path != folder / MANIFEST_FILE])


def with_recorded(manifest: Manifest, earlier: Manifest) -> Manifest:
    """Returns a manifest with the statistics that an earlier run recorded beside those that it asks for."""
    ours, theirs = manifest.recipe.profile, earlier.recipe.profile
    recipe = manifest.recipe.override(
        profile__baselines=ours.baselines or theirs.baselines,
        profile__heads=ours.heads or theirs.heads,
        profile__anchors=max(ours.anchors, theirs.anchors),
        profile__formats=[*ours.formats, *theirs.formats],
    )
    return replace(manifest, recipe=recipe)


def _same_request(folder: Path, manifest: Manifest, overwrite: bool) -> Manifest | None:
    """Returns the manifest to resume with; None if the folder is to be made empty."""
    if not _holds_profile(folder):
        return None
    if overwrite:
        with suppress(DamagedProfile):
            _head(folder / MANIFEST_FILE)
        return None
    found = _read(folder)
    if found is None:
        # Nothing in it can be trusted but files that carry this profile's own fingerprint, and those are checked.
        _forget_samples(folder)
        return replace(manifest, seconds=0.0)
    if found.request == manifest.request:
        _check_shard(folder, found, manifest)
        return found if _has_begun(folder) else replace(found, wording=manifest.wording)
    if not _has_begun(folder):
        return None  # the other request failed before anything was saved
    raise _other_request(folder, found, manifest.request)


def check_place(folder: Path, request: str, overwrite: bool) -> None:
    """Refuses a folder that a profile cannot go to; nothing in it is touched.

    Args:
        folder: where the profile would go.
        request: of the profile.
        overwrite: an earlier profile there would be removed.

    Raises:
        ArtefactError: the folder holds something else, or another profile and `overwrite` is False.
    """
    if not _holds_profile(folder) or overwrite:
        return
    found = _read(folder)
    if found is not None and found.request != request and _has_begun(folder):
        raise _other_request(folder, found, request)


def _holds_profile(folder: Path) -> bool:
    """Returns whether a folder holds a profile, begun or finished; False where it is empty or not there.

    Raises:
        ArtefactError: it holds something else, which not even --overwrite removes: a mistyped folder must not cost files.
    """
    if not folder.exists() or (folder.is_dir() and not set(folder.iterdir()) - {holder_of_folder(folder)}):
        return False
    if not (folder / MANIFEST_FILE).is_file():
        raise ArtefactError(f"{folder} exists already and is not a profile; choose another folder")
    return True


def _other_request(folder: Path, found: Manifest, request: str) -> ArtefactError:
    return ArtefactError(
        f"{folder} holds a profile of another model or recipe ({found.source}, request {found.request}, this "
        f"one is {request}); choose another folder or pass --overwrite"
    )


def _check_shard(folder: Path, found: Manifest, manifest: Manifest) -> None:
    """Refuses a folder that has other samples of the same profile."""
    here, wanted = ("all samples" if one.shard is None else f"shard {one.shard.name}" for one in (found, manifest))
    if found.shard != manifest.shard:
        raise ArtefactError(
            f"{folder} holds {here} of this profile, not {wanted}; choose another folder or pass --overwrite"
        )


def _head(path: Path) -> dict[str, Any]:
    """Reads a manifest of any version."""
    try:
        data = read_json(path, "profile")
    except BrokenJson as error:
        raise damaged(path, str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtefactError(f'{path} is not that of a profile: its "format" is not {FORMAT!r}; choose another folder')
    return data


def _json(path: Path) -> dict[str, Any]:
    data = _head(path)
    version = data.get("version")
    if type(version) is not int or version > VERSION:
        raise ArtefactError(
            f"{path} was made by {_maker(data)} and has version {version}, this moacompress reads up to {VERSION}; upgrade "
            "moacompress, or profile into another folder or with --overwrite"
        )
    return data


def _maker(data: dict[str, Any]) -> str:
    version = data.get(MADE_BY)
    return f"moacompress {version}" if version else "an unnamed version of moacompress"


def _sweep(folder: Path) -> None:
    """Removes what a killed run was just writing aside."""
    for name in (MANIFEST_FILE, CALIBRATION_FILE, VALIDATION_FILE, INFLUENCE_FILE, SHINGLES_FILE):
        sweep_files(folder / name)
    sweep_samples(folder)


def sweep_samples(folder: Path) -> None:
    """Removes samples that a killed run was just writing aside; only the lock holder of the folder may do that."""
    for path in (folder / SAMPLES_FOLDER).glob(f".*.safetensors.*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _forget_samples(folder: Path) -> None:
    remove(folder / name for name in (CALIBRATION_FILE, VALIDATION_FILE))


def damaged(path: Path, why: str) -> DamagedProfile:
    """Returns the error for a file of a profile that is not as it was written."""
    return DamagedProfile(f"profile file {path} is damaged: {why}; run the same profile command again to repair it")


def array_shapes(chosen: ProfileRecipe, shape: ModelShape, rules: int, around: bool) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array of a sample's statistics.

    Args:
        chosen: what is recorded.
        shape: the model.
        rules: number of the rules.
        around: whether the profile is around a plan.
    """
    size = (shape.layers, shape.kv_heads, rules)
    names = ["squares"]
    names += ["first"] if around else []
    names += ["moa", "mass"] if chosen.baselines else []
    heads = {"distance": (*size[:2], DISTANCE_BINS), "sink_mass": (*size[:2], len(SINKS)), "entropy": size[:2]}
    pairs = size[0], chosen.anchors, size[1], size[1]
    formats = (*size[:2], 1 + len(chosen.formats))
    parts = ("squares", "first") if around else ("squares",)
    return {
        "total": (chosen.draws, *size),
        **dict.fromkeys(names, size),
        **{f"{side}_{part}": formats for side in (SIDES if chosen.formats else ()) for part in parts},
        **{f"{side}_total": (chosen.draws, *formats) for side in (SIDES if chosen.formats else ())},
        **({"harm": (1,)} if around else {}),
        **(heads if chosen.heads else {}),
        **dict.fromkeys(("copy_squares", "copy_cosine") if chosen.anchors else (), pairs),
    }
