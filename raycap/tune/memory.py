"""Which trials a limit on memory rules out: `tune.memory_limit_bytes` against what each would take alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from raycap.config import Config, from_dict
from raycap.errors import ConfigError
from raycap.tune.space import sweep_trials


def trial_memory(
    settings: dict[str, Any], *, threads: int = 0, say: Callable[[str], None] = lambda message: None
) -> dict[str, int]:
    """Trial id -> predicted bytes of a GPU that training it alone takes; plain values, to run in a worker.

    Raises:
        ModelError: the model's configuration cannot be read.
    """
    import torch

    from raycap.train.memory import stand_alone

    if threads:
        torch.set_num_threads(threads)
    say("what each trial would take of a GPU alone")
    config = from_dict(settings)
    return stand_alone(config, sweep_trials(config))


def over_limit(config: Config, memory: Mapping[str, int]) -> dict[str, str]:
    """Trial id -> why it cannot win, of those that `tune.memory_limit_bytes` rules out.

    Raises:
        ConfigError: it rules out every trial.
    """
    limit = config.tune.memory_limit_bytes
    found = {
        trial_id: f"cannot win: alone it would take {size / 1e9:.2f} GB, tune.memory_limit_bytes allows {limit / 1e9:.2f}"
        for trial_id, size in memory.items()
        if limit and size > limit
    }
    if found and len(found) == len(memory):
        least = min(memory, key=memory.__getitem__)
        raise ConfigError(
            f"tune.memory_limit_bytes={limit} rules out every trial: {least}, the smallest, would take {memory[least]} "
            "bytes of a GPU alone. Raise it, or lower train.batch / train.accumulation, data.max_text_tokens, "
            "decode.batch or lora.r, or set train.gradient_checkpointing=true"
        )
    return found
