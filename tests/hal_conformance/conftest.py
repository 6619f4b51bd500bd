# SPDX-License-Identifier: Apache-2.0
"""The implementations under test are a module of their own, as a user's would be."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
