"""What happens under a version of transformers that moacompress is not tested with: all that it leans on is looked at first."""

from __future__ import annotations

import functools
import logging

from moacompress.core.errors import UnsupportedError
from moacompress.runtime.compat import private_names, versions

logger = logging.getLogger(__name__)


@functools.cache
def check_installed() -> None:
    """Looks, once in a process, whether the installed transformers can be run with; a tested one can.

    Of any other one, every private name is checked, and where all hold it is said that it is untested.

    Raises:
        UnsupportedError: some do not hold.
    """
    here = versions.installed()
    if versions.is_tested(here):
        return
    broken = private_names.check()
    if broken:
        more = f", and {len(broken) - 1} more (see `moacompress doctor`)" if len(broken) > 1 else ""
        raise UnsupportedError(
            f"moacompress does not run with transformers {here}, which it is not tested with: {broken[0]}{more}; "
            f"{private_names.remedy()}"
        )
    logger.warning(
        "transformers %s is installed and moacompress is tested with %s; all that it leans on is there, so it goes ahead: run "
        "`moacompress doctor` for details, or pip install '%s'",
        here,
        versions.tested_range(),
        versions.requirement(),
    )
