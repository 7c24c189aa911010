import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    raise pytest.UsageError("clusters have the machine to themselves: tests/serve runs by itself")
