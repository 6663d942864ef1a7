# SPDX-License-Identifier: Apache-2.0
"""From peer to peer: an engine that runs is a source of its weights for engines that start."""
