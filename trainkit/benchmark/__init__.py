"""Ways of training side by side: what they cost in time and memory, and whether they learn the same.

A cell is one run of a sweep. `sweep` makes cells of a person's words, `rounds` lets each one take its turn in a process
of its own (`process`, `cell`), `document` makes figures of what came back, and the rest shows them.
"""
