"""`python -m sonoedge` is the command line."""

import sys

from sonoedge.cli import main

sys.exit(main())
