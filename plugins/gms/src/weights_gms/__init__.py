# SPDX-License-Identifier: Apache-2.0
"""One copy of the weights for every engine on the node."""
