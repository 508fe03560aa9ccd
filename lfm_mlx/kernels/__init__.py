"""One operation a file: its reference and its kernel, twins behind one door.

Every door takes arrays and ints, and `use_kernel`: None takes the kernel where it can run and the
reference elsewhere, False takes the reference, True raises with the reason where it cannot run.
"""
