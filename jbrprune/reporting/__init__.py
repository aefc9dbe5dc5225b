"""Reports: records, tables, figures, pages, model cards."""
