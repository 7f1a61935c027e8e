"""`python -m raycap`, the same as the command `raycap`."""

import sys

from raycap.cli import main

if __name__ == "__main__":
    sys.exit(main())
