"""The small problems of P3, networks for them, and trainings of several networks side by side."""
