# SPDX-License-Identifier: Apache-2.0
"""A plugin for weights-core: a checkpoint read at the speed of its storage."""
