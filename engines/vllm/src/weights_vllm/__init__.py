# SPDX-License-Identifier: Apache-2.0
"""vLLM loads its weights through weights-core: `--load-format weights`."""
