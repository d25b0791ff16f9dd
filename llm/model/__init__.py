"""The transformer language model. Reading order, from one attention head to generation:

1. attention.py: softmax(Q K^T / sqrt(D)) V, and the layer around it.
2. positions.py: rotary embedding (RoPE) and learned position embedding.
3. feed_forward.py: the feed-forward network (MLP), gated or not.
4. norms.py: RMSNorm and LayerNorm.
5. transformer.py: blocks, embedding and head: from tokens to logits.
6. loss.py: cross-entropy of the next token.
7. attention_mask.py: causal, sliding-window and per-document masks.
8. cache.py: the key/value cache of generation.

kernels/ holds faster versions of single lines of these files, each tested against the plain one.
Beside them: precision.py (mixed precision), masked_lm.py (masked language modeling) and weights.py
(the model on disk).
"""
