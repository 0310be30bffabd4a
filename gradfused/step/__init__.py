"""A step: its options, rows, state and memory, and the table that takes it."""
