"""A module of functions in Python, whose last lines begin to define one of them again, up to the default of a parameter.

The module goes to the model as it is, without a chat template, as an editor would give it.
"""

from __future__ import annotations

from dataclasses import dataclass

from moacompress.evaluation.tasks.drafts import Answer, PromptDraft
from moacompress.evaluation.tasks.task import PromptRequest
from moacompress.evaluation.tasks.unseen.names import NAMES, draw_names, pick

FUNCTION_TOKENS = 20
"""A function surely has more tokens: how many are drawn at most."""
DEFAULTS = (1000, 10_000)
"""Defaults are integers from the first up, below the second."""
_VERBS = """
allocate balance compile dispatch encode flush gather index join label merge prune
"""
_PARAMETERS = """
budget buffer callback cursor depth digest encoding epoch factor fallback gateway height horizon interval limit locale margin
mode offset owner policy prefix quota ratio region schema scope threshold timeout tolerance weight width zone
"""
VERBS, PARAMETERS = tuple(_VERBS.split()), tuple(_PARAMETERS.split())
BODIES = (
    "    if not {0}:\n        raise ValueError({1})\n    return run({0})\n",
    "    found = read({0})\n    return [each for each in found if each > {1}]\n",
    "    with lock({1}):\n        write({0})\n",
    "    return {{key: {0} for key in range({1})}}\n",
    "    total = {0} * {1}\n    log(total)\n    return total\n",
)
HEAD = "def {name}({first}, {second}="
MODULE = (
    '"""Routines of the service."""\n\n\n{functions}\n\nclass Remote:\n    """The same, on another machine."""\n\n'
    "    @staticmethod\n    {head}"
)
SENTENCES = (VERBS, PARAMETERS, BODIES, HEAD, MODULE)
"""All that prompts are made of but for what is drawn."""


@dataclass(frozen=True)
class Function:
    """A function: its name, its parameters, the default of the second one, and which of `BODIES` it has."""

    name: str
    parameters: tuple[str, str]
    default: int
    body: int

    @property
    def head(self) -> str:
        """How its definition begins, up to the default."""
        return HEAD.format(name=self.name, first=self.parameters[0], second=self.parameters[1])

    def text(self) -> str:
        """Returns its definition."""
        return f"{self.head}{self.default}):\n{BODIES[self.body].format(*self.parameters)}"


def make_code_completion(request: PromptRequest) -> PromptDraft:
    """Returns a module that is to be gone on with.

    Raises:
        DataError: the length is too short, or too long for the names there are.
    """
    rng = request.rng
    limit = min(request.length // FUNCTION_TOKENS, NAMES - 1)
    names, defaults = draw_names(rng, limit + 1), rng.integers(*DEFAULTS, limit + 1).tolist()

    def draw(name: str, default: int) -> Function:
        first, second = (PARAMETERS[at] for at in rng.permutation(len(PARAMETERS))[:2].tolist())
        return Function(f"{pick(rng, VERBS)}_{name.lower()}", (first, second), default, int(rng.integers(len(BODIES))))

    asked, *others = map(draw, names, defaults)
    depth, value = float(rng.random()), str(asked.default)

    def write(count: int) -> PromptDraft:
        before = round(depth * count)
        functions = [*others[:before], asked, *others[before:count]]
        text = MODULE.format(functions="\n\n".join(each.text() for each in functions), head=asked.head)
        return PromptDraft((text,), "", Answer.of(value, before="", after="):"), (value,), plain=True)

    short = f"task {request.task} has {NAMES:,} names, too few for a prompt of {request.length:,} tokens"
    return request.fit(write, limit, short)
