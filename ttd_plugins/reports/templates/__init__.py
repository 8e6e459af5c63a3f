"""Jinja2 templates of the reports and the app."""
