"""How a serving process runs its event loop: its allocator, its collector, and the loop itself."""

import gc
from collections.abc import Coroutine
from typing import Any

# A step of an engine makes some eight for each stream, which are gone before the next: no work for the collector.
YOUNG_OBJECTS = 5000


def run(work: Coroutine[Any, Any, Any]) -> None:
    """Run `work` to its end; call before threads start."""
    import uvloop

    from common.processes import return_large_blocks

    return_large_blocks()
    gc.set_threshold(YOUNG_OBJECTS, *gc.get_threshold()[1:])
    uvloop.run(work)
