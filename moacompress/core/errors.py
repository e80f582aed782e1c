"""Every error a user can meet. A message says what is wrong, where, with the numbers, and how to fix it."""

import difflib
from collections.abc import Iterable


class MoaCompressError(Exception):
    """Base of all errors that moacompress raises for user input; the command line prints it and exits with 1."""

    exit_code = 1


class UsageError(MoaCompressError):
    """The request itself is malformed (a budget that does not parse, an unknown task); exits with 2."""

    exit_code = 2


class BudgetError(UsageError):
    """A budget that does not parse or contradicts itself."""


class InfeasibleBudgetError(MoaCompressError):
    """A well-formed budget that no plan meets."""


class RecipeError(UsageError):
    """A recipe with unknown keys or values out of range."""


class PlanError(MoaCompressError):
    """A plan that is malformed, too new, or not for this model."""


class ModelError(MoaCompressError):
    """Not a model, or a model whose attention moacompress cannot compress."""


class DataError(MoaCompressError):
    """Calibration or evaluation data that cannot be used."""


class ArtefactError(MoaCompressError):
    """A file or folder that exists already, is corrupted, or belongs to another run."""


class InUseError(ArtefactError):
    """A file, folder or study that another live process works on."""


class OutOfTimeError(MoaCompressError):
    """A time limit that is over before there is anything to hand back; what was done until then is kept."""


class UnsupportedError(MoaCompressError, NotImplementedError):
    """Something transformers allows that a compressed model cannot do without being silently wrong."""


def did_you_mean(given: str, known: Iterable[str], otherwise: str) -> str:
    """Returns the end of a message about a name that nobody knows: the nearest known one, or `otherwise` where none is near."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def one_line(error: BaseException) -> str:
    """Returns the first line of another library's message, with the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if len(text) <= 300 else f"{text[:297]}..."
