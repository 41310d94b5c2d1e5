"""The command line by the folder's name: `python PATH/TO/internvl-u draw ...`, from anywhere.

An isolated Python, as the portable ComfyUI on Windows has it, finds no package by `-m internvl_u`.
"""

import sys

from internvl_u.__main__ import main

sys.exit(main())
