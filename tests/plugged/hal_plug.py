# SPDX-License-Identifier: Apache-2.0
"""The backend of `plug`: everything that hal needs of a plug-in device of torch."""

import importlib.util

from hal import Absent
from hal.torch_backend import TorchBackend


class PlugBackend(TorchBackend):
    """The device of torch_plug."""

    plugin_api = (1, 0)
    name = "plug"
    vendor = "the tests"
    torch_type = "plug"
    package = "torch_plug"

    def present(self):
        if importlib.util.find_spec("torch_plug") is None:
            raise Absent("the package torch_plug is not installed", device=self.name)
        return 1, ("the package torch_plug is installed",)


backend = PlugBackend()
