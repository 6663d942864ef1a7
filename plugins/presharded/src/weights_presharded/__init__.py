# SPDX-License-Identifier: Apache-2.0
"""Weights already cut per rank: each rank gets its own shard, from disk or from a peer."""
