"""Allocator settings that keep large buffers between steps, instead of returning them to the system.

glibc gives every block over 32 MB back to the kernel when it is freed. Training frees and asks for the same blocks at
every step, and on CPUs the page faults cost as much as the arithmetic.
"""

import ctypes
import logging
import platform

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # malloc.h


def keep_buffers() -> None:
    """From here on the process keeps its peak memory until it ends. Does nothing where the C library is not glibc."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 256 * 2**20}
    if all(mallopt(name, value) for name, value in settings.items()):
        logging.getLogger("headroom").info("allocator keeps freed buffers for speed (tune_malloc=false turns it off)")
