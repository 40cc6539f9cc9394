"""What runs left behind, beside each other: tables, charts, a page."""
