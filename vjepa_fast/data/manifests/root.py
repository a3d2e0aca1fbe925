"""``data.root``: the folder that the paths of manifests start from, and that they do not lead out of."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from vjepa_fast.config.schema import DataConfig
from vjepa_fast.data.members import is_url, member_of
from vjepa_fast.errors import DataError


@dataclass(frozen=True)
class Root:
    """A folder; ``confine``: nothing outside of it is read; ``option``: what it was given by, for messages."""

    folder: str
    confine: bool = True
    option: str = "data.root"

    @classmethod
    def of(cls, data: DataConfig) -> Root | None:
        """What a section of a recipe says; None without ``root``."""
        return None if data.root is None else cls(os.path.abspath(os.path.expanduser(data.root)), data.root_confine)

    @classmethod
    def given(cls, folder: str | None) -> Root | None:
        """What ``--root`` of a command says; None without it."""
        return None if folder is None else cls(os.path.abspath(os.path.expanduser(folder)), option="--root")

    def check(self, paths: Sequence[str], manifest: str) -> None:
        """Hold the samples of a manifest against the folder, links resolved.

        Args:
            paths: of files, absolute, and of members of shards.
            manifest: for the message.

        Raises:
            DataError: there is no such folder; or with ``confine`` one of them lies outside, or behind a URL: names it.
        """
        if not os.path.isdir(self.folder):
            raise DataError(f"{self.option}: {self.folder}: no such folder")
        if not self.confine:
            return
        root = os.path.realpath(self.folder)
        real: dict[str, str] = {}  # folders, each resolved once
        for path in dict.fromkeys(path if (m := member_of(path)) is None else m.shard for path in paths):
            folder, name = os.path.split(path)
            if folder not in real:
                real[folder] = os.path.realpath(folder)
            place = os.path.join(real[folder], name)
            if name in ("", ".", "..") or os.path.islink(place):
                place = os.path.realpath(place)
            if is_url(path) or not place.startswith(os.path.join(root, "")):
                other = "set data.root_confine: false" if self.option == "data.root" else "give a folder that holds it"
                raise DataError(
                    f"{manifest}: {path} lies outside of {self.option} {self.folder}; take it out, or {other}"
                )
