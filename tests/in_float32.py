"""Run a script of tests without bfloat16, by which sums in another order differ by a hundredth.

python tests/in_float32.py SCRIPT [ARGUMENT ...]
"""

import runpy
import sys

import torch

torch.cpu.get_capabilities = dict
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
