"""The language model: data, tokenizer, model, training, inference and evaluation. No orchestrator
in it.
"""
