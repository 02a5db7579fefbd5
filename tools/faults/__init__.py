"""Faults for tools/chaos.py: what may happen to a command, how it is made to happen, and what has
to hold afterwards.
"""
