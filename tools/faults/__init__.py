"""Faults for tools/chaos.py: how they are drawn and injected, and what must hold afterwards."""
