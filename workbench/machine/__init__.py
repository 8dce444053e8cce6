"""The machine and its processes, as the parent sees them. Standard library, psutil and NVML only."""
