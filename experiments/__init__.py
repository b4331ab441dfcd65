"""What is claimed: one module per claim, `measure(context) -> rows`, `judge(rows, criteria) -> verdicts`."""
