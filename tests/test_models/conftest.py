"""Lets the tests of this folder import ``plain_convneur``: the import mode keeps test folders off the path."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
