# SPDX-License-Identifier: Apache-2.0
"""How a device multiplies, measured from outside: `report.probe` for all of it, `prediction` for whole products."""
