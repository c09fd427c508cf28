"""`python -m rlhf_trainer.demo`: the same as `rlhf-train demo`."""

import sys

from rlhf_trainer.cli import main

sys.exit(main(["demo", *sys.argv[1:]]))
