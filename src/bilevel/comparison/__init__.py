"""Methods side by side at one point."""
