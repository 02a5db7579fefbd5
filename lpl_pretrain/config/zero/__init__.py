"""DeepSpeed JSONs: engine tuning for ZeRO, checked without DeepSpeed.

A JSON tunes the engine and never says what is trained: batch, accumulation, clipping, precision and
optimizer belong to the run's own configuration.  Engine features that round, delay or reorder are
refused too: under them a rank's part of a parameter is no contiguous range, or the run is no longer
the same run.

    json_file.py  reads a JSON file strictly
    keys.py       every key that DeepSpeed 0.19.8 knows: type, range, default, stages
    translate.py  keys that our configuration owns, as `key=value` of ours
    check.py      all problems of a file at once
    foreign.py    what can be kept of a file that was written for something else
    builtin/      the files behind parallel.strategy zero1, zero2 and zero3
"""

from lpl_pretrain.config.zero.check import read_zero_config, zero_settings

__all__ = ["read_zero_config", "zero_settings"]
