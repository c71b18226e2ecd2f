"""The report: one summary, shown in the terminal and as Markdown."""
