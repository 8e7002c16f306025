"""The machine: devices, low-precision copies, memory."""
