# SPDX-License-Identifier: Apache-2.0
"""Running tasks on one subject, in processes that may die at any moment, and judging what they return."""
