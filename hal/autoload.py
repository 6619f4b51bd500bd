# SPDX-License-Identifier: Apache-2.0
"""Whether `import torch` loads everybody's plug-ins by itself: torch's own switch, which hal turns off."""

AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
"""The environment variable; "0" turns it off."""
