# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

project = "moe-hal"
author = "the moe-hal developers"
copyright = "2026, the moe-hal developers"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "moe-hal"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "none"  # the signatures in the sources carry them; torch has no inventory offline
autodoc_member_order = "bysource"
nitpick_ignore_regex = [(r"py:.*", r"(torch|numpy|np|optional|collections|contextlib)\b.*")]
