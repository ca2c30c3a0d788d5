"""Compare rounding methods: every method on every grid, at every bit width, on every model."""
