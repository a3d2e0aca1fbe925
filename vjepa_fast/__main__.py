"""``python -m vjepa_fast``, the same as the ``vjepa-fast`` command."""

import sys

from vjepa_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
