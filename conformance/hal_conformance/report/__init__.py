# SPDX-License-Identifier: Apache-2.0
"""What a run found, for people and for machines."""
