"""`raycap <verb> ...`: finds the verb's file, runs it, and turns what went wrong into one line and an exit code.

0 done, 1 it failed, 2 it was asked for in a way that cannot work, 130 a person stopped it. Verbs import what they need
when they run, so that `--help` is quick and needs nothing but the standard library and yaml.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from raycap import __version__
from raycap.cli.common import Parser
from raycap.errors import RaycapError, UsageError, did_you_mean
from raycap.stop import Stopped, stoppable

VERBS: dict[str, str] = {
    "doctor": "raycap.cli.doctor",
    "prepare": "raycap.cli.prepare",
    "explore": "raycap.cli.explore",
    "sweep": "raycap.cli.sweep",
    "train": "raycap.cli.train",
    "evaluate": "raycap.cli.evaluate",
    "score": "raycap.cli.score",
    "compare": "raycap.cli.compare",
    "caption": "raycap.cli.caption",
    "serve": "raycap.cli.serve",
}
"""Verb -> module with NAME, HELP, add_arguments(parser), run(args) -> exit code, and EXAMPLES for its help."""
HERE = Path(__file__).resolve().parents[1]
"""The package: where a warning of ours comes from."""
ROOT_EXAMPLES = """\
examples:
  raycap sweep shapes-git                            the whole job on the built-in set: minutes on two cores
  raycap sweep shapes-git tune.trials=16 --dry-run   what would be run
  raycap caption results/shapes-git photo.jpg        the winner's caption of a picture
  raycap <verb> --help                               arguments and examples of a verb
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; never raises, and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except RaycapError as error:
        return _fail(error)
    except KeyboardInterrupt as error:
        how = f"{error}. " if isinstance(error, Stopped) else ""
        print(f"interrupted: {how}The same command begins anew.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output left, as `head` does. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as end:  # argparse, after --help and --version
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        ours = _cause(error)
        return _fail(ours) if ours else _unexpected(error)


def register(name: str, module: str) -> None:
    """Add a verb; a name that is taken is refused."""
    if name in VERBS:
        raise ValueError(f"the verb '{name}' is {VERBS[name]} already")
    VERBS[name] = module


def load_verb(name: str) -> ModuleType:
    if name not in VERBS:
        raise UsageError(f"no verb '{name}'; {did_you_mean(name, VERBS)} See them all with: raycap --help")
    return import_module(VERBS[name])


def _run(arguments: list[str]) -> int:
    if not arguments:
        _root_parser().print_help(sys.stderr)
        return 2
    if arguments[0].startswith("-"):
        _root_parser().parse_args(arguments)
        raise UsageError("no verb given. See them all with: raycap --help")
    verb = load_verb(arguments[0])
    parser = Parser(prog=f"raycap {verb.NAME}", description=verb.HELP, examples=getattr(verb, "EXAMPLES", ""))
    verb.add_arguments(parser)
    with stoppable(), _notes():
        return verb.run(parser.read(arguments[1:])) or 0


@contextmanager
def _notes() -> Iterator[None]:
    """Print warnings of ours as a line for a person, without the place in the code where they arose."""
    before = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *place: Any, **options: Any) -> None:
        if issubclass(category, UserWarning) and HERE in Path(filename).parents:
            print(message if str(message).startswith("WARNING") else f"note: {message}", file=sys.stderr)
        else:
            before(message, category, filename, *place, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = before


def _root_parser() -> Parser:
    verbs = "\n".join(f"  {name:<10}{load_verb(name).HELP}" for name in VERBS)
    about = "Fine-tune a captioning model: packed LoRA sweeps scored on generated captions, a gate, a server."
    parser = Parser(prog="raycap", description=f"{about}\n\nverbs:\n{verbs}", examples=ROOT_EXAMPLES)
    parser.usage = "raycap <verb> ..."
    parser.add_argument("--version", action="version", version=f"raycap {__version__}")
    return parser


def _fail(error: RaycapError) -> int:
    print(f"error: {error.message}", file=sys.stderr)
    if os.environ.get("RAYCAP_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
    return error.exit_code


def _cause(error: BaseException) -> RaycapError | None:
    """The error of ours inside one that came through a worker, if there is one."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if isinstance(found, RaycapError) and type(found).__module__ == RaycapError.__module__:
            return found
        found = getattr(found, "cause", None) or found.__cause__
    return None


def _unexpected(error: Exception) -> int:
    """One line; the traceback goes where it can be found, or to the screen with RAYCAP_DEBUG=1."""
    told = f"error: unexpected {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if os.environ.get("RAYCAP_DEBUG"):
        traceback.print_exception(error, file=sys.stderr)
        print(told, file=sys.stderr)
        return 1
    try:
        handle, path = tempfile.mkstemp(prefix="raycap-error-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(f"raycap {__version__}: {' '.join(sys.argv)}\n\n")
            traceback.print_exception(error, file=file)
    except OSError:
        path = "nowhere, no temporary folder can be written: run again with RAYCAP_DEBUG=1 to see it"
    print(f"{told}\nThe traceback is in {path}", file=sys.stderr)
    return 1
