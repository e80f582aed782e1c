"""Registers moacompress with transformers, so that plain `from_pretrained` loads compressed checkpoints.

PyTorch calls `autoload` at the end of `import torch` (entry point group `torch.backends`). An exception here would
break `import torch` for everybody, and importing transformers here would slow it down for everybody. So this module is
top-level and uses the standard library only, it catches everything, and it waits until one of the modules that know
quantizers has been imported and something is taken from it.

It never registers while one of these is executed: what a half imported module lacks would be missing, and two threads
that import from two ends would wait for each other.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from threading import get_ident
from types import FrameType, ModuleType

WATCHED = ("transformers.modeling_utils", "transformers.quantizers", "transformers.quantizers.auto")
"""The modules that know quantizers: nothing reaches one but through them. What registers needs them whole."""
REGISTERS = "moacompress.runtime.hf.loading"
"""The module that registers: its `register` may be called often."""

_registering: set[int] = set()
"""The threads that are at it: what registers takes from the watched modules itself."""
_reported = False


def autoload() -> None:
    """Registers as soon as something is taken from a module in `WATCHED`; now, where one of them has been imported.

    It never raises and may be called often.
    """
    try:
        if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
        found = _watched_modules()
        for module in found:
            if _is_initializing(module):  # it is importing torch itself: too late for a finder, too early to register
                _watch(module)
        if not all(map(_is_initializing, found)):
            _register()
    except Exception as error:
        _report(error)


def _register() -> bool:
    """Registers, or says why it cannot; False where this thread is at it already, or it is too early in this thread."""
    thread = get_ident()
    if thread in _registering:
        return False
    _registering.add(thread)
    try:
        if any(_is_initializing(module) and _is_executed_here(module) for module in _watched_modules()):
            return False
        module = importlib.import_module(REGISTERS)  # another thread that imports it is waited for
        if not _is_initializing(module):
            module.register()
    except Exception as error:
        _report(error)
    finally:
        _registering.discard(thread)
    return True


def _report(error: Exception) -> None:
    global _reported
    if not _reported and sys.stderr is not None:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"moacompress: could not register with transformers: {message}", file=sys.stderr)
    _reported = True


def _watched_modules() -> list[ModuleType]:
    """Returns those of `WATCHED` that have been imported or are being imported."""
    return [module for module in map(sys.modules.get, WATCHED) if module is not None]


def _is_initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _is_executed_here(module: ModuleType) -> bool:
    """Returns whether this thread is executing the body of a module."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_globals is module.__dict__ and frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back
    return False


def _watch(module: ModuleType) -> None:
    if type(module) is ModuleType:
        module.__class__ = _WatchedModule


class _Finder:
    """Finds the modules in `WATCHED` through the finders that follow this one, and has them watched once executed.

    It stays: a module that is reloaded, or whose import failed, forgets what was registered.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WATCHED or self not in sys.meta_path:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Stands in for a module's loader until the module is executed, then puts the real one back."""

    def __init__(self, loader: object) -> None:
        self._loader = loader

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
        _watch(module)


class _WatchedModule(ModuleType):
    """A module from which nothing has been taken yet: the first name that is taken registers, and makes it a plain module.

    Names with two underscores are not what is looked for: tools ask every module for them, some of them while they go
    through `sys.modules`. Of these only `import *` asks for `__all__`.
    """

    def __getattribute__(self, name: str) -> object:
        asked = name == "__all__" or not (name.startswith("__") and name.endswith("__"))
        if asked and not _is_initializing(self) and _register():
            self.__class__ = ModuleType  # type: ignore[assignment]
        return ModuleType.__getattribute__(self, name)
