# SPDX-License-Identifier: Apache-2.0
"""What stands in for libraries of CUDA kernels that are not installed, where torch has an equivalent.

A replacement is a module that an entry point of the group `hal.replacements` names under the library's name:
`flash_attn = "my_package.my_attention"`. It is found only while a device is adopted, and only where nothing else is.
"""
