# SPDX-License-Identifier: Apache-2.0
"""A plugin for weights-core: the files of a checkpoint read concurrently."""
