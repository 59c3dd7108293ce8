"""Reports from records: pages, tables, plots and comparisons, all from the one form that `load` reads them into."""
