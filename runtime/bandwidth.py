"""Memory bandwidth: how fast this process reads memory right now."""

import time

import torch

READ = 256_000_000  # bytes: more than a cache holds
TRIES = 5
GPU_READS = 20  # of one try: a single one takes as long as its launch


def seconds_per_byte(device: torch.device) -> float:
    """Measure the time to read a byte of a large array on a device, the best of a few tries. On a CPU with the threads
    that PyTorch has."""
    numbers = torch.ones(READ // 4, device=device)
    reads = 1 if device.type == "cpu" else GPU_READS
    numbers.sum().item()  # the first one loads what it runs
    seconds = []
    for _ in range(TRIES):
        begun = time.perf_counter()
        for _ in range(reads):
            total = numbers.sum()
        total.item()  # waits for the device
        seconds.append(time.perf_counter() - begun)
    return min(seconds) / (reads * numbers.nbytes)
