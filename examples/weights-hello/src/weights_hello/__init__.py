# SPDX-License-Identifier: Apache-2.0
"""A plugin for weights-core: checkpoints in NumPy's .npz archives."""
