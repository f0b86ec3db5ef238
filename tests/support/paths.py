"""Where this checkout and the real data are."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
DATA = Path(os.environ.get("IA3_TEST_DATA", ROOT.parent / "shared" / "data"))
