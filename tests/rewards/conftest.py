"""Makes `tiny_rewards` importable for the tests of this folder, whatever pytest's import mode."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
