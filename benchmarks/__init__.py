"""Measurements behind the figures of the documentation; README.md lists them.

Threads of OpenMP wait for each other as in the commands, also those of other libraries. The
variable that decides it is read when torch is imported, so it is set here.
"""

import os

from mtl_ranker.environment import ALWAYS

os.environ.setdefault("GOMP_SPINCOUNT", ALWAYS["GOMP_SPINCOUNT"])
