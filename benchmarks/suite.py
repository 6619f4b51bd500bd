# SPDX-License-Identifier: Apache-2.0
"""How long the conformance suite takes on the CPU, as whole processes.

python benchmarks/suite.py [--rounds N]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from harness import Subject, command, main

HAL = str(Path(sys.executable).parent / "hal")

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        recording = str(Path(folder) / "cpu.safetensors")
        run = (HAL, "conformance", "run", "--device", "cpu", "--scale")
        record = (HAL, "conformance", "record", "--device", "cpu", "--scale", "tiny", "-o", recording)
        subjects = [
            Subject("python -c 'import torch'", command(sys.executable, "-c", "import torch")),
            Subject("conformance run --scale tiny", command(*run, "tiny"), "python -c 'import torch'"),
            Subject("conformance record --scale tiny", command(*record), "python -c 'import torch'"),
            Subject("conformance compare, of two", command(HAL, "conformance", "compare", recording, recording)),
        ]
        main("suite", "The conformance suite on a CPU", [("s", subjects)])
