"""What the compilers made of every GPU kernel: `python -m benchmarks.kernels` prints the table (see `table`)."""
