"""`python -m parse_benchmarks head --memory`: the benchmarks' own parser reads the line, nothing is measured."""

import sys

from blocks import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks.__main__ import parser

parser().parse_args()
