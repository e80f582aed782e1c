"""The folder of a profile: where one goes, what an earlier run left there, and how it is emptied."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from moacompress.calibration.profile.manifest import DamagedProfile, Manifest, read_head, with_recorded
from moacompress.core.artefact_names import (
    CALIBRATION_FILE,
    MANIFEST_FILE,
    SAMPLES_FOLDER,
    TEMPORARY,
    VALIDATION_FILE,
    holder_of_folder,
    of_profile,
    of_samples,
)
from moacompress.core.errors import ArtefactError
from moacompress.core.files import check_no_link, remove, sweep_files, write_text
from moacompress.recipe import Recipe


def recipe_in(folder: Path, model: str | None) -> Recipe | None:
    """Returns the recipe of what was profiled in a folder; None where nothing was, another model, or it is damaged.

    Without `model`, which is to be profiled, the one in the recipe is.

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


def _read(folder: Path) -> Manifest | None:
    """Returns the manifest in a folder; None where there is none, or one that is damaged and can be made again."""
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

    This process is to be the lock holder of the folder. With `overwrite` all that a profile has in it is removed first.

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
    for path in of_samples(folder):
        sweep_files(path)
    for path in (folder / SAMPLES_FOLDER).glob(f".*.safetensors.*{TEMPORARY}"):  # a killed run was just writing it
        path.unlink(missing_ok=True)
    found = _same_request(folder, manifest, overwrite)
    if found is None:
        _remove_all_but_the_manifest(folder)
        found = manifest
    else:
        recipe = with_recorded(manifest, found).recipe
        if (found.recipe, found.source) == (recipe, manifest.source):
            return found
        wanted = replace(found, recipe=recipe, source=manifest.source)
        found = replace(wanted, complete=found.complete and wanted.array_shapes == found.array_shapes)
    found.write(folder)
    return found


def _same_request(folder: Path, manifest: Manifest, overwrite: bool) -> Manifest | None:
    """Returns the manifest to resume with; None if the folder is to be made empty."""
    if not _holds_profile(folder):
        return None
    if overwrite:
        with suppress(DamagedProfile):
            read_head(folder / MANIFEST_FILE)
        return None
    found = _read(folder)
    if found is None:
        # Nothing in it can be trusted but files that carry this profile's own fingerprint, and those are checked.
        remove(folder / name for name in (CALIBRATION_FILE, VALIDATION_FILE))
        return replace(manifest, seconds=0.0)
    if found.request != manifest.request:
        if _has_begun(folder):
            raise _other_request(folder, found, manifest.request)
        return None  # the other request failed before anything was saved
    if found.shard != manifest.shard:
        here, wanted = ("all samples" if one.shard is None else f"shard {one.shard.name}" for one in (found, manifest))
        raise ArtefactError(
            f"{folder} holds {here} of this profile, not {wanted}; choose another folder or pass --overwrite"
        )
    return found if _has_begun(folder) else replace(found, wording=manifest.wording)


def clear_profile(folder: Path) -> None:
    """Removes the profile from a folder that this process owns, and leaves the folder's other files alone.

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
    Manifest(found.source, found.shape, found.rules, found.recipe, found.request).write(folder)


def _remove_all_but_the_manifest(folder: Path) -> None:
    """Removes a profile's files but for the one without which the folder would be that of somebody else."""
    remove([path for path in of_profile(folder) if path != folder / MANIFEST_FILE])


def check_place(folder: Path, request: str, overwrite: bool) -> None:
    """Refuses a folder that the profile of a request cannot go to; nothing in it is touched.

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
