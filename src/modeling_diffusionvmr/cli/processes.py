"""Run one command in several processes, started by `accelerate launch` or `torchrun`."""

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

LONGEST_WAIT = timedelta(days=30)


@dataclass(frozen=True)
class Process:
    """
    This process among those of the command.

    Args:
        rank: its number, from 0, over all machines.
        count: number of processes.
        local_rank: its number on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> "Process":
        """
        Read the environment variables that launchers set: RANK, WORLD_SIZE and LOCAL_RANK.

        Raises:
            ValueError: if they are not whole numbers, or RANK is not below WORLD_SIZE.
        """
        values = [os.environ.get(name, default) for name, default in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK"), "010")]
        if not all(value.isdecimal() for value in values) or not int(values[0]) < int(values[1]):
            raise ValueError(
                "the environment variables RANK, WORLD_SIZE and LOCAL_RANK must be whole numbers with "
                f"RANK < WORLD_SIZE, got {', '.join(values)}"
            )
        return cls(*map(int, values))

    @property
    def is_first(self) -> bool:
        """Whether this process shows progress, and prints what all of them would print."""
        return self.rank == 0

    @property
    def name(self) -> str:
        """The start of a message, such as "process 1 of 4: ". Empty if there is only one process."""
        return f"process {self.rank + 1} of {self.count}: " if self.count > 1 else ""

    @property
    def device(self) -> str | None:
        """The GPU of this process, or `None` if `choose_device` should choose. Processes can share a GPU."""
        import torch

        if self.count == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def wait_for_others(self) -> None:
        """Wait until all processes have called this: a launcher ends all of them as soon as one fails."""
        if self.count == 1 or "MASTER_ADDR" not in os.environ:
            return
        from torch.distributed import rendezvous

        # If another process was killed, or the launcher has ended, there is nothing to wait for. The work is done.
        with suppress(RuntimeError, ValueError):
            store, _, _ = next(rendezvous("env://", self.rank, self.count, timeout=LONGEST_WAIT))
            store.set(f"done {self.rank}", "")
            store.wait([f"done {rank}" for rank in range(self.count)], LONGEST_WAIT)
