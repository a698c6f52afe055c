"""What only a GPU can tell: the tests that need one, step times, launches, refreshes by method, memory, targets.

`benchmarks/gpu.sh` runs it. Each part is a process with a time limit of its own, so that one that fails or hangs costs
nothing but itself.
"""
