"""Makes `tiny_models` and the rewards' `tiny_backbones` importable for the tests of this folder, whatever pytest's import mode."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "rewards")]
