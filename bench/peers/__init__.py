"""The contenders: each module runs in its own environment and is driven by `bench.load`."""
