"""The request of a heal: the compressed model, the dense one and the profile, loaded and compared before it begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moacompress.calibration.data.samples import fingerprint_samples
from moacompress.calibration.profile.store import Profile
from moacompress.core.errors import ModelError, UsageError
from moacompress.core.files import digest_files, fingerprint
from moacompress.core.ranks import world_size
from moacompress.healer.trained_weights import LEARNING_RATES, check_installed, check_trainable, trained_weights
from moacompress.healer.training_data import heal_lengths
from moacompress.kernels.weight_blocks import WEIGHT_TYPES
from moacompress.models.source import SourceModel, load_source
from moacompress.models.stored_plan import checkpoint_weights
from moacompress.models.weight_bytes import checkpoint_weight_bytes
from moacompress.recipe import Recipe
from moacompress.recipe_sections import HealRecipe
from moacompress.rules.formats import DTYPE_BYTES
from moacompress.rules.plan import Plan
from moacompress.runtime.checkpoint import Checkpoint, compressed_folder, load_checkpoint, profile_folder

HEAL_VERSION = 1
"""Part of what a heal is known by; raised where the same request would give other weights."""
DENSE_GIVEN = (
    "{folder} is a dense model: it has lost nothing that could be healed; compress it first (`moacompress compress {folder} "
    "--budget 25% -o OUT`) and heal OUT"
)


@dataclass(frozen=True)
class HealRequest:
    """What is asked for, and what it is asked of."""

    checkpoint: Checkpoint  # its weights are frozen and of the dtype that is trained in
    teacher: SourceModel  # the dense model
    profile: Profile  # of the dense model
    recipe: Recipe  # `heal`, `seed`, `device` and `calibration.text` count
    compute: str  # dtype, "float32" or "bfloat16"
    key: str  # fingerprint of all that decides the result but for how long it may take
    types: Mapping[str, str]  # layers whose weights are in blocks, with the names of the types
    trust_remote_code: bool = False

    @property
    def heal(self) -> HealRecipe:
        """The section of the recipe."""
        return self.recipe.heal

    @property
    def plan(self) -> Plan:
        """The plan of the checkpoint."""
        return self.checkpoint.plan

    @property
    def learning_rate(self) -> float:
        """The largest."""
        return self.heal.lr or LEARNING_RATES[self.heal.train]

    @property
    def longest(self) -> int:
        """Tokens of the longest training samples."""
        return max(heal_lengths(self.profile, self.recipe))

    @property
    def accumulation(self) -> int:
        """Samples that each process takes for a step."""
        return max(1, round(self.heal.batch / self.longest / world_size()))

    @property
    def places(self) -> list[str | Path]:
        """What is read, where these are files or folders."""
        named = self.checkpoint.folder, self.teacher.source, self.profile.path, self.recipe.calibration.text
        return [name for name in named if name and Path(name).exists()]

    def weight_bytes(self, model: Any) -> dict[str, dict[str, int]] | None:
        """Returns the bytes of the checkpoint's weights by type, `before` and `after`; None where none are in blocks.

        What is trained is stored as numbers, if a step is better than the start. `model` is as `make_trainable` returned it.
        """
        if not self.types:
            return None
        before, dtype = checkpoint_weight_bytes(self.checkpoint.folder), self.plan.model.dtype
        after = dict(before)
        for weight in trained_weights(model):
            kind = self.types.get(weight.name.removesuffix(".weight"))
            if kind is not None:
                rows, inputs = weight.shape
                after[kind] -= rows * WEIGHT_TYPES[kind].row_bytes(inputs)
                after[dtype] = after.get(dtype, 0) + rows * inputs * DTYPE_BYTES[dtype]
        return {"before": before, "after": {kind: size for kind, size in after.items() if size}}

    @staticmethod
    def of(
        target: str | Path,
        profile: str | Path | Profile | None,
        teacher: str | SourceModel | None,
        recipe: Recipe,
        trust_remote_code: bool = False,
    ) -> HealRequest:
        """Loads and compares all that is asked for.

        Raises:
            UsageError: not a compressed model, no profile, nothing to train, a missing package, float16, a GPU that is not the
                first, or all weights of a checkpoint that has some in blocks.
            ModelError: the dense model is not there, or not the one that was profiled.
            PlanError: the dense model, or the profile, is not what the plan was made for.
        """
        check_installed(recipe.heal.train)
        if recipe.device.startswith("cuda:") and recipe.device != "cuda:0" and world_size() == 1:
            number = recipe.device.removeprefix("cuda:")
            raise UsageError(
                f"heal cannot train on {recipe.device}: transformers' Trainer takes the first GPU that it sees; set "
                f"CUDA_VISIBLE_DEVICES={number} and give cuda"
            )
        folder = compressed_folder(Path(target), DENSE_GIVEN)
        types = checkpoint_weights(folder)
        if recipe.heal.train == "full" and types:
            raise UsageError(
                f"the weights of {folder} are in blocks of codes, and a heal of all of them would leave none; export the plan "
                "with --weights dense and heal that, or train LoRA (--train lora, of fewer layers with --modules)"
            )
        known = profile if isinstance(profile, Profile) else Profile.load(_profile_folder(folder, profile))
        compute = _compute_dtype(recipe)
        frozen = recipe.heal.train == "lora"
        dtype = compute if frozen else "float32"
        checkpoint = load_checkpoint(folder, dtype, recipe.device, trust_remote_code=trust_remote_code)
        checkpoint.model.requires_grad_(False)
        plan = checkpoint.plan
        check_trainable(plan, recipe.heal, checkpoint.model)
        source = _load_teacher(teacher, known, compute, recipe, trust_remote_code)
        plan.check_model(source.shape, weights=True)
        known.check_model(source, "heal")
        key = _key(checkpoint, known, recipe, compute)
        return HealRequest(checkpoint, source, known, recipe, compute, key, types, trust_remote_code)


def _profile_folder(folder: Path, given: str | Path | None) -> Path:
    path = profile_folder(folder, given)
    if path is None:
        raise UsageError(
            f"there is no profile beside {folder}, whose validation samples a heal is measured on; give one (--profile DIR)"
        )
    return path


def _compute_dtype(recipe: Recipe) -> str:
    """Returns what is computed in: on a CPU float32, where few are faster in bfloat16, elsewhere bfloat16 if not asked."""
    if recipe.dtype == "auto":
        return "float32" if recipe.device == "cpu" else "bfloat16"
    if recipe.dtype == "float16":
        raise UsageError("a heal cannot compute in float16, whose gradients underflow; choose bfloat16 or float32")
    return recipe.dtype


def _load_teacher(
    given: str | SourceModel | None, profile: Profile, compute: str, recipe: Recipe, trust_remote_code: bool
) -> SourceModel:
    if isinstance(given, SourceModel):
        return given
    name = given or profile.source
    if given is None and Path(name).is_absolute() and not Path(name).exists():
        raise ModelError(
            f"the dense model is not at {name} any more, where it was profiled; say where it is (--teacher)"
        )
    own = profile.recipe
    return load_source(
        name,
        dtype=compute,
        device=recipe.device,
        weights=own.weights,
        head_weights=own.head_weights,
        trust_remote_code=trust_remote_code,
    )


def _key(checkpoint: Checkpoint, profile: Profile, recipe: Recipe, compute: str) -> str:
    heal = {name: value for name, value in recipe.heal.hashed().items() if name != "max_minutes"}
    text = recipe.calibration.text
    return fingerprint(
        {
            "version": HEAL_VERSION,
            "plan": checkpoint.plan.key(),
            "weights": checkpoint.weights,
            "dtype": checkpoint.plan.model.dtype,
            "profile": profile.fingerprint,
            "validation": fingerprint_samples(profile.validation),
            "heal": heal,
            "text": None if text is None else digest_files(Path(text)),
            "seed": recipe.seed,
            "computes_in": compute,
            "processes": world_size(),
        }
    )
