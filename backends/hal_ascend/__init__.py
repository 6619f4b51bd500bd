# SPDX-License-Identifier: Apache-2.0
"""Huawei Ascend NPUs, through torch_npu.

State: written from the source of torch_npu 2.13, and tested against a stand-in. No such hardware has run this yet.
"""

from hal_ascend.backend import backend

__all__ = ["backend"]
