"""What all rooms need before anything imports torch."""

import os

# OpenMP's threads, and those of servers that tests start, sleep while they wait for each other. Busily they would keep
# the cores from what runs beside them, and where they have no core each, be forty times slower themselves.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
