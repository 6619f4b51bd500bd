# SPDX-License-Identifier: Apache-2.0
"""How far from the exact result an honest device may be, and what finds one that is further: bounds and detectors."""
