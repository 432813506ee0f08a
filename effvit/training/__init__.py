"""One recipe for every mechanism: its settings, the loop, and runs that survive being killed."""
