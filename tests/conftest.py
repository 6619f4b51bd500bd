# SPDX-License-Identifier: Apache-2.0
"""Profiles of hypothesis, and one thread for torch: two workers of pytest share two cores."""

import os

import hypothesis
import torch

hypothesis.settings.register_profile("dev", max_examples=20, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))
torch.set_num_threads(1)
