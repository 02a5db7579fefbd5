"""The suite proves everything on the CPU, also on a machine with GPUs: there they are hidden, unless tests/gpu is what runs."""

import os

if not os.environ.get("LPL_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
