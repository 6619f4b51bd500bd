# SPDX-License-Identifier: Apache-2.0
"""`hal scan`: what will happen to each line of a program that is specific to CUDA, read and not run."""
