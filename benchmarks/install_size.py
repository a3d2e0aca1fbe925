"""How much disk the environment takes that runs this: all of it, and its largest packages, in GB.

python benchmarks/install_size.py --json benchmarks/results/install_size.json
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

from vjepa_fast.files import write_json


def size(folder: Path) -> int:
    """Bytes of the files below a folder, each counted once."""
    seen: dict[tuple[int, int], int] = {}
    for here, _, files in os.walk(folder):
        for name in files:
            stat = os.lstat(os.path.join(here, name))
            seen[stat.st_dev, stat.st_ino] = stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size
    return sum(seen.values())


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="also write it here")
    parser.add_argument("--largest", type=int, default=5, help="packages that are named (default %(default)s)")
    args = parser.parse_args()
    packages = Path(sysconfig.get_paths()["purelib"])
    sizes = {path.name: size(path) for path in packages.iterdir() if path.is_dir()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[: args.largest]
    found = {
        "environment_gb": round(size(Path(sys.prefix)) / 1e9, 2),
        "packages_gb": {name: round(sizes[name] / 1e9, 2) for name in largest},
        "torch": version("torch"),
        "python": platform.python_version(),
        "system": platform.system(),
    }
    print(found)
    if args.json:
        write_json(args.json, found)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
