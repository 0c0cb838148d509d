"""Faults to plant in the package, and a runner that checks whether a test detects each one."""
