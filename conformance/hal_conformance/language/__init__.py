# SPDX-License-Identifier: Apache-2.0
"""A small language model over real text: what trajectories train, and where the inputs of a trained model come from.

`ling` has the shape of Ling-Lite with small matrices, `llama` is a dense control with as many activated parameters.
"""
