"""RULER's sentences (arXiv 2404.06654), read from the lm-evaluation-harness that is installed: none of them is in this project.

The harness ships RULER's templates as constants of its modules. They are read from its source, which is not run: importing
these modules fetches data. Where a version of the harness has something else there, reading it fails by name.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
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
    prepare, template = _Source("prepare_niah.py"), _Source("niah_utils.py").text("TEMPLATE")
    one, several = prepare.alternatives("gen_prefix", _NEEDLE_FIELDS)
    before, after = _renamed(template, "type_needle_v", "query").split(_SPLIT)
    return NeedleSentences(
        needle=_renamed(prepare.text("NEEDLE"), "type_needle_v"),
        one=QuestionSentences(_singular(before), _singular(after), one),
        several=QuestionSentences(before, after, several),
        noise=(prepare.first_text("haystack"),),
    )


@cache
def tracking() -> TrackingSentences:
    """Returns the sentences of variable tracking."""
    source = _Source("vt_utils.py")
    prompt, answer = (source.text("CONFIG", "variable_tracking", name) for name in ("template", "answer_prefix"))
    return TrackingSentences(
        prompt=prompt.replace("{query}", "{value}"),
        answer=answer.replace("{query}", "{value}").replace("{num_v}", "{count}"),
        first="VAR {name} = {value}",
        then="VAR {name} = VAR {other} ",
        noise=source.first_text("noise"),
    )


@cache
def common_words() -> CountingSentences:
    """Returns the sentences of common words."""
    source = _Source("cwe_utils.py")
    return CountingSentences(source.text("CONFIG", "template"), source.text("CONFIG", "answer_prefix"))


@cache
def frequent_words() -> CountingSentences:
    """Returns the sentences of frequent words."""
    source = _Source("fwe_utils.py")
    return CountingSentences(source.text("CONFIG", "template"), source.text("CONFIG", "answer_prefix"))


@cache
def documents() -> DocumentSentences:
    """Returns the sentences of question answering."""
    source = _Source("qa_utils.py")
    return DocumentSentences(
        prompt=source.text("CONFIG", "template").replace("{query}", "{question}"),
        document=source.text("DOCUMENT_PROMPT").replace("{i}", "{number}"),
        answer=" " + source.text("CONFIG", "answer_prefix").lstrip(),
    )


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

    Raises:
        UsageError: the harness is not installed, or has no such module; from every method, that it has no such sentence.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            check_installed("of RULER")
            raise UsageError(f"{PACKAGE} is no package")
        try:
            self._tree = ast.parse((Path(found.submodule_search_locations[0]) / FOLDER / module).read_text("utf-8"))
        except (OSError, SyntaxError, ValueError) as error:
            raise self._missing("source that can be read") from error

    def text(self, name: str, *keys: str) -> str:
        """Returns the text that the module gives a name, or that is under some keys of the dictionary of that name."""
        wanted = name
        try:
            found = ast.literal_eval(next(self._assigned(self._tree.body, name)))
            for wanted in keys:
                found = found[wanted]
        except (StopIteration, ValueError, KeyError, TypeError) as error:
            raise self._missing(wanted) from error
        if not isinstance(found, str):
            raise self._missing(wanted)
        return found

    def first_text(self, name: str) -> str:
        """Returns the first text that is assigned to a name anywhere in the module."""
        for value in self._assigned(ast.walk(self._tree), name):
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                return value.value
        raise self._missing(name)

    def alternatives(self, key: str, fields: dict[str, str]) -> tuple[str, str]:
        """Returns the two templates of `key: f"..." if ... else f"..."` in a dictionary, wherever it is.

        `fields` says what each expression in the templates becomes.
        """

        def template(node: ast.expr) -> str:
            pieces = []
            for part in node.values if isinstance(node, ast.JoinedStr) else [node]:
                found = fields.get(ast.unparse(part.value)) if isinstance(part, ast.FormattedValue) else None
                pieces.append(part.value if isinstance(part, ast.Constant) else found)
            if not all(isinstance(piece, str) for piece in pieces):
                raise self._missing(key)
            return "".join(map(str, pieces))

        for found in ast.walk(self._tree):
            for known, value in zip(found.keys, found.values, strict=True) if isinstance(found, ast.Dict) else ():
                if isinstance(known, ast.Constant) and known.value == key and isinstance(value, ast.IfExp):
                    return template(value.body), template(value.orelse)
        raise self._missing(key)

    @staticmethod
    def _assigned(nodes: Iterable[ast.AST], name: str) -> Iterator[ast.expr]:
        for node in nodes:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                yield node.value

    def _missing(self, name: str) -> UsageError:
        return UsageError(
            f"the installed lm-evaluation-harness, {importlib.metadata.version(PACKAGE)}, has no {name} in "
            f"{PACKAGE}/{FOLDER}/{self._module}, where RULER's sentences are read; install another version with "
            "`pip install 'moacompress[eval]'`, or ask for other tasks"
        )
