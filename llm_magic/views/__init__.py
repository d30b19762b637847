"""What people see: functions from nouns to a ``Report`` (text for terminals, static HTML for notebooks)."""
