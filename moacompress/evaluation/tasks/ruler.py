"""RULER's sentences (arXiv 2404.06654), read from the lm-evaluation-harness that is installed: none of them is in this project.

The harness ships RULER's templates as constants of its modules. They are read from its source, which is not run: importing
these modules fetches data. Where a version of the harness has something else there, reading it fails by name.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from moacompress.core.errors import UsageError
from moacompress.evaluation.tasks.counting import CountingSentences
from moacompress.evaluation.tasks.tracking import TrackingSentences
from moacompress.prompts.sentences import DocumentSentences, NeedleSentences, QuestionSentences

PACKAGE = "lm_eval"
FOLDER = "tasks/ruler"
_SPLIT = "\n{context}\n"
_NEEDLE_FIELDS = {"type_needle_v": "{kinds}", "type_needle_v[:-1]": "{kind}", "query": "{key}"}
"""What a needle's templates are filled with, and what we call it."""
_SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"), ("{kinds}", "{kind}"))
"""How a template that asks for several values asks for one."""


def is_installed() -> bool:
    """Returns whether lm-evaluation-harness is there; it is not imported."""
    return importlib.util.find_spec(PACKAGE) is not None


def check_installed(task: str) -> None:
    """Refuses a task of RULER where lm-evaluation-harness is not there.

    Raises:
        UsageError: it is not.
    """
    if not is_installed():
        raise UsageError(
            f"task {task} takes RULER's sentences from lm-evaluation-harness, which is not installed; install it with "
            "`pip install 'moacompress[eval]'`"
        )


@cache
def needles() -> NeedleSentences:
    """Returns the sentences of needles."""
    prepare, template = _Source("prepare_niah.py"), _Source("niah_utils.py").constant("TEMPLATE")
    one, several = prepare.alternatives("gen_prefix", _NEEDLE_FIELDS)
    before, after = _renamed(template, "type_needle_v", "query").split(_SPLIT)
    return NeedleSentences(
        needle=_renamed(prepare.constant("NEEDLE"), "type_needle_v"),
        one=QuestionSentences(_singular(before), _singular(after), one),
        several=QuestionSentences(before, after, several),
        noise=(prepare.first_text("haystack"),),
    )


@cache
def tracking() -> TrackingSentences:
    """Returns the sentences of variable tracking."""
    source = _Source("vt_utils.py")
    said = source.entry(source.constant_dict("CONFIG"), "variable_tracking")
    return TrackingSentences(
        prompt=source.entry_text(said, "template").replace("{query}", "{value}"),
        answer=source.entry_text(said, "answer_prefix").replace("{query}", "{value}").replace("{num_v}", "{count}"),
        first="VAR {name} = {value}",
        then="VAR {name} = VAR {other} ",
        noise=source.first_text("noise"),
    )


@cache
def common_words() -> CountingSentences:
    """Returns the sentences of common words."""
    return _counting("cwe_utils.py")


@cache
def frequent_words() -> CountingSentences:
    """Returns the sentences of frequent words."""
    return _counting("fwe_utils.py")


@cache
def documents() -> DocumentSentences:
    """Returns the sentences of question answering."""
    source = _Source("qa_utils.py")
    said = source.constant_dict("CONFIG")
    return DocumentSentences(
        prompt=source.entry_text(said, "template").replace("{query}", "{question}"),
        document=source.constant("DOCUMENT_PROMPT").replace("{i}", "{number}"),
        answer=" " + source.entry_text(said, "answer_prefix").lstrip(),
    )


def _counting(module: str) -> CountingSentences:
    source = _Source(module)
    said = source.constant_dict("CONFIG")
    return CountingSentences(source.entry_text(said, "template"), source.entry_text(said, "answer_prefix"))


def _renamed(template: str, *names: str) -> str:
    for name in names:
        template = template.replace(f"{{{name}}}", _NEEDLE_FIELDS[name])
    return template


def _singular(template: str) -> str:
    for several, one in _SINGULAR:
        template = template.replace(several, one)
    return template


class _Source:
    """The source of one of the harness's modules.

    Args:
        module: its file.

    Raises:
        UsageError: the harness is not installed, or has no such module; from every method, that it has no such sentence.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        try:
            self._tree = ast.parse((_folder() / module).read_text("utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            raise self._missing("source that can be read") from error

    def constant(self, name: str) -> str:
        """Returns the text that the module gives a name."""
        return self._text(next(self._assigned(self._tree.body, name), None), name)

    def constant_dict(self, name: str) -> ast.Dict:
        """Returns the dictionary that the module gives a name."""
        found = next(self._assigned(self._tree.body, name), None)
        if not isinstance(found, ast.Dict):
            raise self._missing(name)
        return found

    def first_text(self, name: str) -> str:
        """Returns the first text that is assigned to a name anywhere in the module."""
        return self._text(
            next((v for v in self._assigned(ast.walk(self._tree), name) if isinstance(v, ast.Constant)), None), name
        )

    def entry(self, found: ast.Dict, key: str) -> ast.Dict:
        """Returns the dictionary under a key."""
        value = self._value(found, key)
        if not isinstance(value, ast.Dict):
            raise self._missing(key)
        return value

    def entry_text(self, found: ast.Dict, key: str) -> str:
        """Returns the text under a key."""
        return self._text(self._value(found, key), key)

    def alternatives(self, key: str, fields: dict[str, str]) -> tuple[str, str]:
        """Returns the two templates of `key: f"..." if ... else f"..."` in a dictionary, wherever it is.

        Args:
            key: of the dictionary.
            fields: what each expression in the templates becomes.
        """
        dicts = (node for node in ast.walk(self._tree) if isinstance(node, ast.Dict))
        for value in (self._value(found, key) for found in dicts):
            if isinstance(value, ast.IfExp):
                return self._template(value.body, key, fields), self._template(value.orelse, key, fields)
        raise self._missing(key)

    def _template(self, node: ast.expr, name: str, fields: dict[str, str]) -> str:
        pieces = []
        for part in node.values if isinstance(node, ast.JoinedStr) else [node]:
            if isinstance(part, ast.FormattedValue):
                pieces.append(fields.get(ast.unparse(part.value)))
            else:
                pieces.append(self._text(part, name))
        if None in pieces:
            raise self._missing(name)
        return "".join(filter(None, pieces))

    def _text(self, node: ast.expr | None, name: str) -> str:
        if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
            raise self._missing(name)
        return node.value

    @staticmethod
    def _assigned(nodes: object, name: str) -> Iterator[ast.expr]:
        for node in nodes:  # type: ignore[attr-defined]
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                yield node.value

    @staticmethod
    def _value(found: ast.Dict, key: str) -> ast.expr | None:
        for known, value in zip(found.keys, found.values, strict=True):
            if isinstance(known, ast.Constant) and known.value == key:
                return value
        return None

    def _missing(self, name: str) -> UsageError:
        return UsageError(
            f"the installed lm-evaluation-harness, {importlib.metadata.version(PACKAGE)}, has no {name} in "
            f"{PACKAGE}/{FOLDER}/{self._module}, where RULER's sentences are read; install another version with "
            "`pip install 'moacompress[eval]'`, or ask for other tasks"
        )


def _folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        check_installed("of RULER")
        raise UsageError(f"{PACKAGE} is no package")
    return Path(next(iter(found.submodule_search_locations))) / FOLDER
