"""What a control group of Linux leaves of the memory that it allows its processes. Containers and batch systems set
such limits; beyond one the kernel kills the process, however much the machine has free.
"""

from pathlib import Path, PurePosixPath

# Of version 2 and 1: limit, usage, and which line of memory.stat says how much of it are files kept for convenience.
UNIFIED = ("memory.max", "memory.current", "inactive_file")
LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def memory_left(root: Path = Path("/")) -> int | None:
    """Bytes that the tightest of the groups leaves which this process is in, one within the other. None where none
    states a limit. A group that is not to be seen from within a container is where its files begin."""
    try:
        memberships = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    left = []
    for membership in memberships:
        _, controllers, path = membership.split(":", 2)
        group = PurePosixPath(path)
        for place in (group, *group.parents):
            if not controllers:
                left.append(_left(root / "sys/fs/cgroup" / place.relative_to("/"), *UNIFIED))
            elif "memory" in controllers.split(","):
                left.append(_left(root / "sys/fs/cgroup/memory" / place.relative_to("/"), *LEGACY))
    return min((number for number in left if number is not None), default=None)


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        allowed, used = (int((folder / name).read_text()) for name in (limit, usage))
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or "max"
        return None
    return max(0, allowed - used + int(counts.get(reclaimable, 0)))
