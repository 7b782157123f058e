"""How much accuracy compression costs, on tasks that anyone can rerun."""
