"""What torchrun tells the processes it starts."""

import hashlib
import os
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from plans.errors import MachineError, UsageError


@dataclass(frozen=True, slots=True)
class Torchrun:
    """This process in a torchrun job."""

    rank: int
    world_size: int
    local_world_size: int
    run_id: str

    def socket_path(self) -> str:
        """Return the address of a control socket for a job on one machine; only its user can reach it.

        Raises:
            UsageError: the job spans several machines.
            MachineError: the folder for it belongs to somebody else.
        """
        if self.world_size != self.local_world_size:
            raise UsageError(
                f"{self.world_size - self.local_world_size} of {self.world_size} processes are on other machines",
                expected="--listen ADDR:PORT of the first machine, --key-file and --trusted-network",
                code="E-ADDRESS",
            )
        name = hashlib.sha256(self.run_id.encode()).hexdigest()[:24]
        return f"unix:{private_folder() / f'{name}.sock'}"


def torchrun_here(environment: Mapping[str, str] = os.environ) -> Torchrun | None:
    """Return this process's place in a torchrun job, or None outside of one."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")
    if not all(name in environment for name in names):
        return None
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    run_id = "/".join([environment["TORCHELASTIC_RUN_ID"], environment.get("MASTER_PORT", ""), attempt])
    return Torchrun(
        int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment["LOCAL_WORLD_SIZE"]), run_id
    )


def private_folder() -> Path:
    """Return a folder that only this user can enter, made if it is not there.

    Raises:
        MachineError: something else has its name.
    """
    folder = Path(tempfile.gettempdir()) / f"llamarun-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise MachineError("is not a private folder of this user", where=folder, hint="remove it", code="E-PRIVATE")
    return folder
