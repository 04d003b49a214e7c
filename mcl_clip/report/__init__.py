"""What a run has learned, as one page to look at: `page.write_report`, and a module for each of its sections."""
