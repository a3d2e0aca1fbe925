"""A job for other processes, in a module that imports nothing."""

import os


def square(item):
    """Ends the process over 3."""
    if item == 3:
        os._exit(11)
    return item * item
