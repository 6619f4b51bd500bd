# SPDX-License-Identifier: Apache-2.0
"""The float64 oracle of the MoE operators: one file for each, value and admitted error together.

Stages start from exact numbers, inputs or what the device itself returned from the stage before (a local bound,
`bounds`); where the stage before cannot be seen, variances are chained (`chained`).

Legend: T tokens, D model dim, F expert hidden dim, E experts, K choices, R routed rows, n rows of one expert.
"""
