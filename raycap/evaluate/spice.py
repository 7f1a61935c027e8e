"""SPICE (Anderson et al. 2016) by the program in pycocoevalcap, where the parser's models that it needs are found.

pycocoevalcap fetches them into its own folder at first use, without asking; here they are looked for, never fetched.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from raycap.errors import RunError
from raycap.evaluate.java import NO_JAVA, UTF8, java, package_file, require_java

if TYPE_CHECKING:
    from raycap.evaluate.metrics import Prepared, Result

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
FOLDER = "RAYCAP_SPICE"
"""Environment variable: a folder with JARS, for an installation that cannot be written."""
OPENED = (
    "java.base/java.lang",
    "java.base/java.math",
    "java.base/java.util",
    "java.base/java.net",
    "java.base/java.text",
)
"""Java packages that SPICE's serialiser reaches into; a Java of this age forbids it unless told."""


def missing() -> str:
    """Why SPICE cannot be computed here and what to do about it; empty when it can."""
    if java() is None:
        return NO_JAVA.replace("METEOR", "SPICE")
    if _jars():
        return ""
    return (
        f"SPICE needs the parser of Stanford CoreNLP 3.6.0, of 0.5 GB, and finds no {JARS[0]} with {JARS[1]}. "
        "`python -m pycocoevalcap.spice.get_stanford_models`, run in pycocoevalcap's folder `spice`, fetches them; or put "
        f"the two files of stanford-corenlp-full-2015-12-09 into a folder and set {FOLDER} to it."
    )


def spice(data: Prepared) -> list[Result]:
    """SPICE's F score: the mean over images, and each image's (NaN where the program gives none counts as 0).

    Raises:
        RunError: the program failed, with what it said.
    """
    from raycap.evaluate.metrics import Result

    rows = [
        {"image_id": n, "test": caption, "refs": references}
        for n, (caption, references) in enumerate(zip(data.hypotheses, data.references))
    ]
    found = {row["image_id"]: row["scores"]["All"]["f"] for row in run(rows)}
    each = np.array([float(found.get(n) or 0.0) for n in range(len(rows))])
    each[~np.isfinite(each)] = 0.0
    return [Result("spice", float(each.mean()), each, {"variant": "1.0"})]


def run(rows: list[dict]) -> list[dict]:
    """The program's answer for rows {"image_id", "test", "refs"}; its files live in a temporary folder."""
    jar = package_file("spice", "spice-1.0.jar")
    classes = os.pathsep.join([str(jar), str(jar.parent / "lib" / "*"), *map(str, _jars())])
    opens = [part for package in OPENED for part in ("--add-opens", f"{package}=ALL-UNNAMED")]
    with tempfile.TemporaryDirectory(prefix="raycap-spice-") as folder:
        given, out = Path(folder, "in.json"), Path(folder, "out.json")
        given.write_text(json.dumps(rows), encoding="utf-8")
        command = [require_java(), "-Xmx8G", *UTF8, *opens, "-cp", classes, "edu.anu.spice.SpiceScorer"]
        done = subprocess.run([*command, str(given), "-out", str(out), "-subset", "-silent"], capture_output=True)
        if done.returncode or not out.is_file():
            said = done.stderr.decode("utf-8", "replace").strip()[-500:]
            raise RunError(f"SPICE ended with code {done.returncode}. It said: {said}")
        return json.loads(out.read_text(encoding="utf-8"))


def _jars() -> list[Path]:
    """The parser's two files: in the folder that the environment names, else in pycocoevalcap's own."""
    folders = [Path(os.environ[FOLDER])] if os.environ.get(FOLDER) else []
    try:
        folders.append(package_file("spice", "spice-1.0.jar").parent / "lib")
    except RunError:
        pass
    for folder in folders:
        if all((folder / name).is_file() for name in JARS):
            return [folder / name for name in JARS]
    return []
