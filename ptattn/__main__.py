"""`python -m ptattn` is the command `ptattn`."""

import sys

from .cli import main

if __name__ == "__main__":  # a worker process imports this module again
    sys.exit(main())
