# SPDX-License-Identifier: Apache-2.0
"""A plugin for weights-core: weights freed as an engine consumes them."""
