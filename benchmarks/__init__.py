"""
What a task costs, here and elsewhere. Not part of the package. `peers` runs under other queues' Pythons too, so this
file imports nothing.
"""
