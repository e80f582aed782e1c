"""What a profile is of, as `profile.json` says it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic.dataclasses import dataclass

from moacompress.calibration.data.samples import Sample, fingerprint_ordered, fingerprint_samples
from moacompress.calibration.profile.shard import Shard
from moacompress.calibration.profile.statistics import array_shapes
from moacompress.core.artefact_names import MANIFEST_FILE, PROFILE_FOLDER
from moacompress.core.errors import ArtefactError, MoaCompressError, one_line
from moacompress.core.files import BrokenJson, fingerprint, read_json, write_json
from moacompress.core.version import own_version
from moacompress.recipe import Recipe
from moacompress.rules.key_centres import Centres, from_texts, to_texts
from moacompress.rules.model_shape import ModelShape
from moacompress.rules.plan_form import check_candidates, read_shape
from moacompress.rules.rule import Rule
from moacompress.rules.untrusted import WRONG_FORM

FORMAT = "moacompress-profile"
VERSION = 3
MADE_BY = "moacompress_version"
"""Key of the version of moacompress that wrote a manifest; no fingerprint has it."""

T = TypeVar("T")


class DamagedProfile(ArtefactError):
    """A file of a profile that is not as it was written; the same profile command repairs it."""


def damaged(path: Path, why: str) -> DamagedProfile:
    """Returns the error for a file of a profile that is not as it was written."""
    return DamagedProfile(f"profile file {path} is damaged: {why}; run the same profile command again to repair it")


def _read_by(read: Callable[[Any], T], kind: type[T]) -> PlainValidator:
    return PlainValidator(lambda value: value if isinstance(value, kind) else read(value))


def _centres(value: Any, info: ValidationInfo) -> Centres:
    if isinstance(value, tuple):
        return value
    shape = info.data["shape"]
    return from_texts(value, shape.layers, shape.kv_heads, shape.head_dim)


Rules = Annotated[
    tuple[Rule, ...],
    PlainValidator(lambda value: value if isinstance(value, tuple) else tuple(map(Rule.from_list, value))),
    PlainSerializer(lambda rules: [rule.to_list() for rule in rules]),
]


@dataclass(frozen=True, config=ConfigDict(arbitrary_types_allowed=True))
class Manifest:
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
        gates: fingerprint of the gates that rules which select choose by; empty until they are there.
        centres: mean keys that keys in codes lie less, see `Plan.centres`; none until they are known, or without formats.
        wording: digest of what prompts said when it was begun.
        shard: the part of the samples that is here; None for all of them.
    """

    source: str
    shape: Annotated[ModelShape, _read_by(read_shape, ModelShape), PlainSerializer(ModelShape.to_dict)]
    rules: Rules
    recipe: Annotated[
        Recipe, _read_by(lambda data: Recipe.from_dict(data, "its recipe"), Recipe), PlainSerializer(Recipe.resolved)
    ]
    request: str
    fingerprint: str = ""
    calibration_fingerprint: str = ""
    validation_fingerprint: str = ""
    skipped: Annotated[tuple[int, ...], BeforeValidator(lambda value: tuple(map(int, value)))] = ()
    digest: str = ""
    seconds: float = 0.0
    complete: Annotated[bool, BeforeValidator(lambda value: value is True)] = False
    gates: str = ""
    centres: Annotated[Centres, PlainValidator(_centres), PlainSerializer(to_texts)] = ()
    wording: str = ""
    shard: Shard | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Profiled lengths in tokens, ascending."""
        return self.recipe.calibration.lengths

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every array of a sample by its name, of those that are alike at all lengths."""
        return array_shapes(self.recipe.profile, self.shape, len(self.rules))

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
        data = _MANIFEST.dump_python(self, mode="json")
        complete, shard = data.pop("complete"), data.pop("shard")
        data |= {"lengths": self.lengths, "min_window": self.recipe.profile.min_window}
        data |= {} if shard is None else {"shard": shard}
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
        data = read_head(path)
        made_by = f"moacompress {data[MADE_BY]}" if data.get(MADE_BY) else "an unnamed version of moacompress"
        version = data.get("version")
        if type(version) is not int or version > VERSION:
            raise ArtefactError(
                f"{path} was made by {made_by} and has version {version}, this moacompress reads up to {VERSION}; upgrade "
                "moacompress, or profile into another folder or with --overwrite"
            )
        try:
            missing = [field.name for field in fields(Manifest) if field.name not in data and field.name != "shard"]
            if missing:
                raise ValueError(f"no {missing[0]!r}")
            found = _MANIFEST.validate_python(data)
            check_candidates(found.shape, found.recipe.profile.min_window, found.rules)
        except (*WRONG_FORM, MoaCompressError) as error:
            why = error.errors()[0]["msg"] if isinstance(error, ValidationError) else one_line(error)
            raise ArtefactError(
                f"{path} was made by {made_by} and moacompress {own_version()} cannot read it: {why}; use the version "
                "that made it, or profile into another folder or with --overwrite"
            ) from error
        return found


_MANIFEST = TypeAdapter(Manifest)


def is_profile(folder: Path) -> bool:
    """Whether a folder is that of a profile: of any version, finished or not, and also where its manifest is damaged."""
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return False
    try:
        read_head(path)
    except DamagedProfile:
        return True
    except ArtefactError:
        return False
    return True


def read_head(path: Path) -> dict[str, Any]:
    """Reads a manifest of any version."""
    try:
        data = read_json(path, "profile")
    except BrokenJson as error:
        raise damaged(path, str(error)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ArtefactError(f'{path} is not that of a profile: its "format" is not {FORMAT!r}; choose another folder')
    return data


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
