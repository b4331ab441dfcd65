"""What is shown: one module per figure and table, `draw(rows) -> Figure`, `table(rows) -> DataFrame`. Nothing here trains."""
