# SPDX-License-Identifier: Apache-2.0
"""The doors through which a program reaches CUDA, one file for each; importing this fills the table of APIs."""

from hal.launch.surface import compiler, cuda, distributed, operators, tensors

__all__ = ["compiler", "cuda", "distributed", "operators", "tensors"]
