# SPDX-License-Identifier: Apache-2.0
"""What one subject returned, in a file, and what several such files say of each other."""
