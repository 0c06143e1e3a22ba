"""Makes the bundle that ./package.sh promises: a folder that runs on a machine which has a kernel, libc and /bin/sh.

`__main__` reads as the order of the work; each other module is one part of the bundle or one proof about it.
"""
