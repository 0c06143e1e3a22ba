"""What all rooms need before anything imports torch."""

import os

# One thread computes, also in the servers that tests start. Two would wait for each other at each operation of models
# as small as ours: a step of the scripted one takes 12 ms where they sleep meanwhile, 6 where they keep the cores from
# what runs beside them, and 4 alone.
os.environ.setdefault("OMP_NUM_THREADS", "1")
