"""The transformer. To learn how one works, read, in this order:

1. norms.py: what keeps vectors at one size.
2. positions.py: how the model knows the order of what it reads.
3. reach.py: who may look at whom, and the fastest way to compute it.
4. attention.py: how positions gather from each other.
5. feed_forward.py: what is thought about each position alone.
6. transformer.py: the parts put together, from tokens to scores.
7. cache.py: what generation keeps, so that it reads each token once.
8. loss.py: how surprised the model is by what really came next.

shape.py holds what the settings imply, linear.py the quickest product, precision.py how exact
products are, store.py how a model lies on disk.
"""
