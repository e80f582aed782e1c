"""Which options have no effect beside which others: one table for all commands, and the check that refuses them.

An option that does nothing hides a mistake: whoever gave it believes that it counts. So every such pair is an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from moacompress.cli.options import COMMON_ALWAYS
from moacompress.core.errors import UsageError

_SERVING = ("kv_memory", "requests", "prompt", "new", "rate")
_OF_TABLE = ("lengths", "batch", "tokens", "repeats", "prefill_repeats", "quick", "compile_ours", "peak", "trace")


@dataclass(frozen=True)
class Ignored:
    """Options of a command that have no effect in some case. Options are called as the command's parameters are.

    A case is an option that is on ("merge"), one that has a value ("source=moa"), or a key of the resolved recipe that has a
    value ("heal.train=lora").

    """

    command: str  # "profile", "data preview", or "*" for all
    options: tuple[str, ...] = ()  # those that have no effect
    but: tuple[str, ...] | None = None  # instead: all have no effect but these and `COMMON_ALWAYS`
    beside: str = ""  # the case in which that is so; without one it is always so
    without: tuple[str, ...] = ()  # the cases in none of which that is so
    why: str = ""  # the reason, where the names do not say it

    def ignores(self, option: str) -> bool:
        """Returns whether an option has no effect in the case."""
        if self.but is None:
            return option in self.options
        return option not in (*self.but, *COMMON_ALWAYS, self.beside.partition("=")[0])

    @property
    def of_recipe(self) -> bool:
        """Whether the case is one of the recipe."""
        return any("." in case for case in (self.beside, *self.without))


TABLE = (
    Ignored("*", ("verbose",), beside="quiet"),
    Ignored("profile", but=("model", "others", "out", "overwrite", "dry_run"), beside="merge"),
    Ignored("profile", ("audit",), beside="shard", why="it needs the whole profile, so merge the shards first"),
    Ignored("profile", ("audit", "tensor_parallel"), beside="dry_run", why="it is not estimated"),
    Ignored("profile", ("scorer",), without=("profile.gates",)),
    Ignored("compress", ("effort",), beside="recipe", why="the recipe says how much is measured"),
    Ignored("search", but=(), beside="status"),
    Ignored("search", ("budget",), beside="max_loss", why="a loss finds the budget itself"),
    Ignored("search", ("tensor_parallel",), beside="dry_run", why="it is not estimated"),
    Ignored("export", ("ranks",), beside="dry_run", why="it moves no KV heads"),
    Ignored("heal", ("modules",), without=("heal.train=lora",)),
    Ignored("eval", but=(), beside="list_tasks"),
    Ignored("eval", ("lm_eval_batch",), without=("lm_eval",)),
    Ignored("eval", ("overwrite",), without=("out",)),
    Ignored("eval", ("tensor_parallel",), beside="dry_run", why="it is not estimated"),
    Ignored("eval", ("tensor_parallel",), beside="lm_eval", why="lm-evaluation-harness deals its prompts out to ranks"),
    Ignored("bench", (*_OF_TABLE, "dry_run"), beside="serve"),
    Ignored("bench", _SERVING, without=("serve",)),
    Ignored("bench", ("overwrite",), without=("out",)),
    Ignored("inspect", ("device",), without=("show_tokens", "batch")),
    Ignored("convert", ("model", "trust_remote_code"), without=("source",)),
    Ignored("convert", ("sparsity",), without=("source=duo-attention",)),
    Ignored("convert", ("at",), without=("source=moa",)),
    Ignored("chat", ("seed",), without=("temperature",)),
    Ignored("doctor", ("lengths", "batch", "device", "trust_remote_code"), without=("model",)),
)
"""All options that have no effect somewhere."""


@dataclass(frozen=True)
class GivenOptions:
    """The options of one call."""

    command: str = ""  # as in `TABLE`
    values: Mapping[str, Any] = field(default_factory=dict)  # of all parameters, by name
    names: Mapping[str, str] = field(
        default_factory=dict
    )  # on a command line; a switch as given, an argument's metavar
    keys: Mapping[str, str] = field(default_factory=dict)  # keys of a recipe that options set, by parameter
    given: Sequence[str] = ()  # parameters that the command line names; the environment and defaults do not count

    def check(self, recipe: Any = None) -> None:
        """Refuses an option that has no effect: by the rules on options alone, or by those that depend on a resolved recipe.

        Raises:
            UsageError: says which, beside or without which, and what to do.
        """
        for rule in TABLE:
            if rule.command not in ("*", self.command) or rule.of_recipe != (recipe is not None):
                continue
            if rule.beside and not self._holds(rule.beside, recipe):
                continue
            if any(self._holds(case, recipe) for case in rule.without):
                continue
            for option in self.given:
                if rule.ignores(option):
                    raise UsageError(self._problem(self.names[option], rule))

    def _holds(self, case: str, recipe: Any) -> bool:
        """Returns whether a case is that of this call; what the environment says makes none."""
        name, equals, wanted = case.partition("=")
        if "." in name:
            value = recipe
            for part in name.split("."):
                value = getattr(value, part)
        else:
            value = self.values.get(name) if name in self.given else None
        return value == wanted if equals else bool(value)

    def _problem(self, option: str, rule: Ignored) -> str:
        where, fix = f"in `{self.command}`", f"leave {option} out"
        if rule.beside:
            where, fix = f"beside {self._shown(rule.beside)}", "leave one of the two out"
        elif rule.without:
            needed = " or ".join(map(self._shown, rule.without))
            where, fix = f"without {needed}", f"give {needed} too, or leave {option} out"
        return f"{option} has no effect {where}{': ' if rule.why else ''}{rule.why}; {fix}"

    def _shown(self, case: str) -> str:
        """Returns a case as a person gives it: `--merge`, `--from moa`, `--train lora`."""
        name, _, wanted = case.partition("=")
        parameter = next((found for found, key in self.keys.items() if key == name), name)
        return " ".join(filter(None, [self.names.get(parameter, f"`{name}` in the recipe"), wanted]))


def given_options(context: Any, keys: Mapping[str, str]) -> GivenOptions:
    """Returns the options of a call of Typer's, with the keys of a recipe that they set."""
    words, above = [], context
    while above.parent is not None:  # what the program is called depends on how it was started
        words.append(str(above.info_name))
        above = above.parent
    names = {each.name: _name(each, context.params.get(each.name)) for each in context.command.params}
    given = [name for name in names if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    return GivenOptions(" ".join(reversed(words)), context.params, names, keys, given)


def _name(parameter: Any, value: Any) -> str:
    """Returns what an option or argument is called on a command line; of a switch the side that `value` is."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper()).strip("[].")
    names = parameter.secondary_opts if value is False and parameter.secondary_opts else parameter.opts
    return str(max(names, key=len))
