# SPDX-License-Identifier: Apache-2.0
"""The exercises and the table of coverage are modules of their own: one is a program, the other writes a page."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
