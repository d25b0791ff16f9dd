"""Settings that hold for all tests; read before any test module imports torch."""

import os

# On matrices this small threads cost more than they give. On a busy machine they wait for each
# other awake: one test of test_loop.py took 152 s with two threads and 12 s with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
