"""A pytest plugin: the CPU library is the one that `$SANITIZED_LIBRARY` names."""

import os
from pathlib import Path

from kdkernels.backends import cpu

cpu.BACKEND._path = Path(os.environ["SANITIZED_LIBRARY"])
