"""The report: one summary, shown in the terminal, as Markdown and as one HTML page."""
