"""The report of a run as one HTML page: `page.write_report`, and a module for each group of sections."""
