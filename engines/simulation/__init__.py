"""A speaking engine without a model: vLLM's dialect over a model of continuous batching."""
