"""Questions on source code: some lines of Python's standard library, and a question that they answer.

The source is that of the Python that runs, so nothing is fetched and nothing is shipped. What is asked is found with `ast`, and
only where all modules together have one answer: then so has any part of them.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.unseen.names import pick
from moacompress.prompts.library_source import ASKED, read_modules

TEMPLATE = "Here is a part of a program.\n\n```python\n{code}\n```\n\n{question} Answer with {form} alone."
PREFIX = "\nThe answer is `"
DEFAULT = "What is the default value of the parameter `{parameter}` of the function `{function}`?"
VALUE = "What value is assigned to `{name}`?"
CALLS = "Which function calls `{name}`?"
RAISES = "Which function raises an error with the message `{text}`?"
SAYS = "Which function has a docstring that begins with `{text}`?"
FORMS = ("the value", "the name of the function")
HEADER = "# {module}.py"
SENTENCES = (TEMPLATE, PREFIX, DEFAULT, VALUE, CALLS, RAISES, SAYS, FORMS, HEADER)
"""All that prompts say but for the code and what is asked of it."""
SPAN = 8
"""Most lines from the beginning of a definition to what is asked of it."""
TRIED = 20
"""Questions that are drawn for a prompt, of which the first that fits its length is asked."""
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class CodeFact:
    """A question on code, and its one answer.

    Attributes:
        first: index of the first line of the source that is needed to answer it.
        last: index of the last.
        question: in words.
        form: of the answer, in words.
        answer: the answer.
        said: what of the code stands in the question, where that is a text; the answer is where it is.
    """

    first: int
    last: int
    question: str
    form: str
    answer: str
    said: str = ""

    @property
    def size(self) -> int:
        """Lines that are needed."""
        return self.last + 1 - self.first


@dataclass(frozen=True)
class CodeSource:
    """Lines of all modules, one after the other, and what can be asked of them, by the kind of question."""

    lines: tuple[str, ...]
    facts: tuple[tuple[CodeFact, ...], ...]


def make_code_question(request: PromptRequest) -> PromptDraft:
    """Returns lines of source code with a question on some of them.

    Raises:
        DataError: the source is not there, or the length is too short or too long.
    """
    rng, source = request.rng, code_source()
    depth = float(rng.random())

    def ask(fact: CodeFact, count: int) -> PromptDraft:
        begin = fact.first - round(depth * count)
        lines = [source.lines[at % len(source.lines)] for at in range(begin, begin + fact.size + count)]
        user = TEMPLATE.format(code="\n".join(lines), question=fact.question, form=fact.form)
        asked, answer = (
            f"\n{fact.question} Answer with {fact.form} alone.",
            Answer.of(fact.answer, before="", after="`"),
        )
        return PromptDraft((user,), PREFIX, answer, (fact.answer,), question=asked)

    drawn = [pick(rng, pick(rng, source.facts)) for _ in range(TRIED)]
    fact = next((one for one in drawn if request.tokens(ask(one, 0)) <= request.length), drawn[0])
    limit = len(source.lines) - fact.size

    def write(count: int) -> PromptDraft:
        return ask(fact, count)

    return request.fit(write, limit, f"task {request.task} has no {request.length:,} tokens of source")


def code_sentences() -> tuple[object, ...]:
    """Returns all that prompts say; of the source a digest: another Python has other prompts."""
    digest = hashlib.sha256("\n".join(text for _, text in read_modules(ASKED)).encode()).hexdigest()
    return (*SENTENCES, ASKED, digest)


@functools.cache
def code_source() -> CodeSource:
    """Returns the source of the modules with its facts.

    Raises:
        DataError: this Python comes without its source.
    """
    lines: list[str] = []
    trees: list[tuple[int, ast.Module]] = []
    for module, text in read_modules(ASKED):
        lines.append(HEADER.format(module=module))
        trees.append((len(lines) - 1, ast.parse(text)))  # line 1 of a tree is one below its header
        lines += text.splitlines()
    nodes = [(at, node) for at, tree in trees for node in ast.walk(tree)]
    names = Counter(node.name for _, node in nodes if isinstance(node, (_Function, ast.ClassDef)))
    assigned = Counter(target.id for _, node in nodes for target in _targets(node))
    functions = [
        (at, node)
        for at, tree in trees
        for node in _plain_functions(tree)
        if names[node.name] == 1 and not node.name.startswith("__")
    ]
    whole = "\n".join(lines)
    called = Counter(re.findall(r"(?<!def )(?<!class )\b(\w+)\s*\(", whole))  # comments that speak of a call count too
    kinds = (
        [
            *(fact for at, node in functions for fact in _defaults(at, node)),
            *(fact for at, tree in trees for fact in _values(at, tree.body, assigned)),
        ],
        [fact for at, node in functions for fact in _calls(at, node, called)],
        [
            fact
            for at, node in functions
            for fact in (*_messages(at, node), *_docstring(at, node))
            if whole.count(fact.said) == 1
        ],
    )
    return CodeSource(tuple(lines), tuple(tuple(f for f in facts if f.size <= SPAN) for facts in kinds))


def _plain_functions(tree: ast.Module) -> Iterator[_Function]:
    """Yields functions and methods that are in no other function and have none in them, so that each line is in one."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    for node in (*tree.body, *(node for each in classes for node in each.body)):
        if isinstance(node, _Function) and not any(
            isinstance(inner, (_Function, ast.ClassDef)) for inner in ast.walk(node) if inner is not node
        ):
            yield node


def _defaults(at: int, node: _Function) -> Iterator[CodeFact]:
    """Yields questions on the defaults of a function's parameters."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    pairs = [*zip(positional[len(positional) - len(given.defaults) :], given.defaults, strict=True)]
    for parameter, value in [*pairs, *zip(given.kwonlyargs, given.kw_defaults, strict=True)]:
        answer = _literal(value)
        if answer is not None and value is not None:
            question = DEFAULT.format(parameter=parameter.arg, function=node.name)
            yield CodeFact(at + node.lineno, at + (value.end_lineno or 0), question, FORMS[0], answer)


def _values(at: int, body: list[ast.stmt], assigned: Mapping[str, int]) -> Iterator[CodeFact]:
    """Yields questions on constants of a module, of names that nothing else assigns to."""
    for node in body:
        for target in _targets(node):
            answer = _literal(getattr(node, "value", None))
            if answer is not None and assigned[target.id] == 1 and "PORT" not in target.id:  # those are widely known
                question = VALUE.format(name=target.id)
                yield CodeFact(at + node.lineno, at + (node.end_lineno or 0), question, FORMS[0], answer)


def _calls(at: int, node: _Function, called: Mapping[str, int]) -> Iterator[CodeFact]:
    """Yields questions on which function calls what only one of them does."""
    for inner in ast.walk(node):
        name = _called(inner)
        if name is not None and called[name] == 1 and isinstance(inner, ast.Call):
            yield from _of_text(CALLS.format(name=name), name, inner.lineno, at, node)


def _messages(at: int, node: _Function) -> Iterator[CodeFact]:
    """Yields questions on the messages of a function's errors."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and isinstance(inner.exc, ast.Call) and inner.exc.args:
            said = inner.exc.args[0]
            said = said.left if isinstance(said, ast.BinOp) else said  # "..." % value
            if isinstance(said, ast.Constant) and isinstance(said.value, str) and _is_sentence(said.value):
                yield from _of_text(RAISES.format(text=said.value), said.value, said.end_lineno or 0, at, node)


def _docstring(at: int, node: _Function) -> Iterator[CodeFact]:
    """Yields a question on a function's docstring."""
    said = (ast.get_docstring(node) or "").strip().partition("\n")[0]
    if _is_sentence(said):
        yield from _of_text(SAYS.format(text=said), said, node.body[0].lineno + 1, at, node)


def _is_sentence(text: str) -> bool:
    return len(text.split()) >= 3 and "`" not in text and text.isprintable()


def _of_text(question: str, said: str, last: int, at: int, node: _Function) -> Iterator[CodeFact]:
    """Yields a question on which function says something, if that does not give its name away."""
    words, named = ({*re.findall(r"[a-z]+", text.casefold())} for text in (said, node.name))
    if not words & named:
        yield CodeFact(at + node.lineno, at + last, question, FORMS[1], node.name, said)


def _targets(node: ast.AST) -> list[ast.Name]:
    """Returns the names that a statement gives a value to, itself and not by a loop, a tuple or an import."""
    if isinstance(node, ast.Assign):
        return [target for target in node.targets if isinstance(target, ast.Name)]
    if isinstance(node, ast.AnnAssign | ast.AugAssign) and isinstance(node.target, ast.Name):
        return [node.target]
    return []


def _called(node: ast.AST) -> str | None:
    """Returns the name of what a node calls, without what it belongs to; None where it calls nothing by a name."""
    if not isinstance(node, ast.Call):
        return None
    return getattr(node.func, "attr", None) or getattr(node.func, "id", None)


def _literal(value: ast.expr | None) -> str | None:
    """Returns a number or a short word as an answer; None of what is no constant, or easily guessed."""
    if not isinstance(value, ast.Constant) or value.value in (None, True, False, 2):
        return None
    text = value.value if isinstance(value.value, str) else ast.unparse(value)
    return text if len(text) <= 24 and re.fullmatch(r"[\w.:/-]*\w[\w.:/-]*", text) else None
