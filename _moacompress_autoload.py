"""Registers moacompress with transformers, so that plain `from_pretrained` loads compressed checkpoints.

PyTorch calls `autoload` at the end of `import torch` (entry point group `torch.backends`). An exception here would
break `import torch` for everybody, and importing transformers here would slow it down for everybody. So this module is
top-level and uses the standard library only, it catches everything, and it waits until `transformers.modeling_utils` is
there.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

AFTER = "transformers.modeling_utils"
"""The module without which no model can be loaded."""
REGISTERS = "moacompress.runtime.hf.loading"
"""The module that registers itself when it is imported."""

_reported = False


def autoload() -> None:
    """Imports `REGISTERS` as soon as `AFTER` has been imported, which may be now.

    It never raises and may be called often.
    """
    try:
        module = sys.modules.get(AFTER)
        if module is None:
            if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
                sys.meta_path.insert(0, _Finder())
        elif _is_initializing(module):
            # transformers.modeling_utils itself is importing torch: too late for a finder, too early to register
            if type(module) is ModuleType:
                module.__class__ = _WatchedModule
        else:
            _register()
    except Exception as error:
        _report(error)


def _register() -> None:
    try:
        importlib.import_module(REGISTERS)
    except Exception as error:
        _report(error)


def _report(error: Exception) -> None:
    global _reported
    if not _reported and sys.stderr is not None:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"moacompress: could not register with transformers: {message}", file=sys.stderr)
    _reported = True


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


class _Finder:
    """Finds `AFTER` through the finders that follow this one, and registers once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != AFTER or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Stands in for a module's loader until the module is executed, then puts the real one back and registers."""

    def __init__(self, loader: object, finder: _Finder) -> None:
        self._loader = loader
        self._finder = finder

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self._loader, "create_module", None)
        module = create(spec) if create is not None else None
        return module if isinstance(module, ModuleType) else None

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader  # type: ignore[assignment]
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader  # type: ignore[assignment]
        self._loader.exec_module(module)  # type: ignore[attr-defined]
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        _register()


class _WatchedModule(ModuleType):
    """A module that is still being executed; the first look at it afterwards makes it a plain module and registers."""

    def __getattribute__(self, name: str) -> object:
        if name != "__spec__" and not _is_initializing(self):
            self.__class__ = ModuleType  # type: ignore[assignment]
            _register()
        return ModuleType.__getattribute__(self, name)
