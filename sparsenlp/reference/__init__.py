"""One file per op in plain torch: these define what the kernels must compute."""
