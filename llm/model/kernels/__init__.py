"""Faster versions of single lines of llm/model/, each tested to equal the plain one.

attention.py: SDPA, varlen, FlexAttention and eager attention tuned for CPUs, and which one when.
linear.py: matrix products by oneDNN, and several linear layers as one product.
norms.py: RMSNorm in fewer passes.
cross_entropy.py: the loss without the logits of all positions in memory.
"""
