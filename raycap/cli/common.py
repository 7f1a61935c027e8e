"""What the verbs share: the parser, settings from a preset or a run folder, which model a folder means."""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raycap.config import Config, load_config, preset_names
from raycap.errors import UsageError, did_you_mean
from raycap.places import found, hint

VARIANTS = ("merged", "merged-nf4")


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError, knows the nearest option, and shows examples at the end of its help."""

    def __init__(self, *, examples: str = "", **options: Any):
        super().__init__(
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse, with options allowed between the settings."""
        parsed, unknown = self.parse_known_intermixed_args(list(arguments))
        for argument in unknown:
            options = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            raise UsageError(f"unknown option '{argument}'; {did_you_mean(argument, options)}")
        parsed.command = f"{self.prog} {shlex.join(arguments)}".strip()
        return parsed

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}. See: {self.prog} --help")


def add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", metavar="key=value", nargs="*", help="settings in place of the preset's")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON; progress goes to stderr")


def add_plain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="a line now and then in place of the live table")


def print_json(value: Any) -> None:
    print(json.dumps(_jsonable(value), indent=2, ensure_ascii=False, allow_nan=False))


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if hasattr(value, "item"):  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def is_run(folder: Path | str) -> bool:
    from raycap.report.ledger import mend_config

    return mend_config(folder)


def run_config(folder: Path, settings: Sequence[str] = ()) -> Config:
    """The settings of a run folder, with `settings` put in, to go on with that folder."""
    from raycap.report.ledger import mend_config

    mend_config(folder)
    return load_config(str(folder / "config.yaml"), [*settings, f"run.dir={folder}"])


def preset_list() -> str:
    return "presets: " + ", ".join(preset_names())


def require_folder(text: str, what: str) -> Path:
    path = found(text)
    if not path.is_dir():
        raise UsageError(f"there is no folder {text}: expected {what}.{hint(text)}")
    return path


def model_folder(text: str, variant: str | None) -> tuple[Path, Path | None]:
    """(model folder, run folder or None) of what a person named: a run, or a model in the hub's layout.

    Of a run it is best/<variant>; without one the variant that the run promotes.
    """
    folder = require_folder(text, "a run folder, or a model folder in the hub's layout")
    if is_run(folder):
        chosen = variant or run_config(folder).export.promote
        model = folder / "best" / chosen
        if not model.is_dir():
            there = ", ".join(v for v in VARIANTS if (folder / "best" / v).is_dir())
            has = f"it has {there}" if there else "it has no exported model: the run did not come that far"
            raise UsageError(f"{folder} has no best/{chosen}; {has}")
        return model, folder
    if variant:
        raise UsageError(f"--variant {variant} chooses a model of a run, and {folder} is no run folder")
    if (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder} is an adapter without its base: name its run folder, or a merged model")
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is neither a run folder (no config.yaml) nor a model (no config.json)")
    return folder, None


def config_for_model(model: Path, run: Path | None, settings: Sequence[str]) -> Config:
    """The settings to use a model with: its run's, or the defaults for a folder that stands alone."""
    if run is not None:
        return run_config(run, settings)
    return load_config("shapes-git", [f"run.name={model.name}", f"model.path={model}", *settings])


def existing_files(names: Sequence[str], suffixes: Sequence[str]) -> list[Path]:
    """Files as they were named; a folder stands for the files of these suffixes in it, in name order."""
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes and p.is_file())
            if not inside:
                raise UsageError(f"there are no pictures in the folder {name}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            near = os.listdir(path.parent) if path.parent.is_dir() else []
            hint = f"; {did_you_mean(path.name, near)}" if near and len(near) < 1000 else ""
            raise UsageError(f"there is no file {name}{hint if 'did you mean' in hint else ''}")
    return found
