"""One writer per run folder: the lock that a run holds, and whether the folder is still there before a write."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from vjepa_fast.errors import TrainingError, UserError
from vjepa_fast.locks import Lock
from vjepa_fast.trainer.distributed import Distributed

NAME = "run.lock"


class RunLock:
    """The lock of a run folder, taken by the first process of a run; leaving the context gives it back.

    A folder that `take` made and nobody wrote to goes with it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.lock = Lock(self.folder / NAME)
        self.made: list[Path] = []
        self.held = False

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, world: Distributed) -> list[str]:
        """Notes for the user: whose lock was taken over.

        Raises:
            UserError: another process writes to the folder (in all processes of the run alike), or it cannot be made.
        """
        error = None
        if world.main and not self.held:
            self.made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
            try:
                self.held = self.lock.take()
                if not self.held:
                    error = UserError(self._refusal())
            except UserError as e:
                error = e
        world.agree(error)
        before = self.lock.taken_over
        return [f"{self.folder}: taken over from {before}, which is gone"] if before else []

    def _refusal(self) -> str:
        return (
            f"{self.folder}: in use by {self.lock.holder}, which trains in it; wait for it or stop it, or choose "
            f"another folder with --folder DIR (what died is taken over within {self.lock.stale:.0f} s)"
        )

    def check(self) -> None:
        """Before a write: the folder is there and this run's.

        Raises:
            TrainingError: it was moved or removed, or another process took it over.
        """
        if not self.held or self.lock.mine():
            return
        if not (self.folder / "config.yaml").exists():
            raise TrainingError(
                f"{self.folder}: the run folder was moved or removed while training; nothing more was written; "
                "`vjepa-fast train FOLDER`, where it is now, goes on from its last checkpoint"
            )
        if not self.lock.take():  # someone removed the lock alone
            self.held = False
            raise TrainingError(
                f"{self.folder}: {self.lock.holder} took this run folder over while this process was held up; "
                "nothing more was written by this one"
            )

    def release(self) -> None:
        """Give the folder back."""
        if not self.held:
            return
        self.held = False
        self.lock.release()
        with suppress(OSError):  # up to the first that holds something
            for path in self.made:
                path.rmdir()
