"""The rows of the table of faults (benchmarks/faults.py): each injects one, and says what came of it."""
