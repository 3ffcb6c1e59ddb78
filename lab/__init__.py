"""What users measure: a machine, and what a file loses in each precision."""
