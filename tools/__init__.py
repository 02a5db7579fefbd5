"""Benchmarks, figures, cost estimates, fault injection and the scripts that rebuild the assets.

Each runs from the root of the repository: `python -m tools.NAME`, or `python tools/NAME.py`
where it needs no other tool; tests import them as `tools.NAME`.
"""
