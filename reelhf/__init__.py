"""The floor every other package stands on: configs, run folders, video files, the training engine, the command line.

It imports none of its neighbours; see `tests/test_imports.py`.
"""

__version__ = "0.1.0"
