"""What holds for every test."""

import os
import signal

# An M5's GPU multiplies float32 matrices in TF32 unless this says otherwise, which MLX reads once.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# A shell lets its background jobs ignore Ctrl-C, and they hand that on to every process they start:
# the tests that interrupt one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
