"""Reports from records: plots now; pages, comparisons and Markdown have their place here."""
