"""A pytest plugin for transformers' own tests: the causal models that they make are put under a plan of one kind.

It runs in a process of its own, where `tests` are transformers', so that it is given the places of our files by `run.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

KIND = os.environ.get("PEERS_KIND", "dense")
"""Kind of plan; `dense` for none."""
HERE = Path(__file__).resolve().parent
MIXINS = ("ModelTesterMixin", "GenerationTesterMixin")
"""Whose tests are run."""
_ATTACHED: set[type] = set()


def _ours(path: Path) -> Any:
    """Returns one of our modules, from its file: the name `tests` is transformers' here."""
    spec = importlib.util.spec_from_file_location(f"peers_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _attach_when_made(model_class: type, plan_of: Callable[[Any], Any]) -> None:
    """Makes every model of a class begin under a plan, but those whose weights are yet to come or that have a plan."""
    if model_class in _ATTACHED:
        return
    _ATTACHED.add(model_class)
    own = model_class.__init__  # type: ignore[misc]

    @functools.wraps(own)
    def begin(self: Any, config: Any, *arguments: Any, **more: Any) -> None:
        from moacompress.runtime import attach

        own(self, config, *arguments, **more)
        model: PreTrainedModel = self
        empty = any(parameter.is_meta for parameter in model.parameters())
        if type(self) is model_class and not empty and getattr(config, "quantization_config", None) is None:
            attach(model, plan_of(model))

    model_class.__init__ = begin  # type: ignore[misc]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the tests of the two mixins, of test classes that have both."""
    kept, left = list[pytest.Item](), list[pytest.Item]()
    for item in items:
        own = {base.__name__: base for base in getattr(getattr(item, "cls", None), "__mro__", ())}
        function = getattr(item, "originalname", item.name)
        tested = all(name in own for name in MIXINS) and any(hasattr(own[name], function) for name in MIXINS)
        (kept if tested else left).append(item)
    for test_class in {getattr(item, "cls", None) for item in kept}:
        _under_a_plan(test_class)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


def _under_a_plan(test_class: Any) -> None:
    """Makes the tests of a class, when they are set up, keep causal models alone, and puts these under the plan."""
    own = test_class.setUp

    @functools.wraps(own)
    def set_up(self: Any) -> None:
        own(self)
        causal = [one for one in self.all_model_classes or () if one.__name__.endswith("ForCausalLM")]
        self.all_model_classes = tuple(causal)
        if KIND != "dense":
            plan_of = _ours(HERE.parent / "plan_kinds.py").KINDS[KIND]
            for model_class in causal:
                _attach_when_made(model_class, plan_of)

    test_class.setUp = set_up


def _messages(error: BaseException | None) -> Iterator[str]:
    """Yields the messages of an error and of those that it came of."""
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    """Writes what became of every test to the file that `run.py` reads."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.when != "call" and report.outcome == "passed":
        return
    error = call.excinfo.value if call.excinfo is not None and report.outcome == "failed" else None
    row = {
        "test": item.nodeid,
        "name": getattr(item, "originalname", item.name),
        "outcome": report.outcome,
        "messages": list(_messages(error)),
    }
    with open(os.environ["PEERS_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
