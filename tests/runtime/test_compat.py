"""The list of private names: all are there, each is missed by name, and the product uses no other."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moacompress.core.errors import UnsupportedError
from moacompress.runtime.compat import private_names
from moacompress.runtime.compat.private_names import NAMES

ROOT = Path(__file__).resolve().parents[2]


def test_all_hold_with_the_installed_versions() -> None:
    assert [str(broken) for broken in private_names.check()] == []
    names = [entry.name for entry in NAMES]
    assert len(names) == len(set(names)) > 30


NEEDED_BY_OTHERS = (
    "PreTrainedModel",
    "PreTrainedConfig",
    "masking_utils",
    "transformers.models.",
    "torch.nn.Module.",
    "next_id",
    "tree_iter",
)
"""Parts of names without which others do not work, or cannot be looked at."""


def take_away(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes a name from the class that defines it, from the objects of its class, or from its module."""
    path, _, attribute = name.rpartition(".")
    holder = private_names.find(path)
    kinds = holder.__mro__[:-1] if inspect.isclass(holder) else ()
    defining = [kind for kind in kinds if attribute in vars(kind)] if kinds else [holder]
    for owner in defining:
        monkeypatch.delattr(owner, attribute)
    if not defining:
        own = holder.__init__

        def made(self: Any, *arguments: Any, **rest: Any) -> None:
            own(self, *arguments, **rest)
            vars(self).pop(attribute, None)

        monkeypatch.setattr(holder, "__init__", made)


def test_a_name_that_goes_is_missed() -> None:
    """All but what comes from C or every class has, which cannot be taken away, and what is not looked for."""
    for entry in NAMES:
        skipped = entry.name.rpartition(".")[2] in (*private_names.ON_OBJECTS, "__call__")
        if skipped or entry.name.startswith(("torch.Tensor.", "torch.ops.mkldnn.")):
            continue
        with pytest.MonkeyPatch.context() as monkeypatch:
            take_away(entry.name, monkeypatch)
            broken = private_names.check()
        names = {found.name for found in broken}
        assert entry.name in names
        assert len(names) == 1 or any(part in entry.name for part in NEEDED_BY_OTHERS)
        assert all("\n" not in str(found) for found in broken)
        assert entry.problem() is None


FORMS: dict[str, tuple[Any, str]] = {
    "transformers.generation.utils.GenerationMixin._prepare_cache_for_generation": (
        lambda self, generation_config, model_kwargs, generation_mode, batch_size: None,
        "has no max_cache_length",
    ),
    "transformers.generation.configuration_utils.GenerationMode": (object, "has no GREEDY_SEARCH, SAMPLE"),
    "transformers.activations.ACT2FN": ({"silu": None}, "has no swish"),
}
"""Other forms of a name, and what is said of them."""


@pytest.mark.parametrize("name", FORMS)
def test_another_form_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, said = FORMS[name]
    holder, _, attribute = name.rpartition(".")
    monkeypatch.setattr(private_names.find(holder), attribute, form)
    problem = next(entry for entry in NAMES if entry.name == name).problem()
    assert problem is not None
    assert problem.startswith(said)


def test_what_is_missing_is_said_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import output_capturing

    assert private_names.resolve(private_names.ACTIVE_COLLECTOR) is output_capturing._active_collector
    monkeypatch.delattr(output_capturing, "_active_collector")
    with pytest.raises(
        UnsupportedError, match=f"^{private_names.ACTIVE_COLLECTOR} is missing .*; it is for .* is here; install"
    ):
        private_names.resolve(private_names.ACTIVE_COLLECTOR)


def product_files() -> Iterator[Path]:
    """Yields the product's modules, each once."""
    yield ROOT / "_moacompress_autoload.py"
    for package in ("moacompress", "search", "calibration"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(tree: ast.Module) -> set[str]:
    """Returns what a module defines: functions, classes, fields, variables, and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


OF_NAMED_TUPLES = {"_asdict", "_fields", "_make", "_replace"}
"""Public in spite of their underscore, says Python."""


def used_private_names(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yields private names that a module uses and does not define, with their lines.

    Those are attributes, parts of imports, and strings that name an attribute.
    """
    own = own_names(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif (
            isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] != "moacompress"
        ):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            names = [part.value for part in node.args if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        for name in names:
            if is_private(name) and name not in own | OF_NAMED_TUPLES and not name.startswith("_moacompress"):
                yield name, getattr(node, "lineno", 0)


def test_the_product_uses_no_private_name_that_is_not_listed() -> None:
    listed = {part for entry in NAMES for part in entry.name.split(".")}
    files = [*product_files()]
    assert len(files) > 100
    unlisted = {
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in files
        for name, line in used_private_names(ast.parse(path.read_text("utf-8")))
        if name not in listed
    }
    assert unlisted == set()


def test_private_names_are_found_wherever_they_stand() -> None:
    code = """
import torch._one.two
from transformers._three import four
from transformers.five import _six
from moacompress._ours import _own
class Mine:
    def _method(self):
        self._field, other._seven = other._eight, self._method()
getattr(Mine, "_nine", None); getattr(Mine, "_moacompress"); Mine.__dict__
"""
    found = sorted(name for name, _ in used_private_names(ast.parse(code)))
    assert found == ["_eight", "_nine", "_one", "_seven", "_six", "_three"]


def test_what_our_classes_override_is_listed() -> None:
    """All of a cache, which transformers calls by name; of other classes what is private."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    import moacompress.estimate.live_bytes
    from moacompress.runtime.cache.layer_cache import CacheLayer, PlanCacheLayer
    from moacompress.runtime.cache.plan_cache import PlanCache
    from moacompress.runtime.cache.reuse_layer import ReuseCacheLayer
    from moacompress.runtime.hf.config import MoaCompressConfig
    from moacompress.runtime.hf.generation import OVERRIDES
    from moacompress.runtime.hf.loading import MoaCompressQuantizer

    last_parts = {entry.name.rpartition(".")[2] for entry in NAMES}
    assert set(OVERRIDES) <= last_parts
    others = (MoaCompressConfig, MoaCompressQuantizer, moacompress.estimate.live_bytes.LiveBytes)
    for kind in (PlanCache, CacheLayer, PlanCacheLayer, ReuseCacheLayer, *others):
        base = CacheLayerMixin if issubclass(kind, CacheLayer) else kind.__mro__[1]
        overridden = {name for name in vars(kind) if not name.startswith("__") and hasattr(base, name)}
        if not issubclass(kind, Cache | CacheLayerMixin):
            overridden = {name for name in overridden if is_private(name)}
        assert overridden - {"_abc_impl"} <= last_parts, kind
