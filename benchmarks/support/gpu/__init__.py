"""What is measured of kernels: entries, their checks, their times and the machine's measured peaks."""
