"""`python -m rlhf_trainer` is `rlhf-train`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
