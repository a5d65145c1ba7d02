"""Pages that a browser shows: one self-contained HTML file per report, with its tables and figures."""
