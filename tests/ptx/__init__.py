"""An NVIDIA GPU for tests on a machine that has none: Triton's PTX, executed on the CPU."""
