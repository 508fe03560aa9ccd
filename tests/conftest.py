"""What holds for every test."""

import signal

# A shell lets its background jobs ignore Ctrl-C, and they hand that on to every process they start:
# the tests that interrupt one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
