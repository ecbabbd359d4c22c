"""Independent float64 implementations, written from the formulas; they share no code with the package."""
