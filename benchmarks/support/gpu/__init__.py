"""What is measured of kernels: entries, checks, times and the machine's measured peaks."""
