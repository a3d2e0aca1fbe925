"""What a run folder says about the run: versions, differences from a checkpoint's settings, earlier runs set aside."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import vjepa_fast
from vjepa_fast import config as configs
from vjepa_fast.config.schema import Config
from vjepa_fast.errors import UserError
from vjepa_fast.files import write_text
from vjepa_fast.trainer import checkpoint
from vjepa_fast.trainer.distributed import Distributed

if TYPE_CHECKING:
    from vjepa_fast.data.loader import ClipLoader

RUN_FILES = (
    "checkpoints", "metrics.jsonl", "config.yaml", "versions.json", "tensorboard", "failure.json",
    "bad_samples.jsonl", "logger.json", "wandb", "mlruns"
)  # fmt: skip


def versions(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Package, torch, python, commit, device, dtype and system, all texts."""
    return {
        "package": getattr(vjepa_fast, "__version__", "unknown"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": git_commit(),
        "device": f"{device} ({device_name(device)})",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def device_name(device: torch.device) -> str:
    """The GPU's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_commit() -> str:
    """Commit of the checkout that the package runs from, with ``+`` if files differ; ``unknown`` if installed."""
    root = Path(vjepa_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(root: Path, *args: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *args],
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return done.stdout.strip()


def changed_settings(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``key: old -> new`` of every setting that differs between two of `config.to_dict`."""
    out: list[str] = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += changed_settings(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(f"{prefix}{key}: {a} -> {b}")
    return out


def begin(cfg: Config, found: dict[str, str], world: Distributed, *, anew: bool) -> None:
    """First writes of a run to its folder, so that an unwritable one is reported before any work is done.

    Args:
        cfg: goes into ``config.yaml``.
        found: goes into ``versions.json``.
        world: the first process writes; what it raises all raise.
        anew: move an earlier run's files aside first.
    """
    error, folder = None, Path(cfg.folder)
    if world.main:
        try:
            if anew:
                set_aside(folder)
            checkpoint.remove_unfinished(folder)
            write_text(folder / "config.yaml", configs.dump_yaml(cfg))
            write_text(folder / "versions.json", json.dumps(found, indent=1))
        except Exception as e:
            error = e
    world.agree(error)


def list_bad(folder: Path, loaders: Sequence[ClipLoader], world: Distributed, listed: int) -> int:
    """Write the list of samples that could not be read (the loader logged each), where it is longer than ``listed``;
    returns its length.
    """
    bad = [sample for loader in loaders for sample in loader.bad.samples]
    if len(bad) != listed:
        name = "bad_samples.jsonl" if world.main else f"bad_samples.{world.rank}.jsonl"
        lines = (json.dumps({"path": str(path), "reason": str(reason)}) for path, reason in bad)
        write_text(folder / name, "".join(line + "\n" for line in lines), parents=False)
    return len(bad)


def set_aside(folder: Path) -> None:
    """Move an earlier run's files to the first free ``previous-N/`` of the folder."""
    present = [folder / name for name in RUN_FILES if (folder / name).exists()] + sorted(folder.glob("failure-*.pt"))
    if not present:
        return
    n = 1
    while (folder / f"previous-{n}").exists():
        n += 1
    target = folder / f"previous-{n}"
    try:
        target.mkdir()
        for path in present:
            path.rename(target / path.name)
    except OSError as error:
        raise UserError(f"{folder}: the earlier run cannot be moved to {target.name} ({error.strerror})") from None


@contextmanager
def nothing_left(folder: Path) -> Generator[None]:
    """Where what is done inside fails, a ``folder`` that was not there before goes again, unless it tells of a run: it
    has a checkpoint, a row of metrics or the report of a failure.
    """
    there = folder.exists()
    try:
        yield
    except BaseException:
        if not there and not _tells(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _tells(folder: Path) -> bool:
    rows = folder / "metrics.jsonl"
    made = rows.is_file() and rows.stat().st_size > 0
    return made or (folder / "failure.json").exists() or any((folder / "checkpoints").glob("*.pt"))
