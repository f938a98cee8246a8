"""`python -m nrcg.cli`: the `nrcg` command of this interpreter."""

import sys

from nrcg.cli import main

if __name__ == "__main__":
    sys.exit(main())
