"""The few error types that users meet.

RaycapError
+-- ConfigError      a setting that is unknown, of the wrong type, or without effect   exit 2
+-- UsageError       a command used in a way that cannot work                          exit 2
+-- DataError        an image set, shard or row that cannot be used                    exit 1
+-- ModelError       a model, adapter or checkpoint that cannot be used                exit 1
+-- GateError        the promoted model scored too far below its adapter               exit 1
+-- RunError         a run that cannot start, go on or be written                      exit 1
+-- Interrupted      a person stopped the run; what it left can be resumed             exit 130
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RaycapError(Exception):
    """Base of what raycap raises on purpose: what was wrong, its value, where, and the remedy."""

    exit_code = 1

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message

    def __reduce__(self):
        # The raw argument, so that a trip between processes leaves the text as it was.
        return type(self), (self.message,)


class ConfigError(RaycapError):
    exit_code = 2


class UsageError(RaycapError):
    exit_code = 2


class DataError(RaycapError):
    pass


class ModelError(RaycapError):
    pass


class GateError(RaycapError):
    pass


class RunError(RaycapError):
    pass


class Interrupted(RaycapError):
    exit_code = 130


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """A clause that names the nearest valid spellings, or lists all of them when none is near."""
    known = sorted(choices)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(f"'{n}'" for n in near) + "?"
    return "valid: " + ", ".join(known) if known else "there is nothing to choose from"
