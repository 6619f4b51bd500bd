# SPDX-License-Identifier: Apache-2.0
"""The command line, one file per command. Only click is imported before a command runs."""
