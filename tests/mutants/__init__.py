"""Faults to plant in the package, and what plants them: does a test see each?"""
