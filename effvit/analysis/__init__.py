"""What the measured numbers say: Pareto fronts, crossovers, slopes."""
