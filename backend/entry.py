"""What run.sh runs, and what multiprocessing runs first of all in each process that it spawns, as `__mp_main__`.

A module of its own, for multiprocessing skips those that are called `__main__`; and a light one, for until it has run
in a process nobody looks after that.
"""

if __name__ == "__mp_main__":
    from common import links, orphan_watch

    orphan_watch.begin()
    links.begin()
if __name__ == "__main__":
    from backend.__main__ import main

    main()
