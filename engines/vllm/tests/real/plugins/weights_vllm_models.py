# SPDX-License-Identifier: Apache-2.0
"""A model of vLLM's that its adapter cannot serve."""

from vllm.model_executor.models.llama import LlamaForCausalLM


class SilentForCausalLM(LlamaForCausalLM):
    """Does not say which parameters it loaded."""

    def load_weights(self, weights):
        super().load_weights(weights)
