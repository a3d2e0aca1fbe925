"""Work that does not end, in a module that takes no time to import."""

import subprocess
import time


def sleeps(path):
    """Never ends, and has a child: its process id is written to ``path``."""
    child = subprocess.Popen(["sleep", "600"])
    path.write_text(str(child.pid))
    time.sleep(600)
