"""The store of a run's processes under ``torchrun``, apart from what processes before a restart left in it.

torchrun's agent has one store for all its restarts, and torch 2.14 gives it to each process group as it is: who
comes first reads the addresses of processes that are dead, and waits for them until the timeout (pytorch#135712). The
count of restarts tells nothing apart either, as each node has its own. So processes that begin make up names, and agree
on a list of them: `meet`.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

PLACE = "vjepa_fast/meeting"
POLL = 0.02  # seconds, of few processes; the store answers all of them


def store(rank: int, world: int, timeout: float) -> dist.Store | None:  # pyright: ignore[reportPrivateImportUsage]
    """The agent's store as the processes that began with this one see it; None where there is no agent that has one.

    Raises:
        dist.DistStoreError: the others did not come within ``timeout`` seconds.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not host or not port.isdigit():
        return None
    agents = dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
    return dist.PrefixStore(meet(agents, rank, world, timeout), agents)  # pyright: ignore[reportPrivateImportUsage]


def meet(place: dist.Store, rank: int, world: int, timeout: float) -> str:  # pyright: ignore[reportPrivateImportUsage]
    """A prefix that ``world`` processes have in common, and with no process that was in ``place`` before them.

    Each says its name. The first one reads them all into a list, and asks anew whenever a name has changed; that of a
    dead process changes when the one in its place comes, and nobody but the living answers to a list with their name.
    Once all have answered, the first one says which list holds.
    """
    place = dist.PrefixStore(PLACE, place)  # pyright: ignore[reportPrivateImportUsage]
    own, until = uuid.uuid4().hex, time.monotonic() + timeout
    place.set(f"name/{rank}", own)
    answered = ""
    while time.monotonic() < until:
        if rank == 0:
            names = [_read(place, f"name/{other}") for other in range(world)]
            if all(names):
                place.set("list", json.dumps(names))
        names = json.loads(_read(place, "list") or "[]")
        if len(names) == world and names[rank] == own:
            key = uuid.uuid5(uuid.NAMESPACE_OID, "".join(names)).hex
            if key != answered:
                place.set(f"answer/{rank}", key)
                answered = key
            if rank == 0 and all(_read(place, f"answer/{other}") == key for other in range(world)):
                place.set("held", key)
            if _read(place, "held") == key:
                return f"vjepa_fast/{key}"
        time.sleep(POLL * (1 + world / 16))
    gone = f"not all of {world} processes came within {timeout:.0f} s"
    raise dist.DistStoreError(gone)


def _read(place: dist.Store, key: str) -> str:  # pyright: ignore[reportPrivateImportUsage]
    return place.get(key).decode() if place.check([key]) else ""
