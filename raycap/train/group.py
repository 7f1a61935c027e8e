"""Several workers that train one pack: each holds the base and every slot, and takes its share of each step's rows.

The share of rank r of N is every N-th row of an effective batch from r on, so that texts of like length, which stand side
by side, spread evenly. A row's dropout goes by its place in the whole batch and a slot's loss by the tokens of the whole
batch, so that the gradients of N workers add up to those of one. They are added in one flat tensor, with losses and the
word that somebody ran out of memory behind them; whatever follows (clipping, what is finite, AdamW) is done by every
worker on the same numbers.

Rank 0 alone knows board and checkpoints. It says each call of the engine to the others before it makes it (`Lead`), and
they make the same one (`follow`).

Shapes: K slots, P parameters of a slot.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import distributed

from raycap.train import checkpoint
from raycap.trial import TrialSpec

if TYPE_CHECKING:
    from raycap.models.stacked import Stacks

FRAME_BYTES = 1024
"""What is said fits in most cases into one message of this size; the rest of a longer one follows."""
SILENCE = timedelta(days=30)
"""How long the others wait for rank 0's next word: it may wait for the board. Who dies closes his connection."""
_LENGTH_BYTES = 8

T = TypeVar("T")


class Group:
    """This worker's place among the `size` workers of its pack. Without arguments: a worker alone.

    `words` carries what is said (gloo, on a CPU), `sums` what is added up (nccl on GPUs): process groups of torch.
    """

    def __init__(self, rank: int = 0, size: int = 1, words: Any = None, sums: Any = None):
        self.rank, self.size, self.words, self.sums = rank, size, words, sums or words

    # --- sharing a batch ----------------------------------------------------------------------------------------------

    def share(self, rows: np.ndarray) -> np.ndarray:
        """This worker's rows of [n, ...]: between them all workers have each row once."""
        return rows[self.rank :: self.size]

    def join(self, shares: list[list[T]]) -> list[list[T]]:
        """The inverse of `share`, for lists of plain values; one list a slot, the same on every worker."""
        if self.size == 1:
            return shares
        told = [json.loads(found) for found in self.collect(json.dumps(shares).encode())]
        joined: list[list[T]] = []
        for parts in zip(*told):
            whole: list[Any] = [None] * sum(len(part) for part in parts)
            for rank, part in enumerate(parts):
                whole[rank :: self.size] = part
            joined.append(whole)
        return joined

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all workers, in place; the same to the last bit on each."""
        if self.size > 1:
            self.sums.allreduce([tensor]).wait()
        return tensor

    def add_step(self, stacks: Stacks, losses: torch.Tensor | None) -> torch.Tensor | None:
        """Losses [K] of all workers together, and so their gradients in the stacks; None, for every worker, where memory
        ran out for one of them, which is told by its having no `losses`."""
        if self.size == 1:
            return losses
        stacks.tail[:-1] = 0.0 if losses is None else losses
        stacks.tail[-1] = float(losses is None)
        self.add(stacks.room)
        return None if stacks.tail[-1] else stacks.tail[:-1].clone()

    def agree(self, stacks: Stacks) -> list[int]:
        """Make parameters and moments those of worker 0 for all; the workers that held others.

        There are none on devices of one kind, where one sum and the same steps give the same bits; a CPU with another
        number of threads may round otherwise.
        """
        if self.size == 1:
            return []
        kinds, tensors = {4: torch.int32, 8: torch.int64}, (stacks.value, stacks.m, stacks.v)
        sums = [int(tensor.view(kinds[tensor.element_size()]).sum(dtype=torch.int64)) for tensor in tensors]
        told = self.collect(json.dumps(sums).encode())
        others = [rank for rank, one in enumerate(told) if one != told[0]]
        for tensor in tensors if others else ():
            self.sums.broadcast(tensor, 0).wait()
        return others

    # --- words --------------------------------------------------------------------------------------------------------

    def say(self, word: bytes = b"") -> bytes:
        """What rank 0 says, on every worker."""
        if self.size == 1:
            return word
        frame = torch.zeros(FRAME_BYTES, dtype=torch.uint8)
        if self.rank == 0:
            head = len(word).to_bytes(_LENGTH_BYTES, "little") + word[: FRAME_BYTES - _LENGTH_BYTES]
            frame[: len(head)] = _tensor(head)
        self.words.broadcast(frame, 0).wait()
        length = int.from_bytes(_bytes(frame[:_LENGTH_BYTES]), "little")
        begin = _bytes(frame[_LENGTH_BYTES : _LENGTH_BYTES + length])
        if length <= len(begin):
            return begin
        rest = _tensor(word[len(begin) :]) if self.rank == 0 else torch.zeros(length - len(begin), dtype=torch.uint8)
        self.words.broadcast(rest, 0).wait()
        return begin + _bytes(rest)

    def collect(self, word: bytes) -> list[bytes]:
        """What each worker says, by rank, on every worker."""
        if self.size == 1:
            return [word]
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self.words.allgather([lengths], [torch.tensor([len(word)])]).wait()
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(word)] = _tensor(word)
        found = [torch.zeros_like(padded) for _ in range(self.size)]
        self.words.allgather([found], [padded]).wait()
        return [_bytes(one[: int(n)]) for one, n in zip(found, lengths)]

    def leave(self) -> None:
        """Close the connections: who waits for this worker gets an error instead of waiting on."""
        self.words = self.sums = None
        if distributed.is_initialized():
            distributed.destroy_process_group()


def connected() -> Group:
    """The group of the process group that Ray Train has made, with a second one, on the CPU, for words."""
    words = distributed.new_group(backend="gloo", timeout=SILENCE)
    return Group(distributed.get_rank(), distributed.get_world_size(), words, distributed.group.WORLD)


class Lead:
    """The engine of rank 0: what changes it is said to the others first, who do the same. The rest is its own affair."""

    def __init__(self, engine: Any, group: Group, log: Callable[[str], None] = lambda line: None):
        self.engine, self.group, self.log = engine, group, log

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def say(self, call: str, **values: Any) -> None:
        self.group.say(json.dumps({"call": call, **values}).encode())

    def admit(self, spec: TrialSpec, state: Mapping[str, Any] | None = None) -> None:
        if state is None:
            self.say("admit", spec=spec.to_dict())
        else:
            tensors, plain = checkpoint.apart(state)
            self.say("admit", spec=spec.to_dict(), plain=plain)
            self.group.say(checkpoint.to_bytes(tensors))
        self.engine.admit(spec, state)

    def release(self, trial_id: str) -> None:
        self.say("release", trial_id=trial_id)
        self.engine.release(trial_id)

    def pause(self, trial_id: str) -> None:
        self.say("pause", trial_id=trial_id)
        self.engine.pause(trial_id)

    def resume(self, trial_id: str) -> None:
        self.say("resume", trial_id=trial_id)
        self.engine.resume(trial_id)

    def step(self) -> Mapping[str, Any]:
        self.say("step")
        return self.engine.step()

    def evaluate(self, trial_ids: list[str]) -> Mapping[str, Any]:
        self.say("evaluate", trial_ids=trial_ids)
        for rank in self.group.agree(self.engine.stacks):
            self.log(f"worker {rank} had rounded otherwise (is its device another one?) and takes worker 0's adapters")
        return self.engine.evaluate(trial_ids)


def follow(engine: Any, group: Group, others: Mapping[str, Callable[..., None]]) -> str:
    """Do what rank 0 says until it says `end`, with the reason that is returned. `others` are calls beside the engine's."""
    while True:
        values = json.loads(group.say())
        call = values.pop("call")
        if call == "end":
            return values["reason"]
        if call in others:
            others[call](**values)
        elif call == "admit":
            plain = values.get("plain")
            state = None if plain is None else checkpoint.together(checkpoint.from_bytes(group.say()), plain)
            engine.admit(TrialSpec.from_dict(values["spec"]), state)
        elif call == "evaluate":
            group.agree(engine.stacks)
            engine.evaluate(values["trial_ids"])
        else:
            getattr(engine, {"step": "step", "release": "release", "pause": "pause", "resume": "resume"}[call])(
                **values
            )


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()
