"""Scripts that print the figures of the documentation.

OpenMP's threads wait as in the commands of mtl_ranker, those of peers too. It reads the variable
when torch is imported.
"""

import os

from mtl_ranker.environment import ALWAYS

os.environ.setdefault("GOMP_SPINCOUNT", ALWAYS["GOMP_SPINCOUNT"])
