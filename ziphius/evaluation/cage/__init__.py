"""The helper program of ``evaluation/sandbox.py``: it shuts itself in, then runs a program.

It is started as ``python -I -S``, so nothing here needs more than the standard library.
"""
