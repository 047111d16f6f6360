"""`python -m sonoedge` is the command line."""

import sys

from sonoedge.cli import main

if __name__ == "__main__":
    sys.exit(main())
